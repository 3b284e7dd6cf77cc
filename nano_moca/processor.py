"""From records to packed batches: tokenizer, images, positions.

A record is text with one mark `<|vision_start|><|image_pad|><|vision_end|>` for each of its images.
`encode` turns it into token ids (the pad repeated once per merged 2x2 group of patches) and
positions; `pack` lays encoded records end to end into a `Batch` and cuts their images into patches.
There is no padding, and no batch dimension.

Everything the model could get wrong silently is refused here: a mark without its image, an image,
video or mask token that belongs to no image, an empty text, an image that does not open.
"""

import io
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

from nano_moca.config import Config, MocaError, read_json, write_json

MARK = "<|vision_start|><|image_pad|><|vision_end|>"
MASK = "<|mask|>"
HOMELESS = ("<|image_pad|>", "<|video_pad|>", MASK)  # mean nothing in a text outside a mark
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ImageLike = str | Path | bytes | Image.Image


@dataclass
class Record:
    """One item: text with a mark for each image, the images, and where it came from."""

    text: str
    images: list[ImageLike] = field(default_factory=list)
    source: str = "the record"  # named in errors


@dataclass
class Encoded:
    """One record as tokens; its images were looked at, but are decoded only when it is packed."""

    tokens: np.ndarray  # [L] int64
    positions: np.ndarray  # [3, L] int64: frame, row, column
    images: list[ImageLike]  # as given: a process may hold only so many open files
    grids: list[tuple[int, int, int]]  # (frames, rows, columns) of patches of each image
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

    def to(self, device: torch.device | str) -> "Batch":
        """What is computed with moves; offsets and grids stay on the host, where loops read
        them."""
        names = ("tokens", "positions", "patches", "image_rows")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})


