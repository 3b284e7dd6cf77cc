"""From records to packed batches: tokenizer, images, positions.

A record is text with one mark `<|vision_start|><|image_pad|><|vision_end|>` for each
of its images. On its way to the model it is

    encoded   text to token ids, with the pad in a mark repeated once per merged 2x2
              group of the image's patches; and each token's position on three axes
    decoded   its images resized and cut into patches, on the one rank that takes it
    packed    beside others into a `Batch`, all end to end

There is no padding, and no batch dimension.

Everything the model could get wrong silently is refused here: a mark without its
image, an image or video token outside a mark, a mask token, an empty text, an image
that does not open, a tokenizer or an image processor of another model.

An image is what a viewer shows: upright, and what is transparent is white.

Left out: video; chat templates (a text is taken as it is).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from nano_moca.attention import Segments
from nano_moca.batch import (MARK, Batch, EncodedRecord, Grid, ImageLike, Layout, Normalisation,
                             Record)
from nano_moca.config import Config, VisionConfig
from nano_moca.files import MocaError, regular_file, write_json

MASK = "<|mask|>"
RESERVED = ("<|image_pad|>", "<|video_pad|>", MASK)  # refused outside a mark
TOKEN_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
MAX_CHARACTERS = 5_000_000  # of a text: they may cost the tokenizer 4 GB and 10 seconds


def smart_resize(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """The height and width in pixels that Qwen-VL resizes an image to.

    Both become multiples of `factor`, the area stays within [low, high], the aspect
    about the same. ValueError beyond 200 to 1.
    """
    if not 0 < max(height, width) <= 200 * min(height, width):
        raise ValueError(f"its sides {width} x {height} are more than 200 to 1")

    # The nearest multiples, if their area is within the limits.
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor

    # Else scale both sides to the limit, and round so that it holds.
    if new_height * new_width > high:
        shrink = math.sqrt(height * width / high)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < low:
        grow = math.sqrt(low / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@lru_cache(maxsize=4096)
def image_layout(grid: Grid, config: VisionConfig) -> tuple[Tensor, Tensor, list[int]]:
    """Where the patches of one image are, and how its groups are sorted by window.

    grid: frames, rows and columns of patches. Returns

    order      [J], the groups (merged 2x2 patches) in the order of the windows
    positions  [P, 2], row and column of each patch, in that order
    windows    the number of patches in each window
    """
    frames, rows, columns = grid
    m = config.merge

    # Patches come by groups: all four of a 2x2 group, then the next group of its row.
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    cells = cells.view(rows // m, m, columns // m, m, 2).transpose(1, 2)  # groups, then patches
    positions = cells.reshape(-1, m * m, 2).repeat(frames, 1, 1)  # [J, 4, 2]

    # Qwen2-VL has no windows: each frame is one.
    numbers = torch.arange(len(positions)).view(frames, rows // m, columns // m)
    if not config.window:
        return numbers.flatten(), positions.flatten(0, 1), [rows * columns] * frames

    # Cut each frame into windows; those at the right and lower border may be smaller.
    side = config.window // (config.patch * m)  # groups along a window
    window_groups = []
    for frame in numbers:
        for band in frame.split(side):
            window_groups += [window.flatten() for window in band.split(side, dim=1)]
    windows = [len(groups) * m * m for groups in window_groups]
    order = torch.cat(window_groups)
    return order, positions[order].flatten(0, 1), windows


def arrange(grids: Sequence[Grid], config: VisionConfig) -> Layout:
    """Where the patches of all images are, end to end, and which of them attend to each
    other."""
    orders = []
    positions = []
    whole: list[int] = []
    windows: list[int] = []
    for grid in grids:
        image_order, image_positions, image_windows = image_layout(grid, config)
        groups_before = sum(map(len, orders))
        orders.append(image_order + groups_before)
        positions.append(image_positions)
        windows += image_windows
        whole += [grid[1] * grid[2]] * grid[0]  # frames do not see each other

    order = torch.cat(orders)  # [J]
    return Layout(tuple(grids), order, torch.argsort(order), torch.cat(positions),
                  Segments.of(whole), Segments.of(windows))


def check_text(record: Record) -> None:
    """MocaError for an empty or endless text, for more or fewer marks than images, and
    for tokens of images (or the mask token) outside a mark."""
    source = record.source
    if not record.text.strip() or len(record.text) > MAX_CHARACTERS:
        raise MocaError(f"{source}: the text has {len(record.text)} characters: give one that is "
                        f"not empty, of at most {MAX_CHARACTERS}")

    # Marks and images belong together by their order, so none may be missing.
    marks = record.text.count(MARK)
    if marks != len(record.images):
        raise MocaError(f"{source}: {marks} image marks for {len(record.images)} images: "
                        f"write {MARK} once for each image")

    # A stray pad would be taken for an image's, and shift all that follow.
    words = record.text.replace(MARK, "")
    for token in RESERVED:
        if token in words:
            raise MocaError(f"{source}: {token} belongs to no image: remove it")


class Processor:
    """Tokenizer and image processor of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, config: Config, image: dict, source: str = ""
                 ) -> None:
        """image: the image processor's settings, as `read_settings` gives them. source: the
        tokenizer's file. MocaError if it does not belong to the model."""
        self.tokenizer = tokenizer
        self.config = config
        self.source = source
        self.image = image
        self.min_pixels = self.image["min_pixels"]
        self.max_pixels = self.image["max_pixels"]
        frames = config.vision.frames
        self.normalise = Normalisation(image["image_mean"], image["image_std"], frames)

        # Each of its tokens needs an embedding.
        last = max(tokenizer.get_vocab().values(), default=0)
        if last >= config.vocabulary:
            raise MocaError(f"{source}: {tokenizer.id_to_token(last)} is {last}, of "
                            f"{config.vocabulary} in config.json: take both from one checkpoint")

        # A new mask token gets the first id after the last. Qwen's embeddings are
        # padded, so they mostly have a row for it; else they grow
        # (`grow_vocabulary`).
        is_new = tokenizer.token_to_id(MASK) is None
        tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])

        # Ids come from the tokenizer, not from literals: they differ by checkpoint.
        added = tokenizer.get_added_tokens_decoder()
        ids = {token.content: number for number, token in added.items()}
        self.image_token = ids.get("<|image_pad|>")
        self.mask_token = ids[MASK]
        self.new_mask_token = self.mask_token if is_new else None
        self.end_token = ids.get("<|im_end|>", ids.get("<|endoftext|>"))

        # The tokenizer has to be the one that the model was trained with.
        for key, token in TOKEN_IDS.items():
            if token not in ids or config.raw.get(key) not in (None, ids[token]):
                raise MocaError(f"{source}: {token} is {ids.get(token)}, in config.json it is "
                                f"{config.raw.get(key)}: take both from one checkpoint")

        # Stage 1 masks no special token. Any other may stand in a masked word's place.
        special = {number for number, token in added.items() if token.special}
        special |= {self.image_token, self.mask_token}
        self.special_tokens = torch.tensor(sorted(special))  # int64
        ordinary = set(tokenizer.get_vocab().values()) - special
        self.ordinary_tokens = torch.tensor(sorted(ordinary))  # int64

    @classmethod
    def load(cls, folder: Path, config: Config, min_pixels: int | None = None,
             max_pixels: int | None = None) -> "Processor":
        """Read tokenizer.json, and the image processor from processor_config.json or
        preprocessor_config.json. The limits of an image's area are the file's unless given.
        MocaError for files that do not serve."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise MocaError(f"{path} is no file: copy it, or name a --processor that has it")
        try:
            tokenizer = Tokenizer.from_buffer(regular_file(path, 10**9).read_bytes())
            tokenizer.model.dropout = None  # all Qwen's are BPE: no dice, as in its training
        # The library raises plain Exception.
        except Exception as error:
            raise MocaError(f"{path} cannot be read ({error}): copy it again") from None

        # Texts are shortened by `encode`, which knows where the images end.
        tokenizer.no_truncation()
        tokenizer.no_padding()

        # What others write is read in convert/.
        from nano_moca.convert.settings import read_settings

        image = read_settings(path.parent, config, min_pixels, max_pixels)
        return cls(tokenizer, config, image, str(path))

    # --- images: from pixels to patches, and back ---------------------------------

    def grid(self, image: Image.Image, source: str) -> Grid:
        """The patches that an image is resized to: frames (1), height and width."""
        width, height = image.size
        patch = self.config.vision.patch
        factor = patch * self.config.vision.merge  # pixels along a merged group
        try:
            height, width = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise MocaError(f"{source}: an image cannot be used, {error}: crop it") from None
        return 1, height // patch, width // patch

    def patchify(self, image: ImageLike, source: str) -> Tensor:
        """An image's pixels as patches by 2x2 groups, [J, 4, 588] uint8.

        Groups and the patches of one are in reading order, a patch's bytes by channel, y,
        x. What the model reads of them is `normalise` of this.
        """
        p, m = self.config.vision.patch, self.config.vision.merge

        # Opened as a viewer would show it, resize to full groups in both directions.
        from nano_moca.convert.images import open_image

        image = open_image(image, source, decode=True)
        _, high, wide = self.grid(image, source)
        image = image.resize((wide * p, high * p), Image.Resampling.BICUBIC)

        # Cut both axes into groups, patches of a group, pixels of a patch; then
        # order by groups, so that the four patches of one follow each other.
        pixels = torch.from_numpy(np.array(image))  # [height, width, 3] uint8
        cut = pixels.view(high // m, m, p, wide // m, m, p, 3)
        cut = cut.permute(0, 3, 1, 4, 6, 2, 5)  # [high/2, wide/2, 2, 2, 3, p, p]
        return cut.reshape(-1, m * m, 3 * p * p)

    def unpatchify(self, patches: np.ndarray, grid: Grid) -> np.ndarray:
        """The way back: patches [P, 1176] as an image [height, width, 3] in 0..1.

        grid: the image's, as in its record. Of the two frames, the first is taken.
        """
        p, m = self.config.vision.patch, self.config.vision.merge
        _, high, wide = grid

        # The same cuts, put back into their order in the image.
        cut = patches.reshape(high // m, wide // m, m, m, 3, -1, p, p)
        cut = cut[:, :, :, :, :, 0]  # [high/2, wide/2, 2, 2, 3, p, p]
        cut = cut.transpose(0, 2, 5, 1, 3, 6, 4)  # [high/2, 2, p, wide/2, 2, p, 3]
        pixels = cut.reshape(high * p, wide * p, 3)

        # What a model predicts may lie beyond black and white.
        return np.clip(pixels * self.normalise.std + self.normalise.mean, 0, 1)

    # --- records: from text to tokens and positions -------------------------------

    def encode(self, record: Record, max_tokens: int | None = None) -> EncodedRecord:
        """A record as tokens and positions.

        max_tokens: the text after the last image is shortened to it; images are never
        cut, and if all up to the last one is longer, that is an error. A record that
        cannot be used is a MocaError that names it; of an image only the size is read.
        """
        source = record.source
        check_text(record)

        # One image after the other: none is kept, decoded or open. (What can be wrong with
        # an image is a subject of its own.)
        from nano_moca.convert.images import open_image

        grids = [self.grid(open_image(image, source), source) for image in record.images]

        # Token ids, at first with one pad for each image.
        try:
            encoding = self.tokenizer.encode(record.text, add_special_tokens=False)
        # Half of a surrogate pair, which JSON can say, or a token for which it has no id.
        except Exception as error:
            raise MocaError(f"{source}: the tokenizer does not take the text ({error}): correct "
                            "it") from None
        ids = np.array(encoding.ids, np.int64)

        # A pad is repeated once per merged group of its image, all else stands once.
        if not ids.size or np.sum(ids == self.image_token) != len(grids):
            raise MocaError(f"{source}: the text becomes no token, or not one for each image: "
                            "use the checkpoint's own tokenizer.json")
        per_group = self.config.vision.merge**2
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self.image_token] = [math.prod(grid) // per_group for grid in grids]
        tokens = np.repeat(ids, repeats)  # [L]

        # Shorten the text. To be kept are all tokens up to the end of the last
        # image's mark (images_end; -2 + 2 = 0 if there is none) and the `closing`
        # last ones: an end token such as <|im_end|>, and a line end after it.
        # Slices, since there may be none.
        if max_tokens and len(tokens) > max_tokens:
            images_end = np.flatnonzero(tokens == self.image_token).max(initial=-2) + 2
            is_special = np.isin(tokens[images_end:], self.special_tokens)
            closing = int(is_special[-1:].any())
            if is_special[-2:-1].any() and record.text.endswith("\n"):
                closing = 2
            needed = images_end + closing
            if needed > max_tokens:
                raise MocaError(f"{source}: all up to its last image, and its end, need {needed} "
                                f"tokens of {max_tokens}: raise --max-tokens or lower --max-pixels")
            tokens = np.append(tokens[: max_tokens - closing], tokens[len(tokens) - closing :])
        positions = self._positions(tokens, grids)

        # Work is divided among ranks by it.
        image_tokens = np.sum(tokens == self.image_token)
        cost = len(tokens) + int(image_tokens * (self.config.image_token_cost - 1))
        return EncodedRecord(tokens, positions, record.images, grids, source, cost)

    def _positions(self, tokens: np.ndarray, grids: list[Grid]) -> np.ndarray:
        """M-RoPE: each token's position on three axes (frame, row, column), [3, L].

        Text advances all three together; an image spans its grid of merged groups;
        what follows an image starts at the largest position used plus one.
        """
        merge = self.config.vision.merge
        image_index = np.flatnonzero(tokens == self.image_token)
        spans: list[np.ndarray] = []
        done = 0  # so many tokens have their positions
        position = 0  # the first free one

        for frames, high, wide in grids:
            # The text before this image.
            first = image_index[image_index >= done][0]
            text = np.arange(position, position + first - done)
            spans.append(np.tile(text, (3, 1)))
            position += len(text)

            # The image: each group's place in the grid, counted from there.
            shape = (frames, high // merge, wide // merge)
            image = np.indices(shape).reshape(3, -1)  # [3, groups]
            spans.append(position + image)
            position += max(shape)
            done = first + image.shape[1]

        # The text after the last image; all of it if there is none.
        text = np.arange(position, position + len(tokens) - done)
        spans.append(np.tile(text, (3, 1)))
        return np.concatenate(spans, axis=1)

    def decode(self, encoded: Sequence[EncodedRecord]) -> None:
        """Decode the images of encoded records. Their patches stay with them until they
        are packed. MocaError for an image that cannot be decoded."""
        for item in encoded:
            if item.patches is None:
                item.patches = [self.patchify(image, item.source) for image in item.images]

    def pack(self, encoded: Sequence[EncodedRecord]) -> Batch:
        """Lay encoded records end to end, and decode those that are not decoded yet."""
        self.decode(encoded)

        # Begin with no pixels, but of the right shape: a batch may have no image.
        vision = self.config.vision
        one_frame = vision.patch_values // vision.frames  # 588
        pixels = [torch.empty(0, vision.merge**2, one_frame, dtype=torch.uint8)]
        grids: list[Grid] = []
        for item in encoded:
            grids += item.grids
            pixels += item.patches
        for item in encoded:
            item.patches = None  # they are in the batch now

        # All else is known already.
        blank = (1, vision.merge, vision.merge)
        tokens = np.concatenate([item.tokens for item in encoded])
        positions = np.concatenate([item.positions for item in encoded], axis=1)
        image_index = np.flatnonzero(tokens == self.image_token)
        return Batch(
            tokens=torch.from_numpy(tokens), positions=torch.from_numpy(positions),
            segments=Segments.of([len(item.tokens) for item in encoded]),
            image_index=torch.from_numpy(image_index), pixels=torch.cat(pixels),
            layout=arrange(grids or [blank], vision), normalise=self.normalise,
            sources=[item.source for item in encoded])

    def batch(self, records: Sequence[Record], max_tokens: int | None = None) -> Batch:
        """Encode and pack."""
        return self.pack([self.encode(record, max_tokens) for record in records])

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, with the mask token, and preprocessor_config.json."""
        content = self.tokenizer.to_str(pretty=True)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")

        # The limits in use, and the name by which transformers knows the processor.
        content = self.image | {"image_processor_type": "Qwen2VLImageProcessor"}
        write_json(folder / "preprocessor_config.json", content)
