"""From records to packed batches: tokenizer, images, positions.

A record is text with one mark `<|vision_start|><|image_pad|><|vision_end|>` for each of its images. `encode` turns it
into tokens (the pad repeated once a merged group of patches), positions and patches; `pack` lays encoded records end
to end into a `Batch`. There is no padding anywhere, and no batch dimension.

Everything the model could get wrong silently is refused here: a mark without its image, a vision token that belongs
to no image, an empty text, an image that does not open.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from nano_moca.config import Config, MocaError, read_json

MARK = "<|vision_start|><|image_pad|><|vision_end|>"
MASK = "<|mask|>"
ImageLike = str | Path | bytes | Image.Image


@dataclass
class Record:
    """One item: text with a mark for each image, the images, and where it came from (for error messages)."""

    text: str
    images: list[ImageLike] = field(default_factory=list)
    source: str = "the record"


@dataclass
class Encoded:
    """One record as the model takes it; L tokens, P patches, I images."""

    tokens: np.ndarray  # [L] int64
    positions: np.ndarray  # [3, L] int64: frame, row, column
    patches: np.ndarray  # [P, 1176] float32
    grids: list[tuple[int, int, int]]  # I times (frames, rows, columns) of patches
    source: str


@dataclass
class Batch:
    """N records packed end to end: T tokens, P patches, I images, G = P / 4 image tokens."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [3, T] int64
    cu_seqlens: Tensor  # [N+1] int64 on the host: where each record begins, and the end
    patches: Tensor  # [P, 1176] float32
    grids: Tensor  # [I, 3] int64 on the host
    image_rows: Tensor  # [G] int64: which of the T tokens are image tokens
    sources: list[str]  # N names for error messages

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each record."""
        return tuple(self.cu_seqlens.diff().tolist())

    def to(self, device: torch.device | str) -> Batch:
        """What is computed with moves to the device; offsets and grids stay on the host, where loops read them."""
        names = ("tokens", "positions", "patches", "image_rows")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that Qwen-VL resizes an image to: multiples of `factor`, area within the limits, aspect kept."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"its sides {width} x {height} are more than 200 to 1")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def open_image(image: ImageLike, source: str) -> Image.Image:
    """A PIL image, its header read and its pixels not yet; MocaError names the record and the file."""
    if isinstance(image, Image.Image):
        return image
    name = "an image given as bytes" if isinstance(image, bytes) else f"the image {image}"
    try:
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    except FileNotFoundError:
        raise MocaError(f"{source}: {name} does not exist: correct the path or restore the file") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise MocaError(f"{source}: {name} cannot be opened ({error}): replace the file") from None


class Processor:
    """Tokenizer and image processor of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, config: Config, image: dict, where: str = "tokenizer.json") -> None:
        """image: the content of preprocessor_config.json. where: named in errors."""
        self.tokenizer, self.config, self.image = tokenizer, config, image
        size = image.get("size") or {}
        self.min_pixels = image.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        self.max_pixels = image.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        self.mean = np.array(image.get("image_mean", (0.48145466, 0.4578275, 0.40821073)), np.float32)
        self.std = np.array(image.get("image_std", (0.26862954, 0.26130258, 0.27577711)), np.float32)
        added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        needed = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
        missing = [name for name in needed if name not in added]
        if missing:
            raise MocaError(f"{where}: the token {missing[0]} is missing: take the checkpoint's own tokenizer.json")
        self.image_token = added["<|image_pad|>"]
        if config.raw.get("image_token_id", self.image_token) != self.image_token:
            raise MocaError(f"{where}: <|image_pad|> is {self.image_token}, config.json says "
                            f"{config.raw['image_token_id']}: take both files from one checkpoint")
        self.mask_is_new = MASK not in added
        if self.mask_is_new:  # the first id after the tokenizer's last; Qwen's embeddings have padded rows there
            tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
        self.mask_token = tokenizer.token_to_id(MASK)
        self.end_token = tokenizer.token_to_id("<|im_end|>")
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_tokens = torch.tensor(sorted(special | {self.image_token, self.mask_token}))
        homeless = (self.mask_token, added.get("<|video_pad|>"))  # stand for nothing in a text from data
        self.homeless = {number: tokenizer.id_to_token(number) for number in homeless if number is not None}

    @classmethod
    def load(cls, folder: Path, config: Config, min_pixels: int | None = None, max_pixels: int | None = None
             ) -> Processor:
        """Read tokenizer.json and preprocessor_config.json; the limits override the file's."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise MocaError(f"{path} does not exist: copy it from the checkpoint")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise MocaError(f"{path} cannot be read ({error}): copy the file again") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        image = read_json(Path(folder) / "preprocessor_config.json")
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        image |= {name: limit for name, limit in limits.items() if limit}
        return cls(tokenizer, config, image, str(path))

    def resized(self, image: Image.Image, source: str) -> tuple[int, int]:
        """Height and width in pixels after resizing; multiples of 28."""
        factor = self.config.vision.patch * self.config.vision.merge
        try:
            return smart_resize(image.height, image.width, factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise MocaError(f"{source}: an image cannot be used, {error}: crop it or leave it out") from None

    def patchify(self, image: Image.Image, source: str) -> tuple[np.ndarray, tuple[int, int, int]]:
        """An image becomes rows of normalised pixels, [P, 1176] float32, and its grid (frames, rows, columns).

        Rows go by 2x2 groups; a row is channel, frame, y, x. Pixels are (value / 255 - mean) / std of CLIP.
        """
        vision = self.config.vision
        height, width = self.resized(image, source)
        try:
            small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError) as error:  # decoding happens only here
            name = getattr(image, "filename", "") or "an image"
            raise MocaError(f"{source}: {name} is broken ({error}): replace the file") from None
        pixels = (np.asarray(small, np.float32) / np.float32(255) - self.mean) / self.std  # [height, width, 3]
        rows, columns, p, m = height // vision.patch, width // vision.patch, vision.patch, vision.merge
        cut = pixels.reshape(rows // m, m, p, columns // m, m, p, 3)
        cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows/2, columns/2, 2, 2, channel, y, x]
        one_frame = cut.reshape(rows * columns, 3, 1, p, p)
        patches = np.repeat(one_frame, vision.frames, axis=2)  # a still image is the same in both frames
        return patches.reshape(rows * columns, vision.patch_values), (1, rows, columns)

    def encode(self, record: Record, max_tokens: int | None = None) -> Encoded:
        """Tokens, positions and patches of one record.

        max_tokens: the text after the last image is shortened to it; images are never cut: a record whose
        images do not fit is an error. MocaError names the record.
        """
        images = [open_image(image, record.source) for image in record.images]
        tokens, grids = self._tokens(record, images, max_tokens)
        patches = [self.patchify(image, record.source)[0] for image in images]
        empty = np.zeros((0, self.config.vision.patch_values), np.float32)
        return Encoded(tokens, self._positions(tokens, grids), np.concatenate(patches or [empty]), grids,
                       record.source)

    def measure(self, record: Record, max_tokens: int | None = None) -> int:
        """The number of tokens `encode` will give, from the text and the images' headers alone."""
        return len(self._tokens(record, [open_image(i, record.source) for i in record.images], max_tokens)[0])

    def _tokens(self, record: Record, images: list[Image.Image], max_tokens: int | None
                ) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Token ids with each image mark expanded to one id a merged group, checked and shortened."""
        if not record.text.strip():
            raise MocaError(f"{record.source}: the text is empty: give it words or an image mark")
        ids = np.array(self.tokenizer.encode(record.text, add_special_tokens=False).ids, np.int64)
        for number, name in self.homeless.items():
            if (ids == number).any():
                raise MocaError(f"{record.source}: the text holds {name}, which belongs to no image: remove it")
        at = np.flatnonzero(ids == self.image_token)
        if len(at) != len(images):
            raise MocaError(f"{record.source}: {len(at)} image marks and {len(images)} images: "
                            f"put {MARK} once for each image")
        vision, grids = self.config.vision, []
        repeats = np.ones(len(ids), np.int64)
        for index, image in zip(at, images, strict=True):
            height, width = self.resized(image, record.source)
            grids.append((1, height // vision.patch, width // vision.patch))
            repeats[index] = math.prod(grids[-1]) // vision.merge**2
        tokens = np.repeat(ids, repeats)
        if max_tokens and len(tokens) > max_tokens:
            images_end = np.flatnonzero(tokens == self.image_token)[-1] + 2 if images else 0
            if images_end > max_tokens:
                raise MocaError(f"{record.source}: its images need {images_end} tokens and the limit is "
                                f"{max_tokens}: raise --max-tokens or lower the checkpoint's max_pixels")
            tokens = tokens[:max_tokens]
        return tokens, grids

    def _positions(self, tokens: np.ndarray, grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """M-RoPE: text advances frame, row and column together; an image spans its grid of merged groups.

        What comes after an image starts at the largest position used plus one. Returns [3, L].
        """
        m, spans, begin, at = self.config.vision.merge, [], 0, 0
        starts = np.flatnonzero(tokens == self.image_token)
        for frames, rows, columns in grids:
            first = starts[starts >= at][0]
            spans.append(np.broadcast_to(np.arange(begin, begin + first - at), (3, first - at)))
            begin += first - at
            grid = np.indices((frames, rows // m, columns // m)).reshape(3, -1)  # [3, groups]
            spans.append(begin + grid)
            begin += max(frames, rows // m, columns // m)
            at = first + grid.shape[1]
        rest = len(tokens) - at
        spans.append(np.broadcast_to(np.arange(begin, begin + rest), (3, rest)))
        return np.concatenate(spans, axis=1)

    def pack(self, encoded: Sequence[Encoded]) -> Batch:
        """Lay encoded records end to end."""
        tokens = torch.from_numpy(np.concatenate([item.tokens for item in encoded]))
        grids = [grid for item in encoded for grid in item.grids]
        return Batch(
            tokens=tokens,
            positions=torch.from_numpy(np.concatenate([item.positions for item in encoded], axis=1)),
            cu_seqlens=torch.tensor([0, *accumulate(len(item.tokens) for item in encoded)]),
            patches=torch.from_numpy(np.concatenate([item.patches for item in encoded])),
            grids=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
            image_rows=torch.nonzero(tokens == self.image_token).flatten(),
            sources=[item.source for item in encoded],
        )

    def batch(self, records: Sequence[Record], max_tokens: int | None = None) -> Batch:
        """Encode and pack."""
        return self.pack([self.encode(record, max_tokens) for record in records])

    def save(self, folder: Path) -> None:
        """tokenizer.json (with the mask token) and preprocessor_config.json."""
        self.tokenizer.save(str(Path(folder) / "tokenizer.json"))
        vision = self.config.vision
        image = {**self.image, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels,
                 "image_mean": self.mean.tolist(), "image_std": self.std.tolist(), "patch_size": vision.patch,
                 "temporal_patch_size": vision.frames, "merge_size": vision.merge,
                 "image_processor_type": "Qwen2VLImageProcessor"}
        image.pop("size", None)  # one statement of the limits, not two
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
