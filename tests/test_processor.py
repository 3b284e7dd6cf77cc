"""From records to batches: what is computed, and what is refused instead of guessed."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nano_moca import MARK, Moca, MocaError, Record
from nano_moca.families import load_config
from nano_moca.processor import Processor, smart_resize


@pytest.fixture(scope="module")
def processor(moca: Moca) -> Processor:
    return moca.processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def patches_of(processor: Processor, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches [P, 1176] and grid of one image."""
    batch = processor.batch([Record(MARK, [image])])
    return batch.patches.numpy(), tuple(batch.grids[0].tolist())


def as_bytes(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def refusal(processor: Processor, record: Record, max_tokens: int | None = None) -> str:
    """The one-line error that a record gets; it names the record."""
    with pytest.raises(MocaError) as caught:
        processor.batch([record], max_tokens)
    message = str(caught.value)
    assert "\n" not in message and record.source in message
    return message


# ---- images


def test_smart_resize_properties() -> None:
    """Multiples of 28, area within the limits, and the aspect ratio kept to the rounding."""
    dice = random.Random(0)
    for _ in range(2000):
        height, width = dice.randint(20, 3000), dice.randint(20, 3000)
        low = 28 * 28 * dice.randint(1, 60)
        high = low * dice.randint(4, 30)
        rows, columns = smart_resize(height, width, 28, low, high)
        assert rows % 28 == columns % 28 == 0 and rows > 0 and columns > 0
        if rows > 28 and columns > 28:  # a side of one patch group cannot shrink further
            assert low <= rows * columns <= high
            # each side is off by less than one group from one common scale
            assert (rows - 28) / (columns + 28) < height / width < (rows + 28) / (columns - 28)
        assert smart_resize(rows, columns, 28, low, max(high, rows * columns)) == (rows, columns)


@pytest.mark.parametrize("size, expected", [
    ((28, 28), (56, 56)),  # grown to 56 * 56
    ((56, 84), (56, 84)),  # fits already
    ((70, 98), (56, 112)),  # 2.5 and 3.5 groups: halves round to even
    ((1000, 1000), (168, 168)),  # shrunk below 40 groups
])
def test_smart_resize_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """A few sizes worked out by hand, for 56 * 56 to 40 * 28 * 28 pixels."""
    assert smart_resize(*size, 28, 56 * 56, 40 * 28 * 28) == expected


def test_odd_image_modes(processor: Processor, golden: Path, records: list[Record]) -> None:
    """RGB, RGBA, L, LA, P and CMYK files give the reference's pixels to 1e-6."""
    expected, modes = load_file(golden / "inputs.golden.safetensors"), set()
    for number, record in enumerate(records):
        modes |= {Image.open(image).mode for image in record.images}
        if record.images:
            batch = processor.batch([record])
            theirs = expected[f"{number}.pixel_values"]
            torch.testing.assert_close(batch.patches, theirs, rtol=0, atol=1e-6)
            assert torch.equal(batch.grids, expected[f"{number}.grid"])
    assert modes == {"RGB", "RGBA", "L", "LA", "P", "CMYK"}


def test_paths_bytes_and_pictures_are_alike(processor: Processor, golden: Path) -> None:
    """An image as path, text path, bytes or PIL image is encoded the same."""
    path = golden / "images" / "1-rgba-200x61.png"
    forms = [path, str(path), path.read_bytes(), Image.open(path)]
    batches = [processor.batch([Record(MARK, [form])]) for form in forms]
    for other in batches[1:]:
        assert torch.equal(other.patches, batches[0].patches)
        assert torch.equal(other.tokens, batches[0].tokens)


def test_patchify_by_hand(processor: Processor) -> None:
    """Row 4g + 2y + x is a patch of 2x2 group g; its values go channel, frame, y, x."""
    image = picture(84, 56)
    patches, grid = patches_of(processor, image)
    pixels = (np.asarray(image, np.float32) / 255 - processor.mean) / processor.std
    assert grid == (1, 4, 6) and patches.shape == (24, 1176)
    values = patches.reshape(24, 3, 2, 14, 14)
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, 1])
    # group 4 is the second of the second row of groups; its patch 1 is the upper right one
    theirs = pixels[28:42, 28 + 14 : 28 + 28].transpose(2, 0, 1)
    np.testing.assert_allclose(values[4 * 4 + 1, :, 0], theirs, atol=1e-6)


def test_unpatchify_inverts_patchify(processor: Processor) -> None:
    """An image that needs no resizing comes back to the last bit of its bytes."""
    for width, height in ((56, 84), (140, 28 * 3), (28 * 4, 28 * 5)):
        image = picture(width, height)
        patches, grid = patches_of(processor, image)
        again = np.rint(processor.unpatchify(patches, grid) * 255).astype(np.uint8)
        np.testing.assert_array_equal(again, np.asarray(image))