def smart_resize(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """The size that Qwen-VL resizes an image to, in pixels.

    Both sides become multiples of `factor`, the area stays within [low, high], the aspect about the
    same. ValueError beyond 200 to 1.
    """
    if not 0 < max(height, width) <= 200 * min(height, width):
        raise ValueError(f"its sides {width} x {height} are more than 200 to 1")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > high:
        shrink = math.sqrt(height * width / high)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < low:
        grow = math.sqrt(low / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def open_image(image: ImageLike, source: str, decode: bool = False) -> Image.Image:
    """A PIL image with its header read, or decoded to RGB; MocaError names record and file."""
    name = getattr(image, "filename", image)
    name = "an image given as bytes" if isinstance(name, bytes) or not name else f"the image {name}"
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        if image.mode.startswith(("I", "F")):  # converting would clip: all white, or all black
            raise ValueError(f"its mode is {image.mode}, not 8 bits a channel")
        return image.convert("RGB") if decode else image
    except FileNotFoundError:
        raise MocaError(f"{source}: {name} does not exist: correct the path") from None
    except Exception as error:  # Pillow raises a dozen kinds for files that are no good images
        raise MocaError(f"{source}: {name} is broken ({error}): replace the file") from None


class Processor:
    """Tokenizer and image processor of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, config: Config, image: dict, where: str = "") -> None:
        """image: the content of preprocessor_config.json. where: named in errors."""
        self.tokenizer, self.config, self.image = tokenizer, config, dict(image)
        size = self.image.pop("size", None)  # the limits of the area, in pixels
        size = size if isinstance(size, dict) else {}
        self.min_pixels = image.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        self.max_pixels = image.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        if not 0 < self.min_pixels <= self.max_pixels:
            raise MocaError(f"min_pixels {self.min_pixels} must be above 0 and at most max_pixels, "
                            f"{self.max_pixels}: correct preprocessor_config.json or the flags")
        self.mean, self.std = (np.array(image.get(f"image_{name}", default), np.float32)
                               for name, default in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
        # Ids come from the tokenizer, never from literals: they differ between checkpoints.
        self.mask_is_new = tokenizer.token_to_id(MASK) is None
        if self.mask_is_new:  # the first id after the last, where Qwen's embeddings have spare rows
            tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
        added = tokenizer.get_added_tokens_decoder()
        ids = {token.content: number for number, token in added.items()}
        self.image_token, self.mask_token = ids.get("<|image_pad|>"), ids[MASK]
        if self.image_token is None or not {"<|vision_start|>", "<|vision_end|>"} <= ids.keys():
            raise MocaError(f"{where} lacks the tokens of {MARK}: take the checkpoint's own file")
        if config.raw.get("image_token_id", self.image_token) != self.image_token:
            raise MocaError(f"{where}: <|image_pad|> is {self.image_token} and config.json says "
                            f"{config.raw['image_token_id']}: take both from one checkpoint")
        self.end_token = ids.get("<|im_end|>", ids.get("<|endoftext|>"))
        special = [number for number, token in added.items() if token.special]
        self.special_tokens = torch.tensor(sorted({*special, self.image_token, self.mask_token}))

    @classmethod
    def load(cls, folder: Path, config: Config, min_pixels: int | None = None,
             max_pixels: int | None = None) -> "Processor":
        """Read tokenizer.json and preprocessor_config.json; the limits override the file's."""
        path = Path(folder) / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception, for an absent file too
            raise MocaError(f"{path} cannot be read ({error}): copy it again") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        image = read_json(path.with_name("preprocessor_config.json"))
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if min(limits.values(), default=1) < 1:
            raise MocaError(f"pixel limits must be at least 1: {limits}")
        return cls(tokenizer, config, image | limits, str(path))

    def grid(self, image: Image.Image, source: str) -> tuple[int, int, int]:
        """Frames, rows and columns of patches that an image is resized to."""
        p, limits = self.config.vision.patch, (self.min_pixels, self.max_pixels)
        try:
            height, width = smart_resize(*image.size[::-1], p * self.config.vision.merge, *limits)
        except ValueError as error:
            raise MocaError(f"{source}: an image cannot be used, {error}: crop it") from None
        return 1, height // p, width // p

    def patchify(self, image: ImageLike, source: str) -> np.ndarray:
        """An image as rows of normalised pixels, [P, 1176] float32.

        Rows go by 2x2 groups; a row is channel, frame, y, x. Pixels: (value / 255 - mean) / std.
        """
        p, m, frames = self.config.vision.patch, self.config.vision.merge, self.config.vision.frames
        image = open_image(image, source, decode=True)
        _, rows, columns = self.grid(image, source)
        image = image.resize((columns * p, rows * p), Image.Resampling.BICUBIC)
        values = np.asarray(image, np.float32) / np.float32(255)  # [height, width, 3]
        cut = ((values - self.mean) / self.std).reshape(rows // m, m, p, columns // m, m, p, 3)
        cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows/2, columns/2, 2, 2, channel, y, x]
        one_frame = cut.reshape(rows * columns, 3, 1, p, p)
        # a still image is the same in both frames
        return np.repeat(one_frame, frames, axis=2).reshape(rows * columns, -1)

    def encode(self, record: Record, max_tokens: int | None = None, decode: bool = False
               ) -> Encoded:
        """Token ids, each image mark's pad repeated once per merged group, and positions.

        max_tokens: the text after the last image is shortened to it; images are never cut: a record
        whose images do not fit is an error. decode: look now whether the images can be read. A
        record that cannot be used is a MocaError that names it.
        """
        source, per_group = record.source, self.config.vision.merge**2
        images = [open_image(image, source, decode) for image in record.images]
        if not record.text.strip():
            raise MocaError(f"{source}: the text is empty: give it words or an image mark")
        marks = record.text.count(MARK)
        if marks != len(images):
            raise MocaError(f"{source}: {marks} image marks for {len(images)} images: write {MARK} "
                            "once for each image")
        for token in (token for token in HOMELESS if token in record.text.replace(MARK, "")):
            raise MocaError(f"{source}: {token} belongs to no image: remove it")
        try:
            ids = np.array(self.tokenizer.encode(record.text, add_special_tokens=False).ids)
        except TypeError:  # half of a surrogate pair, which JSON can say
            raise MocaError(f"{source}: the text is not valid Unicode: correct it") from None
        pads = ids == self.image_token
        grids = [self.grid(image, source) for image in images]
        repeats = np.ones(len(ids), np.int64)
        repeats[pads] = [math.prod(grid) // per_group for grid in grids]
        tokens = np.repeat(ids, repeats)
        if max_tokens and len(tokens) > max_tokens:
            needed = np.flatnonzero(tokens == self.image_token).max(initial=-1) + 2  # and end mark
            if needed > max_tokens:
                raise MocaError(f"{source}: its images need {needed} tokens of {max_tokens}: raise "
                                "--max-tokens or lower the checkpoint's max_pixels")
            tokens = tokens[:max_tokens]
        return Encoded(tokens, self._positions(tokens, grids), record.images, grids, source)

    def _positions(self, tokens: np.ndarray, grids: list[tuple[int, int, int]]) -> np.ndarray:
        """M-RoPE: text advances all three axes together; an image spans its grid of merged groups.

        What follows an image starts at the largest position used plus one. Returns [3, L].
        """
        m, spans, begin, at = self.config.vision.merge, [], 0, 0
        pads = np.flatnonzero(tokens == self.image_token)
        for frames, rows, columns in grids:
            text = pads[pads >= at][0] - at  # tokens before this image
            image = np.indices((frames, rows // m, columns // m)).reshape(3, -1)  # [3, groups]
            spans += [np.tile(np.arange(begin, begin + text), (3, 1)), begin + text + image]
            begin += text + max(frames, rows // m, columns // m)
            at += text + image.shape[1]
        spans.append(np.tile(np.arange(begin, begin + len(tokens) - at), (3, 1)))
        return np.concatenate(spans, axis=1)

    def pack(self, encoded: Sequence[Encoded]) -> Batch:
        """Lay encoded records end to end, and decode their images."""
        tokens = torch.from_numpy(np.concatenate([item.tokens for item in encoded]))
        positions = np.concatenate([item.positions for item in encoded], axis=1)
        patches = [np.zeros((0, self.config.vision.patch_values), np.float32)]
        patches += [self.patchify(image, item.source) for item in encoded for image in item.images]
        grids = [grid for item in encoded for grid in item.grids]
        return Batch(
            tokens=tokens,
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.tensor([0, *accumulate(len(item.tokens) for item in encoded)]),
            patches=torch.from_numpy(np.concatenate(patches)),
            grids=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
            image_rows=torch.nonzero(tokens == self.image_token).flatten(),
            sources=[item.source for item in encoded],
        )

    def batch(self, records: Sequence[Record], max_tokens: int | None = None) -> Batch:
        """Encode and pack."""
        return self.pack([self.encode(record, max_tokens) for record in records])

    def save(self, folder: Path) -> None:
        """tokenizer.json (with the mask token) and preprocessor_config.json."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "preprocessor_config.json", self.image | dict(
            min_pixels=self.min_pixels, max_pixels=self.max_pixels,
            image_processor_type="Qwen2VLImageProcessor"))
