"""A trained model in use: texts and images in, unit vectors out.

    moca = load("runs/cl/model")
    vectors = moca.embed(["a cat", {"text": MARK + "a photo", "images": [image]}])

`load` puts the parts together that training takes one by one: config, processor,
model, weights. A `Moca` packs any number of items into forward passes of a bounded
size; since packing changes nothing, nobody has to know which items ran together.

Left out: an index to search in, and several GPUs (an evaluation keeps its vectors).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nano_moca.batch import EncodedRecord, Record
from nano_moca.data import make_record
from nano_moca.families import load_config
from nano_moca.files import MocaError
from nano_moca.model import POOLINGS, VLM
from nano_moca.processor import Processor
from nano_moca.weights import (
    empty_model, find_checkpoint, find_weights, load_weights, stored_dtype,
)

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

        An item is a text, or {"text": ..., "images": [paths, bytes or PIL images]} with
        one mark `<|vision_start|><|image_pad|><|vision_end|>` in the text per image.
        MocaError names an item that cannot be used.
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
        return torch.cat(vectors)  # [N, D]

    def caption(self, items: Sequence[str | dict | Record], steps: int = 32) -> list[str]:
        """What a causal model says next, greedily, up to its end token or `steps`
        tokens. All items run in one batch."""
        records = as_records(items)
        if not records:
            return []
        batch = self.processor.batch(records).to(self.model.head.device)
        captions = self.model.greedy(batch, steps, self.processor.end_token)

        # Special tokens are shown: they are what the model said.
        decode = self.processor.tokenizer.decode
        return [decode(tokens, skip_special_tokens=False) for tokens in captions]


def as_records(items: Sequence[str | dict | Record]) -> list[Record]:
    """Texts, {"text", "images"} objects and records, as records.

    MocaError if a single item is given in place of a list (a text would be taken for a
    list of letters), or an item is no record; its source is "item" and its number.
    """
    if isinstance(items, (str, dict, Record)):
        raise MocaError("one item alone: give a list of items, [item]")
    records = []
    for number, item in enumerate(items):
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, Record):
            item = make_record(item, None, f"item {number}")
        records.append(item)
    return records


def load(path_or_hub_id: str | Path, device: str | torch.device | None = None,
         dtype: torch.dtype | None = None, attention: str | None = None,
         pooling: str | None = None, min_pixels: int | None = None,
         max_pixels: int | None = None) -> Moca:
    """Load a Qwen2-VL, Qwen2.5-VL or MoCa checkpoint.

    device: default CUDA if there is one. dtype: default float32 on CPU, the
    checkpoint's own on CUDA. attention: "bidirectional" or "causal", pooling: "mean" or
    "last"; default: what the model was trained with (our scripts write it into
    config.json), else bidirectional, and the mean, or if causal the last token. The
    pixel limits of images are the checkpoint's unless given. MocaError says what is
    wrong with the files.
    """
    folder = find_checkpoint(path_or_hub_id)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MocaError(f"no CUDA device is visible for {device}: use cpu")

    # What the caller asks for, else what the model was trained with, else the usual.
    config = load_config(folder)
    trained_with = config.raw.get("nano_moca", {})
    attention = attention or trained_with.get("attention", "bidirectional")
    usual = "last" if attention == "causal" else "mean"
    pooling = pooling or trained_with.get("pooling") or usual
    if attention not in ("bidirectional", "causal") or pooling not in POOLINGS:
        raise MocaError(f"{folder}: attention is {attention!r} and pooling {pooling!r}: "
                        "use bidirectional or causal, mean or last")

    processor = Processor.load(folder, config, min_pixels, max_pixels)
    if dtype is None:
        dtype = stored_dtype(config) if device.type == "cuda" else torch.float32

    # The memory is given once, in the dtype and on the device where it stays; and only
    # if the weights fit into it.
    model = empty_model(config, dtype)
    find_weights(folder, model)
    model.to_empty(device=device)
    load_weights(model, folder)
    return Moca(model.eval(), processor, attention, pooling)