def test_pixel_limits(golden: Path) -> None:
    """Limits given to `load` override the checkpoint's."""
    config = load_config(golden / "qwen2.5-vl")
    image = picture(300, 300)
    for given, groups in ((dict(), 36), (dict(max_pixels=28 * 28 * 9), 9),
                          (dict(min_pixels=28 * 28 * 144, max_pixels=28 * 28 * 200), 144)):
        processor = Processor.load(golden / "qwen2.5-vl", config, **given)
        assert patches_of(processor, image)[1][1:] == (2 * groups**0.5, 2 * groups**0.5)


def test_limits_of_the_newer_file(checkpoint: Path) -> None:
    """Newer files state the limits as size.shortest_edge and size.longest_edge."""
    path = checkpoint / "preprocessor_config.json"
    image = json.loads(path.read_text())
    image["size"] = {"shortest_edge": image.pop("min_pixels"), "longest_edge": 28 * 28 * 9}
    del image["max_pixels"]
    path.write_text(json.dumps(image))
    processor = Processor.load(checkpoint, load_config(checkpoint))
    assert (processor.min_pixels, processor.max_pixels) == (56 * 56, 28 * 28 * 9)


# ---- tokens, positions, batches


def test_positions_by_hand(processor: Processor) -> None:
    """Text advances all axes; an image spans 2 x 3; what follows starts at the largest + 1."""
    encoded = processor.encode(Record(f"a{MARK}b{MARK}", [picture(84, 56), picture(56, 56)]))
    assert encoded.grids == [(1, 4, 6), (1, 4, 4)]
    assert encoded.positions.tolist() == [
        # a  start    the first image    end b start  the second   end
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 8, 8, 8, 10],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 8, 9, 9, 10],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 10],
    ]
    assert (encoded.tokens == processor.image_token).sum() == 10


