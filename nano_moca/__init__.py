"""nano_moca: how a generative vision-language model becomes a bidirectional multimodal encoder.

    import nano_moca
    moca = nano_moca.load("path or hub id")
    vectors = moca.embed(["a cat", {"text": nano_moca.MARK + "a photo", "images": [image]}])

Reading order: config, attention, vision, language, model, weights, processor, masking, kernels,
losses, data, trainer, report, this file, and then the training loops in train_cpt.py and
train_cl.py (which ranks its held-out pairs by evaluate.py).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Before torch is loaded: threads that spin while they wait slow a busy machine down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor

from nano_moca.config import MocaError, load_config
from nano_moca.data import make_record
from nano_moca.model import VLM
from nano_moca.processor import MARK, Processor, Record
from nano_moca.weights import build, find_checkpoint, stored_dtype

__all__ = ["MARK", "Moca", "MocaError", "Record", "as_records", "load"]
TOKENS_AT_ONCE = 8192  # a forward pass's budget: items are packed up to it


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

        An item is a text, or {"text": ..., "images": [paths, bytes or PIL images]} with one mark
        `<|vision_start|><|image_pad|><|vision_end|>` in the text per image. MocaError names an item
        that cannot be used.
        """
        encoded = [self.processor.encode(record, self.max_tokens) for record in as_records(items)]
        ends = np.cumsum([len(item.tokens) for item in encoded]) // TOKENS_AT_ONCE
        vectors = [torch.empty(0, self.model.config.width)]
        for part in np.unique(ends):
            items = [item for item, end in zip(encoded, ends, strict=True) if end == part]
            batch = self.processor.pack(items).to(self.model.head.device)
            vectors.append(self.model.embed(batch, self.attention == "causal", self.pooling).cpu())
        return torch.cat(vectors)

    def caption(self, items: Sequence[str | dict | Record], steps: int = 32) -> list[str]:
        """What a causal model says next, greedily, up to its end token or `steps` tokens."""
        records = as_records(items)
        if not records:
            return []
        batch = self.processor.batch(records).to(self.model.head.device)
        tokens = self.model.greedy(batch, steps, self.processor.end_token)
        return [self.processor.tokenizer.decode(t, skip_special_tokens=False) for t in tokens]


def as_records(items: Sequence[str | dict | Record]) -> list[Record]:
    """Texts, {"text", "images"} objects and records, as records."""
    if isinstance(items, (str, dict, Record)):
        raise MocaError("one item alone: give a list of items, [item]")
    return [item if isinstance(item, Record) else
            make_record({"text": item} if isinstance(item, str) else item, None, f"item {number}")
            for number, item in enumerate(items)]


def load(path_or_hub_id: str | Path, device: str | torch.device | None = None,
         dtype: torch.dtype | None = None, attention: str | None = None,
         pooling: str | None = None, min_pixels: int | None = None, max_pixels: int | None = None
         ) -> Moca:
    """Load a Qwen2-VL, Qwen2.5-VL or MoCa checkpoint.

    device: default CUDA if there is one. dtype: default float32 on CPU, the checkpoint's own on
    CUDA. attention: "bidirectional" or "causal", pooling: "mean" or "last"; default: what the model
    was trained with (our scripts write it into config.json), else bidirectional, and the mean, or
    if causal the last token. The pixel limits of images are the checkpoint's unless given.
    MocaError says what is wrong with the files.
    """
    folder = find_checkpoint(path_or_hub_id)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MocaError(f"no CUDA device is visible for {device}: use cpu")
    config = load_config(folder)
    trained = config.raw.get("nano_moca", {})
    attention = attention or trained.get("attention", "bidirectional")
    pooling = pooling or trained.get("pooling") or ("last" if attention == "causal" else "mean")
    if attention not in ("bidirectional", "causal") or pooling not in ("mean", "last"):
        raise MocaError(f"{folder}: attention is {attention!r} and pooling {pooling!r}: "
                        "use bidirectional or causal, mean or last")
    processor = Processor.load(folder, config, min_pixels, max_pixels)
    dtype = dtype or (stored_dtype(config) if device.type == "cuda" else torch.float32)
    return Moca(build(folder, config, device, dtype).eval(), processor, attention, pooling)

