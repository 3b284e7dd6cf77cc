"""What data looks like on its way to the model: record, encoded record, batch.

    Record         text with a mark for each image, and the images
    EncodedRecord  token ids and positions; images still as they were given
    Batch          all that one forward pass computes with, packed end to end
    Layout         its part about images: where their patches are

Packed means: the tokens of all N records stand one after the other along one axis of
T tokens, and so do the patches of all images. There is no padding and no batch
dimension; `segments` says where each record begins. A record's result is the same
whatever it is packed with. The letters of all shapes are explained in `__init__.py`.

A GPU computes while the host goes on and queues what comes next, until the host has
to wait for it. So all that a forward pass needs is made here, on the host, before;
pixels travel as the bytes that they are, an eighth of what the numbers take that
the model reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nano_moca.attention import Segments

MARK = "<|vision_start|><|image_pad|><|vision_end|>"  # stands in a text for one image
KINDS = ("long-document", "image-text", "text-only")  # of stage 2's pairs
ImageLike = str | Path | bytes | Image.Image | np.ndarray | Tensor  # arrays: uint8 [h, w, 3]
Grid = tuple[int, int, int]  # frames, rows and columns of an image in patches


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
    grids: list[Grid]  # of each image
    source: str
    cost: int  # of computing with it, in text tokens
    patches: list[Tensor] | None = field(default=None, init=False)  # from decoded to packed


def send(item: Any, device: torch.device | str) -> Any:
    """A tensor on another device; or a copy of a dataclass, with all tensors in it and in the
    dataclasses inside it there. A GPU fetches them by itself from page-locked memory: the
    host goes on meanwhile."""
    if isinstance(item, Tensor):
        if torch.device(device).type == "cuda" and not item.is_cuda:
            item = item.pin_memory()
        return item.to(device, non_blocking=True)

    sent = {}
    for entry in fields(item):
        value = getattr(item, entry.name)
        if isinstance(value, Tensor) or is_dataclass(value):
            sent[entry.name] = send(value, device)
    return replace(item, **sent)


class Sendable:
    """A dataclass of tensors that is made on the host and sent to a device."""

    def to(self, device: torch.device | str) -> Any:  # of its own class
        """The same on another device."""
        return send(self, device)


@dataclass(frozen=True)
class Normalisation:
    """From the bytes of an image to the numbers that the vision tower reads."""

    mean: Sequence[float]  # CLIP's, of red, green and blue in 0..1
    std: Sequence[float]
    frames: int  # a patch is two frames of a video; a still image is the same in both

    def __call__(self, pixels: Tensor) -> Tensor:
        """Patches of one frame, uint8 [..., 588], by channel, y, x -> float32 [..., 1176], by
        channel, frame, y, x: each is (pixel / 255 - mean) / std."""
        # Mean and std are numbers, which a GPU gets with the call; tensors would be sent.
        parts = []
        for channel, mean, std in zip(pixels.chunk(3, dim=-1), self.mean, self.std, strict=True):
            scaled = (channel.float() / 255 - mean) / std  # [..., p * p]
            parts += [scaled] * self.frames
        return torch.cat(parts, dim=-1)


@dataclass
class Layout:
    """Where the patches of all images are, and which attend to each other: see `arrange`."""

    grids: tuple[Grid, ...]  # on the host
    order: Tensor  # [J] int64: the groups in the order of the windows
    inverse: Tensor  # [J] int64: from there back to the order of the images
    positions: Tensor  # [P, 2] int64: row and column, in the order of the windows
    whole: Segments  # the patches of each frame of an image
    windows: Segments  # those of each window; without windows, of each frame


@dataclass
class Batch(Sendable):
    """N records packed end to end: T tokens, and P patches of I images."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [3, T] int64: frame, row, column
    segments: Segments  # where each record begins
    image_index: Tensor  # [J] int64: which of the T tokens are image tokens
    pixels: Tensor  # [J, 4, 588] uint8: the patches by 2x2 groups, in one frame
    layout: Layout  # of the images; if there are none, of one blank group: see `embed_inputs`
    normalise: Normalisation
    sources: list[str]  # N names for error messages
    noised: Tensor | None = None  # [G] int64: which of the J groups are masked (stage 1)
    noise: Tensor | None = None  # [G, 4, 1176] float32: what the model sees in their place

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each record."""
        return self.segments.lengths

    @property
    def grids(self) -> Tensor:
        """[I, 3] int64 on the host: frames, rows, columns of patches."""
        grids = self.layout.grids if len(self.pixels) else ()
        return torch.tensor(grids, dtype=torch.int64).view(-1, 3)

    @property
    def patches(self) -> Tensor:
        """[P, 1176] float32, by 2x2 groups: what the vision tower reads, made anew each time."""
        patches = self.normalise(self.pixels)  # [J, 4, 1176]
        if self.noise is not None:
            patches.index_copy_(0, self.noised, self.noise)
        return patches.flatten(0, 1)