def test_pack_offsets(processor: Processor, records: list[Record]) -> None:
    """A batch is its records end to end, and says where each begins."""
    encoded = [processor.encode(record) for record in records]
    batch = processor.pack(encoded)
    assert batch.lengths == tuple(len(item.tokens) for item in encoded)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(batch.lengths)]
    for item, begin, end in zip(encoded, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        assert batch.tokens[begin:end].tolist() == item.tokens.tolist()
        assert batch.positions[:, begin:end].tolist() == item.positions.tolist()
    assert batch.patches.shape == (4 * len(batch.image_index), 1176)
    assert batch.grids.tolist() == [list(grid) for item in encoded for grid in item.grids]
    assert (batch.tokens[batch.image_index] == processor.image_token).all()
    assert batch.sources == [f"record {number}" for number in range(8)]
    assert torch.equal(processor.batch(records).patches, batch.patches)


def random_record(dice: random.Random) -> Record:
    """Words and pictures of random sizes in random order."""
    parts, images = ["x"], []
    for _ in range(dice.randint(0, 8)):
        if dice.random() < 0.4:
            images.append(picture(dice.randint(5, 200), dice.randint(5, 200)))
            parts.append(MARK)
        else:
            parts.append(dice.choice([" word", "caf\u00e9", "<|im_end|>\n", " 123", "\U0001f98a"]))
    return Record("".join(parts), images)


def test_random_records(processor: Processor) -> None:
    """Tokens, positions, grids and patches of one record always belong together."""
    dice = random.Random(0)
    for _ in range(40):
        record = random_record(dice)
        encoded, batch = processor.encode(record), processor.batch([record])
        assert len(encoded.tokens) == encoded.positions.shape[1] == batch.lengths[0]
        groups = sum(rows * columns // 4 for _, rows, columns in encoded.grids)
        words = processor.tokenizer.encode(record.text).ids
        assert len(encoded.tokens) == len(words) - len(record.images) + groups
        assert len(batch.patches) == 4 * groups == 4 * len(batch.image_index)
        assert (np.diff(encoded.positions.max(0)) <= 1).all()  # no position is left out


def test_length_needs_the_header_only(processor: Processor) -> None:
    """`encode` does not decode images; asked to, it looks whether they can be."""
    contents = as_bytes(picture(84, 56))
    cut = Record(MARK, [contents[: len(contents) // 2]], "line 5")
    assert len(processor.encode(cut).tokens) == 2 + 6
    with pytest.raises(MocaError, match="line 5"):
        processor.encode(cut, decode=True)
    refusal(processor, cut)
    with pytest.raises(MocaError, match="line 5"):
        processor.encode(Record(MARK, [contents[:10]], "line 5"))


def test_max_tokens_shortens_text_only(processor: Processor) -> None:
    """Text is cut at the limit; images stay complete, up to the last one's end token."""
    record = Record(f"see {MARK}" + " and more words" * 20, [picture(84, 56)])
    full = processor.encode(record)
    images_end = int(np.flatnonzero(full.tokens == processor.image_token)[-1]) + 2
    for limit in (images_end, images_end + 5):
        short = processor.encode(record, limit)
        np.testing.assert_array_equal(short.tokens, full.tokens[:limit])
        np.testing.assert_array_equal(short.positions, full.positions[:, :limit])
        assert short.grids == full.grids
    assert len(processor.encode(record, 10**6).tokens) == len(full.tokens)
    message = refusal(processor, Record(record.text, record.images, "line 3"), images_end - 1)
    assert str(images_end) in message and "line 3" in message


def test_mask_token_takes_the_first_free_id(processor: Processor) -> None:
    """The mask token's id follows the tokenizer's last, within the padded rows."""
    others = processor.tokenizer.get_vocab(with_added_tokens=True)
    assert processor.new_mask_token == processor.mask_token == len(others) - 1
    assert processor.mask_token < processor.config.vocabulary
    assert processor.mask_token in processor.special_tokens


def test_saved_processor_is_the_same(processor: Processor, records: list[Record], tmp_path: Path
                                     ) -> None:
    """Saved and read again, ids and pixels are the same, and the mask token is known."""
    processor.save(tmp_path)
    again = Processor.load(tmp_path, processor.config)
    assert again.new_mask_token is None and again.mask_token == processor.mask_token
    ours, theirs = processor.batch(records), again.batch(records)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.patches, theirs.patches)
    refusal(again, Record("a <|mask|> b", [], "line 1"))


# ---- what is refused


@pytest.mark.parametrize("text, count, words", [
    ("", 0, "empty"),
    (" \n\t", 0, "empty"),
    ("no mark", 1, "0 image marks"),
    (MARK, 0, "1 image marks"),
    (f"{MARK} and {MARK}", 1, "2 image marks"),
    ("a stray <|image_pad|>", 0, "<|image_pad|>"),
    (f"{MARK} and a stray <|image_pad|>", 1, "<|image_pad|>"),
    ("a stray <|video_pad|>", 0, "<|video_pad|>"),
    (f"{MARK}<|vision_start|><|video_pad|><|vision_end|>", 1, "<|video_pad|>"),
    ("a <|mask|> in the text", 0, "<|mask|>"),
])
def test_texts_that_are_refused(processor: Processor, text: str, count: int, words: str) -> None:
    """Marks without images, stray vision tokens and empty texts name the record."""
    record = Record(text, [picture(60, 60)] * count, "data.jsonl line 7")
    assert words in refusal(processor, record)


def test_images_that_are_refused(processor: Processor, tmp_path: Path) -> None:
    """A missing, foreign, empty or truncated image names the record and the file."""
    contents = as_bytes(picture(64, 64))
    for name, content in (("missing.png", None), ("text.png", b"no image"), ("empty.png", b""),
                          ("truncated.png", contents[: len(contents) // 2])):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
            refusal(processor, Record(MARK, [content], "line 2"))
        assert name in refusal(processor, Record(MARK, [path], "line 2"))
    assert refusal(processor, Record(MARK, [tmp_path], "line 2"))  # a folder


@pytest.mark.filterwarnings("ignore")  # PIL's remarks on damaged metadata
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_images(processor: Processor, form: str) -> None:
    """Cut or overwritten anywhere, an image is encoded or refused; no other error gets out."""
    contents, dice = as_bytes(picture(60, 60), form), random.Random(0)
    for attempt in range(12):
        damaged = bytearray(contents)
        if attempt % 2:
            del damaged[dice.randrange(len(damaged)) :]
        else:
            for _ in range(8):
                damaged[dice.randrange(min(len(damaged), 400))] = dice.randrange(256)
        try:
            processor.batch([Record(MARK, [bytes(damaged)], "line 9")])
        except MocaError as error:
            assert "line 9" in str(error) and "\n" not in str(error)


def test_aspect_ratio(processor: Processor) -> None:
    """200 to 1 is the limit, as in the reference."""
    assert processor.encode(Record(MARK, [Image.new("RGB", (400, 2))])).grids
    for size in ((402, 2), (1, 201)):
        assert "200 to 1" in refusal(processor, Record(MARK, [Image.new("RGB", size)]))
    refusal(processor, Record(MARK, [Image.new("RGB", (0, 0))]))


def test_items_that_are_refused(moca: Moca) -> None:
    """`embed` names the item by its number; an item is a text, an object or a record."""
    for item in (None, 7, {}, {"images": []}, {"text": None}, ["a"]):
        with pytest.raises(MocaError, match="item 1"):
            moca.embed(["fine", item])
    with pytest.raises(MocaError, match="item 2"):
        moca.embed(["fine", {"text": "fine", "images": None}, ""])


def test_nothing_to_embed(moca: Moca) -> None:
    """No items give an empty table of the right width."""
    assert moca.embed([]).shape == (0, moca.model.config.width)


def test_tokenizers_that_are_refused(checkpoint: Path) -> None:
    """A tokenizer without the vision tokens, of another checkpoint, or cut short is named."""
    config, path = load_config(checkpoint), checkpoint / "tokenizer.json"
    contents = path.read_text(encoding="utf-8")
    image, video = "<|image_pad|>", "<|video_pad|>"
    exchanged = contents.replace(image, "<|x|>").replace(video, image).replace("<|x|>", video)
    for content in (contents.replace(image, "<|other|>"), exchanged, contents[:-5], "{}"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(MocaError, match="tokenizer.json"):
            Processor.load(checkpoint, config)
