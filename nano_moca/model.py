"""The network: a vision-language model, and what MoCa makes of it.

    patches [P, 1176]  ->  vision tower  ->  image tokens [J, D]
    tokens [T]  ->  embeddings [T, D], image tokens in their places
                ->  decoder  ->  hidden states [T, D]

This file is read from top to bottom: the layers that both towers share, the vision
tower, the decoder, the two joined (`VLM`), and stage 1's reconstruction. If you know
Qwen-VL, begin at `pool` and `VLM`; all from `PatchDecoder` on is MoCa's.
The letters of all shapes stand in `__init__.py`. What one does with the hidden states:

- `greedy` (evaluate/embedder.py) computes them causally and predicts the next token:
  what the checkpoint was made for.
- `VLM.embed` reads them in both directions and pools each record into one unit vector:
  what MoCa makes of it.
- `ReconstructionModel` (stage 1) predicts masked tokens with the model's own output
  head, and the pixels of masked patches with one more layer.

The towers are Qwen2-VL's and Qwen2.5-VL's, with the parameter names of their
checkpoints. MoCa changes nothing in the vision tower, whose attention was always
bidirectional, and one thing in the decoder: `causal` becomes False (it acts in
attention.py: a mask that is left out). All weights are trained in both stages. Left
out: video, sampling, key-value caches.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nano_moca.attention import Segments, attend
from nano_moca.batch import Batch, Layout
from nano_moca.config import Config, VisionConfig
from nano_moca.distributed import copy_into_shard
from nano_moca.kernels import TRITON_AVAILABLE
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import MaskedBatch

VISION_NORM_EPS = 1e-6  # fixed in both families, not in their config.json
VISION_ROPE_THETA = 10000.0
POOLINGS = ("mean", "last")

# --- layers that both towers share ----------------------------------------------------


def fused_on_cuda(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a function as it is written on a CPU, and as one kernel on a GPU.

    Line by line a GPU would read and write all of a tensor for each operation, and
    that, not the arithmetic, is what takes the time. `torch.compile` makes one
    kernel of the lines, for tensors of any length (`dynamic`), the first time that
    a GPU's tensor comes.
    """
    @cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def run(x: Tensor, *others: object) -> Tensor:
        if not (x.is_cuda and TRITON_AVAILABLE):
            return function(x, *others)

        # torch.compile keeps a kernel for each width, dtype, layout in memory, and
        # with or without gradient: more than its usual 8. The limit is a thread's
        # own, and what checkpointing repeats runs in autograd's thread, so it is
        # set at each call.
        torch._dynamo.config.recompile_limit = 32
        return compiled()(x, *others)

    return run


@fused_on_cuda
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] divided by its root mean square, computed in float32, and scaled by
    weight [width]. Returns x's shape and dtype."""
    wide = x.float()
    mean_square = wide.pow(2).mean(-1, keepdim=True)  # [..., 1]
    scaled = wide * torch.rsqrt(mean_square + eps)
    return scaled.to(x.dtype) * weight


@fused_on_cuda
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all of one shape."""
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """`rms_norm` with a learnt weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the MLP of both decoders, and of Qwen2.5-VL's vision
    tower, with bias there. Between the maps [..., mlp_width]."""

    def __init__(self, width: int, mlp_width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=bias)
        self.up_proj = nn.Linear(width, mlp_width, bias=bias)
        self.down_proj = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        return self.down_proj(silu_gate(self.gate_proj(x), self.up_proj(x)))


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """How far an angle turns per position, float32 [dim / 2]: from 1
    to almost 1 / theta."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return theta**-exponents


