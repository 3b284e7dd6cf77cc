"""A trained model in use: texts and images in, unit vectors out.

    moca = load("runs/cl/model")
    vectors = moca.embed(["a cat", {"text": MARK + "a photo", "images": [image]}])

`load` puts the parts together that training takes one by one: config, processor,
model, weights. A `Moca` packs any number of items into forward passes of a bounded
size; since packing changes nothing, nobody has to know which items ran together.

Left out: an index to search in, and several GPUs (an evaluation keeps its vectors).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nano_moca.attention import Segments
from nano_moca.batch import Batch, EncodedRecord, Record
from nano_moca.convert.configs import Section
from nano_moca.data import make_record
from nano_moca.distributed import choose_dtype
from nano_moca.families import load_config
from nano_moca.files import MocaError, reason
from nano_moca.model import POOLINGS, VLM
from nano_moca.processor import Processor
from nano_moca.weights import (PROCESSOR_FILES, empty_model, find_checkpoint, find_weights,
                               load_weights, stored_dtype)

TOKENS_AT_ONCE = 8192  # of one forward pass of `embed`, about


@dataclass
class Moca:
    """A model and its processor, with how hidden states become embeddings."""

    model: VLM
    processor: Processor
    attention: str = "bidirectional"
    pooling: str = "mean"
    max_tokens: int | None = None  # longer texts are shortened to it

    @torch.inference_mode()
    def embed(self, items: Sequence[str | dict | Record]) -> Tensor:
        """Unit vectors [N, D], float32 on the CPU, in the items' order.

        An item is a text, or {"text": ..., "images": [...]} with one mark
        `<|vision_start|><|image_pad|><|vision_end|>` in the text per image. An image is a
        path, bytes, a PIL image, or a uint8 array or tensor [height, width, 3]. MocaError
        names an item that cannot be used.
        """
        # Every item is looked at before the first one runs: a bad one is named at once.
        records = as_records(items)
        encoded = [self.processor.encode(record, self.max_tokens) for record in records]

        # All items are one stretch of tokens, cut every 8192; an item belongs to the
        # forward pass in which its last token lies.
        passes: dict[int, list[EncodedRecord]] = {}
        tokens = 0
        for item in encoded:
            tokens += len(item.tokens)
            passes.setdefault(tokens // TOKENS_AT_ONCE, []).append(item)

        # `pack` decodes images: never more of them at once than one pass takes.
        vectors = [torch.empty(0, self.model.config.width)]
        for part in passes.values():
            batch = self.processor.pack(part).to(self.model.head.device)
            embedded = self.model.embed(batch, self.attention == "causal", self.pooling)
            vectors.append(embedded.cpu())

        # Weights that are finite may still lead to infinity, or to nothing.
        table = torch.cat(vectors)  # [N, D]
        for record, length in zip(records, table.norm(dim=-1), strict=True):
            if not 0.9 < length < 1.1:
                raise MocaError(f"{record.source}: its vector is zero or not finite: try dtype "
                                "float32, or another checkpoint")
        return table

    def caption(self, items: Sequence[str | dict | Record], steps: int = 32) -> list[str]:
        """What a causal model says next, greedily, up to its end token or `steps`
        tokens. All items run in one batch."""
        records = as_records(items)
        if not records:
            return []
        batch = self.processor.batch(records).to(self.model.head.device)
        captions = greedy(self.model, batch, steps, self.processor.end_token)

        # Special tokens are shown: they are what the model said.
        decode = self.processor.tokenizer.decode
        return [decode(tokens, skip_special_tokens=False) for tokens in captions]


def as_records(items: Sequence[str | dict | Record]) -> list[Record]:
    """Texts, {"text", "images"} objects and records, as records.

    MocaError if a single item is given in place of a list (a text would be taken for a
    list of letters), or an item is no record; its source is "item" and its number, unless
    it is a record with a source of its own.
    """
    if isinstance(items, (str, bytes, dict, Record)) or not isinstance(items, Iterable):
        raise MocaError("one item alone: give a list of items, [item]")
    records = []
    for number, item in enumerate(items):
        source = f"item {number}"
        if isinstance(item, Record):
            source = source if item.source == Record.source else item.source
            item = {"text": item.text, "images": item.images}
        item = {"text": item} if isinstance(item, str) else item

        # Were "image" passed over, its text would be embedded alone.
        if isinstance(item, dict) and item.keys() - {"text", "images"}:
            raise MocaError(f'{source}: its keys are {", ".join(map(str, item))}: '
                            'give "text" and "images" only')
        records.append(make_record(item, None, source))
    return records


@torch.no_grad()
def greedy(model: VLM, batch: Batch, steps: int, end: int | None) -> list[list[int]]:
    """Continue each record by its likeliest next token, up to `steps` times; the ids,
    cut before the token `end`. Causal and without a cache."""
    embeddings = list(model.embed_inputs(batch).split(batch.lengths))  # N x [L, D]
    positions = list(batch.positions.split(batch.lengths, dim=1))  # N x [3, L]
    captions: list[list[int]] = [[] for _ in embeddings]
    for _ in range(steps):
        # The last hidden state of each record predicts its next token.
        segments = Segments.of([len(one) for one in embeddings], batch.tokens.device)
        x = torch.cat(embeddings)  # [T, D]
        hidden = model.language(x, torch.cat(positions, dim=1), segments, causal=True)
        last = hidden[segments.offsets[1:].long() - 1]  # [N, D]
        tokens = (last @ model.head.T).argmax(-1)  # [N]
        new = model.language.embed_tokens(tokens)  # [N, D]

        # Append it; all three axes go on from the largest position so far.
        for n, token in enumerate(tokens.tolist()):
            captions[n].append(token)
            embeddings[n] = torch.cat([embeddings[n], new[n : n + 1]])
            after = positions[n].max() + 1
            positions[n] = torch.cat([positions[n], after.expand(3, 1)], dim=1)
        if all(end in caption for caption in captions):
            break

    return [ids[: ids.index(end)] if end in ids else ids for ids in captions]


def load(path_or_hub_id: str | Path, device: str | torch.device | None = None,
         dtype: torch.dtype | None = None, attention: str | None = None,
         pooling: str | None = None, min_pixels: int | None = None,
         max_pixels: int | None = None, max_tokens: int | None = None,
         processor: str | Path | None = None, allow_extra: bool = False) -> Moca:
    """Load a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or MoCa checkpoint.

    device: default CUDA if there is one. dtype: default the checkpoint's own on CUDA,
    float32 on CPU and on a GPU older than Ampere. attention: "bidirectional" or "causal",
    pooling: "mean" or "last"; default: what the model was trained with (our scripts write
    it into config.json), else bidirectional, and the mean, or if causal the last token. The
    pixel limits of images are the checkpoint's unless given. max_tokens: longer texts
    are shortened to it; default: what the model was trained with, else no limit.
    processor: the checkpoint whose tokenizer and image processor are taken, for weights
    that come without theirs. allow_extra: pass over tensors that the model does not
    need. MocaError says what is wrong with the files.
    """
    folder = find_checkpoint(path_or_hub_id)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise MocaError(f"device {device} cannot be used ({reason(error)}): use cpu") from None

    # What the caller asks for, else what the model was trained with, else the usual.
    config = load_config(folder)
    asked = {"attention": attention, "pooling": pooling, "max_tokens": max_tokens}
    asked = {key: value for key, value in asked.items() if value is not None}
    said = Section(config.raw.get("nano_moca", {}) | asked, f"{folder}: ")
    attention = said.choice("attention", "bidirectional", "causal")
    usual = POOLINGS if attention == "bidirectional" else POOLINGS[::-1]
    pooling = said.choice("pooling", *usual)
    if said.values.get("max_tokens") is not None:
        max_tokens = said.number("max_tokens", 1, 1, 10**9)

    # From --processor only tokenizer and image processor are taken, no weights.
    files = find_checkpoint(processor, PROCESSOR_FILES) if processor else folder
    prepare = Processor.load(files, config, min_pixels, max_pixels)
    usual = stored_dtype(config) if device.type == "cuda" else torch.float32
    dtype = choose_dtype(device, dtype, usual)

    # The memory is given once, in the dtype and on the device where it stays; and only
    # if the weights fit into it.
    model = empty_model(config, dtype)
    find_weights(folder, model, allow_extra)
    model.to_empty(device=device)
    load_weights(model, folder, allow_extra=allow_extra)
    return Moca(model.eval(), prepare, attention, pooling, max_tokens)
