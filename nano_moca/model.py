"""The vision-language model, and the three things one does with it: caption, embed, restore.

    tokens, patches -> embeddings, with image tokens from the vision tower in their places ->
    decoder -> hidden states

- `greedy` reads the hidden states causally and predicts the next token: what the checkpoint was
  made for.
- `embed` reads them in both directions and pools each sequence into one unit vector: what MoCa
  makes of it.
- `Restorer` (stage 1) predicts masked tokens with the model's own output head, and the pixels of
  masked patches with one more layer.

Left out: video, sampling, key-value caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nano_moca.attention import Segments
from nano_moca.config import Config
from nano_moca.language import Decoder, DecoderLayer, mrope_angles
from nano_moca.vision import VisionTower

if TYPE_CHECKING:  # for annotations only: both files come later in the reading order
    from nano_moca.masking import Corruption
    from nano_moca.processor import Batch


class VLM(nn.Module):
    """Qwen2-VL or Qwen2.5-VL: vision tower, decoder, output head (the embedding itself when
    tied)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.always_see = False  # run the vision tower without images too (see trainer.shard)
        self.visual = VisionTower(config.vision)
        self.language = Decoder(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def head(self) -> Tensor:
        """[V, D]: the output embedding."""
        return self.language.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def input_embeddings(self, batch: Batch) -> Tensor:
        """[T, D]: each token's embedding, and at image tokens what the vision tower made of their
        patches."""
        x = self.language.embed_tokens(batch.tokens)  # [T, D]
        if len(batch.grids):
            image_tokens = self.visual(batch.patches, batch.grids)  # [G, D]
            return x.index_copy(0, batch.image_rows, image_tokens.to(x.dtype))
        if self.always_see:
            # Under FSDP every rank must join every all-gather, or the others wait forever: see one
            # blank group.
            side = self.config.vision.merge
            blank = x.new_zeros(side * side, self.config.vision.patch_values)
            x = x + 0.0 * self.visual(blank, torch.tensor([[1, side, side]])).sum()
        return x

    def forward(self, batch: Batch, causal: bool) -> Tensor:
        """The hidden states of a packed batch after the final norm, [T, D]."""
        segments = Segments(batch.lengths, batch.tokens.device)
        return self.language(self.input_embeddings(batch), batch.positions, segments, causal)

    def embed(self, batch: Batch, causal: bool, pooling: str) -> Tensor:
        """Unit vectors [N, D] float32, one per sequence: the mean of its hidden states, or its
        last one."""
        return F.normalize(pool(self(batch, causal), batch, pooling), dim=-1)

    @torch.no_grad()
    def greedy(self, batch: Batch, steps: int, end: int) -> list[list[int]]:
        """Greedy decoding, causal and uncached: up to `steps` tokens per sequence, cut before
        `end`."""
        embeddings = list(self.input_embeddings(batch).split(batch.lengths))
        positions = list(batch.positions.split(batch.lengths, dim=1))
        captions: list[list[int]] = [[] for _ in embeddings]
        for _ in range(steps):
            segments = Segments(tuple(len(x) for x in embeddings), batch.tokens.device)
            x, where = torch.cat(embeddings), torch.cat(positions, 1)
            hidden = self.language(x, where, segments, causal=True)
            last = hidden[segments.offsets[1:].long() - 1]  # [N, D]
            tokens = (last @ self.head.T).argmax(-1)  # [N]
            new = self.language.embed_tokens(tokens)  # [N, D]
            for n, token in enumerate(tokens.tolist()):
                captions[n].append(token)
                embeddings[n] = torch.cat([embeddings[n], new[n : n + 1]])
                after = positions[n].max() + 1  # all three axes go on from the largest so far
                positions[n] = torch.cat([positions[n], after.expand(3, 1)], 1)
            if all(end in caption for caption in captions):
                break
        return [c[: c.index(end)] if end in c else c for c in captions]


def pool(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """Hidden states [T, D] -> one float32 vector per sequence, [N, D]: "mean" or "last"."""
    ends = batch.cu_seqlens[1:].to(hidden.device)  # [N]
    if pooling == "last":
        return hidden[ends - 1].float()
    if pooling != "mean":
        raise ValueError(f"pooling is {pooling!r}; it is 'mean' or 'last'")
    lengths = torch.tensor(batch.lengths, device=hidden.device)
    owner = torch.repeat_interleave(torch.arange(len(ends), device=hidden.device), lengths)  # [T]
    sums = hidden.new_zeros(len(ends), hidden.shape[1], dtype=torch.float32)
    return sums.index_add(0, owner, hidden.float()) / lengths[:, None]


class PatchDecoder(nn.Module):
    """Stage 1's MAE decoder: one bidirectional decoder layer and a linear map to pixels."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layer = DecoderLayer(config)
        self.head = nn.Linear(config.width, config.vision.group_values)

    @torch.no_grad()
    def start_from(self, decoder: Decoder, seed: int) -> None:
        """The layer starts as the decoder's middle one (as MoCa's does), the linear map small and
        random."""
        middle = decoder.layers[len(decoder.layers) // 2]
        for mine, theirs in zip(self.layer.parameters(), middle.parameters(), strict=True):
            mine.copy_(theirs)
        generator = torch.Generator().manual_seed(seed)
        fill(self.head.weight, torch.randn(self.head.weight.shape, generator=generator) * 0.02)
        fill(self.head.bias, torch.zeros(self.head.bias.shape))

    def forward(self, hidden: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """Hidden states [T, D] of the decoder -> pixels [G, 4704] of the groups whose tokens are
        `rows` [G]."""
        segments = Segments(batch.lengths, hidden.device)
        angles = mrope_angles(batch.positions, self.config)
        return self.head(self.layer(hidden, angles, segments, causal=False)[rows])


class Restorer(nn.Module):
    """Stage 1: the model and its MAE decoder, with the loss computed inside `forward`.

    FSDP gathers the embedding (and a tied head) only while the root module's forward runs, so the
    loss, which needs the head, must run there too.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm
        with torch.device(vlm.head.device):  # "meta" while a model is being built
            self.patch_decoder = PatchDecoder(vlm.config)

    def forward(self, corruption: Corruption, causal: bool, loss: Callable
                ) -> tuple[Tensor, Tensor]:
        """Run the corrupted batch and call `loss` (masked_reconstruction_loss or its like) on what
        was masked. Returns its two losses (MLM, MAE), float32 scalars."""
        hidden = self.vlm(corruption.batch, causal)  # [T, D]
        predicted = self.patch_decoder(hidden, corruption.batch, corruption.group_rows)  # [G, 4704]
        told = hidden[corruption.text_rows]  # [R, D]
        return loss(told, self.vlm.head, corruption.labels, predicted, corruption.target)


@torch.no_grad()
def fill(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter. Of a sharded one, every rank takes its own rows:
    nothing is sent."""
    if isinstance(parameter, DTensor):
        tensor = tensor.to(parameter.device, parameter.dtype)
        mesh, placements = parameter.device_mesh, parameter.placements
        tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    parameter.copy_(tensor)