@fused_on_cuda
def rotate(x: Tensor, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary position embedding: turn the pair (x[i], x[i + d/2]) by angles[i].

    x [T, H, d]; angles [T, d/2] float32. After it, positions enter the product of
    a query and a key only by their difference. Sines are taken in float32 whatever
    x's dtype, and products in `dtype`. Returns x's shape and dtype.
    """
    cos = angles.cos()[:, None, :].to(dtype)  # [T, 1, d/2]
    sin = angles.sin()[:, None, :].to(dtype)  # [T, 1, d/2]

    first, second = x.to(dtype).chunk(2, dim=-1)  # [T, H, d/2] each
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    return torch.cat([turned_first, turned_second], dim=-1).to(x.dtype)  # [T, H, d]


def run_layer(layer: nn.Module, checkpointing: bool, *inputs: object) -> Tensor:
    """Call a layer. With (activation) checkpointing what it computes inside is not kept
    but computed again in backward. That saves the memory of all layers but one, and
    costs a second forward pass."""
    if checkpointing:
        # Nothing in a layer is random: no state of the generators has to be kept.
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)


# --- the vision tower -----------------------------------------------------------------


class QuickGeluMLP(nn.Module):
    """The older MLP of Qwen2-VL: fc2(h * sigmoid(1.702 h)) with h = fc1(x)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        inner = self.fc1(x)  # [..., mlp_width]
        return self.fc2(inner * torch.sigmoid(1.702 * inner))


def vision_norm(config: VisionConfig) -> nn.Module:
    """RMSNorm in Qwen2.5-VL, LayerNorm in Qwen2-VL; their activations tell them apart."""
    if config.act == "silu":
        return RMSNorm(config.width, VISION_NORM_EPS)
    return nn.LayerNorm(config.width, VISION_NORM_EPS)


class VisionAttention(nn.Module):
    """Multi-head attention among the patches of a segment (a window, or an image)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments) -> Tensor:
        """x [P, E], angles [P, d/2] float32 -> [P, E]."""
        P, E = x.shape
        H = self.heads
        qkv = self.qkv(x).view(P, 3, H, E // H)  # [P, 3, H, d]
        query, key, value = qkv.unbind(1)  # [P, H, d] each

        # The rotation is computed in float32 here, as Qwen does; not so in the decoder.
        query = rotate(query, angles, torch.float32)  # [P, H, d]
        key = rotate(key, angles, torch.float32)  # [P, H, d]

        out = attend(query, key, value, segments, causal=False)  # [P, H, d]
        return self.proj(out.flatten(1))  # [P, E]


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = vision_norm(config)
        self.norm2 = vision_norm(config)
        self.attn = VisionAttention(config)
        if config.act == "silu":
            self.mlp = SwiGLU(config.width, config.padded_mlp_width, bias=True)
        else:
            self.mlp = QuickGeluMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments) -> Tensor:
        """x [P, E], angles [P, d/2] float32 -> [P, E]."""
        x = x + self.attn(self.norm1(x), angles, segments)
        x = x + self.mlp(self.norm2(x))
        return x


class Merger(nn.Module):
    """Norm, then the four patches of a group side by side through a two-layer MLP:
    one image token. (Elsewhere this is called the projector.)"""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.group_width = config.merge**2 * config.width
        self.ln_q = vision_norm(config)
        self.mlp = nn.Sequential(nn.Linear(self.group_width, self.group_width), nn.GELU(),
                                 nn.Linear(self.group_width, config.out_width))

    def forward(self, x: Tensor) -> Tensor:
        """x [P, E], the patches of a group next to each other -> image tokens [J, D]."""
        groups = self.ln_q(x).view(-1, self.group_width)  # [J, 4 * E]
        return self.mlp(groups)


class VisionTower(nn.Module):
    """Patches of images of any size become image tokens of the decoder's width.

    Images are packed end to end like texts. Qwen2.5-VL saves most of the attention's
    cost by letting patches see only their window; a few blocks see the whole image.
    For packed attention a window is one more kind of short sequence: the groups are
    sorted by window at the start, and back at the end.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        # The checkpoint's 3-D convolution, whose stride is its kernel's size, is a
        # linear map of a flattened patch.
        self.patch_embed = nn.Linear(config.patch_values, config.width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def rotary_angles(self, layout: Layout) -> Tensor:
        """[P, d/2] float32, in the order of the windows: 2-D rotary embedding. Half of a
        head turns with the patch's row, half with its column."""
        head_width = self.config.width // self.config.heads
        device = layout.positions.device
        frequencies = rotary_frequencies(head_width // 2, VISION_ROPE_THETA, device)  # [d/4]
        return (layout.positions[:, :, None] * frequencies).flatten(1)

    def forward(self, patches: Tensor, layout: Layout) -> Tensor:
        """patches [P, 1176], by 2x2 groups, and where they are -> image tokens [J, D]."""
        angles = self.rotary_angles(layout)  # [P, d/2]

        # Embed the patches, and sort them by window.
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))  # [P, E]
        groups = x.view(len(layout.order), self.config.merge**2, -1)  # [J, 4, E]
        x = groups[layout.order].flatten(0, 1)  # [P, E]

        for number, block in enumerate(self.blocks):
            whole = number in self.config.full_blocks
            segments = layout.whole if whole else layout.windows
            x = run_layer(block, self.checkpointing, x, angles, segments)  # [P, E]

        # Four patches become one image token; then back from windows to the image's
        # order.
        image_tokens = self.merger(x)  # [J, D]
        return image_tokens[layout.inverse]


# --- the decoder ----------------------------------------------------------------------


def mrope_angles(positions: Tensor, config: Config) -> Tensor:
    """Rotary angles for three axes (M-RoPE): positions [3, T] -> angles [T, d/2] float32.

    A token's position is a triple (frame, row, column). For text the three are
    equal, so this is ordinary rotary embedding; an image token carries its place in
    the grid. Each of the d/2 frequencies turns with one axis, `config.rope_axes`:
    in Qwen2 the fastest with the frame, the next with the row, the slowest with the
    column.
    """
    frequencies = rotary_frequencies(config.head_width, config.rope_theta, positions.device)
    # Views of the three rows; an index tensor would have to be sent to the GPU.
    turning = torch.stack([positions[axis] for axis in config.rope_axes], dim=1)  # [T, d/2]
    return turning * frequencies


class SelfAttention(nn.Module):
    """Grouped-query attention: H query heads share K key and value heads. Bias on q,
    k and v, none on o."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_width = config.head_width
        self.q_proj = nn.Linear(config.width, config.heads * config.head_width)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_width)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_width)
        self.o_proj = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments, causal: bool) -> Tensor:
        """x [T, D], angles [T, d/2] float32 -> [T, D]."""
        T = len(x)
        H, K, d = self.heads, self.kv_heads, self.head_width
        query = self.q_proj(x).view(T, H, d)
        key = self.k_proj(x).view(T, K, d)
        value = self.v_proj(x).view(T, K, d)

        # Positions enter here.
        query = rotate(query, angles, x.dtype)
        key = rotate(key, angles, x.dtype)
        out = attend(query, key, value, segments, causal)  # [T, H, d]
        return self.o_proj(out.flatten(1))  # [T, D]


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments, causal: bool) -> Tensor:
        """x [T, D], angles [T, d/2] float32 -> [T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), angles, segments, causal)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Qwen2: token embeddings in, hidden states after the final norm out.

    It was trained as a causal language model. With `causal` False the same weights
    form the bidirectional encoder that MoCa trains; nothing else changes.
    """

    layer = DecoderLayer  # a later family has another

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, segments: Segments, causal: bool) -> Tensor:
        """x [T, D] embeddings, positions [3, T] -> hidden states [T, D]."""
        angles = mrope_angles(positions, self.config)  # [T, d/2]
        for layer in self.layers:
            x = run_layer(layer, self.checkpointing, x, angles, segments, causal)  # [T, D]
        return self.norm(x)


# --- the vision-language model --------------------------------------------------------


def pool(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """Hidden states [T, D] -> one float32 vector per record, [N, D].

    "mean": of all its tokens, which is MoCa's choice. "last": its last token, the
    only one that has seen the whole record under causal attention. (Released code:
    src/vlm_backbone/qwen2_5_vl_embed/qwen2_5_vl_embed.py:9-44, 291-294.)
    """
    T, D = hidden.shape
    N, offsets = len(batch.lengths), batch.segments.offsets  # [N+1]
    if pooling == "last":
        return hidden[offsets[1:].long() - 1].float()
    if pooling != "mean":
        raise ValueError(f"pooling is {pooling!r}; it is 'mean' or 'last'")

    # Add each token to the sum of its record, in float32. (`output_size` spares a
    # wait: else the host would have to read the sum of the lengths from the GPU.)
    lengths = offsets.diff()  # [N]
    owner = torch.repeat_interleave(lengths, output_size=T)  # [T] the record of each token
    zeros = hidden.new_zeros(N, D, dtype=torch.float32)
    return zeros.index_add(0, owner, hidden.float()) / lengths[:, None]  # [N, D]


class VLM(nn.Module):
    """Vision tower, decoder and output head (the embedding itself when they are tied)."""

    # A later family has other towers, and all else from here.
    vision_tower = VisionTower
    decoder = Decoder

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.run_vision_always = False  # also in a batch without images: see `embed_inputs`
        self.visual = self.vision_tower(config.vision)
        self.language = self.decoder(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def head(self) -> Tensor:
        """[V, D]: the output embedding."""
        return self.language.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """What a checkpoint holds, by name: all parameters but those of adapters (lora.py)."""
        return [pair for pair in self.named_parameters() if ".lora_" not in pair[0]]

    def set_checkpointing(self, on: bool) -> None:
        """Whether both towers recompute their activations in backward."""
        self.visual.checkpointing = on
        self.language.checkpointing = on

    def embed_inputs(self, batch: Batch) -> Tensor:
        """[T, D]: each token's embedding, and at image tokens what the vision tower
        made of their patches."""
        x = self.language.embed_tokens(batch.tokens)  # [T, D]
        if len(batch.image_index):
            image_tokens = self.visual(batch.patches, batch.layout)  # [J, D]
            x = x.index_copy(0, batch.image_index, image_tokens.to(x.dtype))
        elif self.run_vision_always:
            # Among several ranks each must run the tower at every step, or the
            # others wait forever in its all-gathers. A blank group with weight zero
            # changes nothing.
            blank = x.new_zeros(len(batch.layout.positions), self.config.vision.patch_values)
            x = x + 0.0 * self.visual(blank, batch.layout).sum()
        return x

    def forward(self, batch: Batch, causal: bool) -> Tensor:
        """The hidden states of a packed batch after the final norm, [T, D]."""
        x = self.embed_inputs(batch)  # [T, D]
        return self.language(x, batch.positions, batch.segments, causal)

    def embed(self, batch: Batch, causal: bool, pooling: str) -> Tensor:
        """One unit vector per record, [N, D] float32."""
        hidden = self(batch, causal)  # [T, D]
        return F.normalize(pool(hidden, batch, pooling), dim=-1)


# --- stage 1: reconstruction ----------------------------------------------------------


class PatchDecoder(nn.Module):
    """Stage 1's MAE decoder (MoCa, section 3.1): one bidirectional decoder layer on top
    of the decoder, and a linear map to pixels. It is thrown away after stage 1.
    (Released code: qwen2_5_vl_embed.py:305-309 and 566-596.)"""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.config = config = decoder.config
        self.layer = decoder.layer(config)
        self.head = nn.Linear(config.width, config.vision.group_values)

    @torch.no_grad()
    def init_from(self, decoder: Decoder, seed: int) -> None:
        """Start the layer as a copy of the decoder's middle one, the linear map
        small and random. (Released code: src/model.py:315-320.)"""
        middle = decoder.layers[len(decoder.layers) // 2]
        for name, own in self.layer.named_parameters():
            own.copy_(middle.get_parameter(name))

        # Every rank draws the whole map from the same seed, and keeps its part.
        generator = torch.Generator().manual_seed(seed)
        shape = self.head.weight.shape
        copy_into_shard(self.head.weight, torch.randn(shape, generator=generator) * 0.02)
        copy_into_shard(self.head.bias, torch.zeros(self.head.bias.shape))

    def forward(self, hidden: Tensor, batch: Batch, group_index: Tensor) -> Tensor:
        """Hidden states [T, D] -> pixels [G, 4704] of the groups whose image tokens
        are `group_index` [G]."""
        # The angles are the decoder's; they cost nothing beside a layer, so they are
        # computed again instead of being handed through the VLM. As in the released code
        # this layer is always bidirectional, even on top of a causal decoder.
        angles = mrope_angles(batch.positions, self.config)  # [T, d/2]
        x = self.layer(hidden, angles, batch.segments, causal=False)  # [T, D]
        return self.head(x[group_index])  # [G, 4704]


def likeliest_tokens(hidden: Tensor, head: Tensor) -> Tensor:
    """Hidden states [R, D], head [V, D] -> the tokens with the largest logits [R]
    int64; in parts, so that there are never all logits at once."""
    weight = head.to(hidden.dtype)  # [V, D]
    return torch.cat([(part @ weight.T).argmax(-1) for part in hidden.split(256)])


class ReconstructionModel(nn.Module):
    """Stage 1: the VLM with its MAE decoder, and both losses computed inside `forward`.

    A masked token is predicted at its own position, with no shift. (MoCa, section 3.1;
    so does the released code, qwen2_5_vl_embed.py:553-596. In the next-token control
    the position before predicts: `text_index` and `labels` say so.) FSDP gathers the
    embedding (and a tied head) only while the root module's forward runs, so the loss,
    which needs the head, must run there too.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm
        with torch.device(vlm.head.device):  # "meta" while a model is being built
            self.patch_decoder = PatchDecoder(vlm.language)

    def forward(self, masked: MaskedBatch, causal: bool, mlm_count: float | None = None,
                mae_count: float | None = None, predict: bool = False) -> tuple[Tensor, Tensor]:
        """Run the masked batch, and compare what is restored with what was masked.

        Returns both losses (MLM, MAE), float32 scalars: sums divided by the counts,
        or by R and G. With `predict` the answers themselves, on the host: the
        likeliest tokens [R] int64, and the pixels [G, 4704] float32.
        """
        # One pass over everything, masked or not.
        hidden = self.vlm(masked.batch, causal)  # [T, D]

        # Images: one more layer predicts the pixels of the masked groups. It runs
        # for no group, too: so its weights get a gradient on every rank, if only
        # zeros.
        pixels = self.patch_decoder(hidden, masked.batch, masked.group_index)  # [G, 4704]

        # Text: the hidden states that have to predict a token.
        text_hidden = hidden[masked.text_index]  # [R, D]

        # Answers are made here for the same reason as losses: the head is gathered
        # now.
        if predict:
            tokens = likeliest_tokens(text_hidden, self.vlm.head)  # [R]
            return tokens.cpu(), pixels.float().cpu()
        return masked_reconstruction_loss(text_hidden, self.vlm.head, masked.labels,
            pixels, masked.target, mlm_count=mlm_count, mae_count=mae_count)
