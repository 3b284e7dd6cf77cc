"""What data looks like on its way to the model: record, encoded record, batch.

    Record         text with a mark for each image, and the images
    EncodedRecord  token ids and positions; images still as they were given
    Batch          all that one forward pass computes with, packed end to end

Packed means: the tokens of all N records stand one after the other along one axis of
T tokens, and so do the patches of all images. There is no padding and no batch
dimension; `cu_seqlens` says where each record begins. A record's result is the same
whatever it is packed with. The letters of all shapes are explained in `__init__.py`.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MARK = "<|vision_start|><|image_pad|><|vision_end|>"  # stands in a text for one image
KINDS = ("long-document", "image-text", "text-only")  # of stage 2's pairs
ImageLike = str | Path | bytes | Image.Image | np.ndarray | Tensor  # arrays: uint8 [h, w, 3]


@dataclass
class Record:
    """One item: text with a mark for each image, the images, and where it came from."""

    text: str
    images: list[ImageLike] = field(default_factory=list)
    source: str = "the record"  # named in errors


@dataclass
class Pair:
    """A query, what it should find, and near misses that it should not find."""

    query: Record
    positive: Record
    negatives: list[Record]  # hard negatives


@dataclass
class EncodedRecord:
    """One record as tokens. Its images were looked at, but are decoded only on the rank
    that takes it."""

    tokens: np.ndarray  # [L] int64
    positions: np.ndarray  # [3, L] int64: frame, row, column
    images: list[ImageLike]  # as given: a process may hold only so many open files
    grids: list[tuple[int, int, int]]  # (frames, rows, columns) of patches per image
    source: str
    cost: int  # of computing with it, in text tokens
    patches: list[np.ndarray] | None = field(default=None, init=False)  # from decoded to packed


@dataclass
class Batch:
    """N records packed end to end: T tokens, and P patches of I images."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [3, T] int64: frame, row, column
    cu_seqlens: Tensor  # [N+1] int64 on the host: where each record begins, and the end
    patches: Tensor  # [P, 1176] float32: normalised pixels, by 2x2 groups
    grids: Tensor  # [I, 3] int64 on the host: frames, rows, columns of patches
    image_index: Tensor  # [J] int64: which of the T tokens are image tokens
    sources: list[str]  # N names for error messages

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each record."""
        return tuple(self.cu_seqlens.diff().tolist())

    def to(self, device: torch.device | str) -> "Batch":
        """Move what is computed with. Offsets and grids stay on the host,
        where loops read them."""
        return replace(
            self, tokens=self.tokens.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            patches=self.patches.to(device, non_blocking=True),
            image_index=self.image_index.to(device, non_blocking=True))
