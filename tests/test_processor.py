"""From records to batches: what is computed, and what is refused instead of guessed."""

import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

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
    mean, std = np.float32(processor.normalise.mean), np.float32(processor.normalise.std)
    pixels = (np.asarray(image, np.float32) / 255 - mean) / std
    assert grid == (1, 4, 6) and patches.shape == (24, 1176)
    values = patches.reshape(24, 3, 2, 14, 14)
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, 1])
    # group 4 is the second of the second row of groups; its patch 1 is the upper right one
    theirs = pixels[28:42, 28 + 14 : 28 + 28].transpose(2, 0, 1)
    np.testing.assert_allclose(values[4 * 4 + 1, :, 0], theirs, atol=1e-6)


def test_bytes_are_normalised_to_the_bit(processor: Processor) -> None:
    """What the model reads of each of the 256 values of a channel is what numpy computes of it in
    float32; and so it is of a picture, whose other frame is the same."""
    mean, std = np.float32(processor.normalise.mean), np.float32(processor.normalise.std)
    values = torch.arange(256, dtype=torch.uint8)
    ours = processor.normalise(values.repeat(3)).view(3, 2, 256)  # channel, frame, value
    levels = (np.arange(256, dtype=np.float32) / np.float32(255))[:, None]
    theirs = torch.from_numpy((levels - mean) / std).T  # [3, 256]
    assert torch.equal(ours[:, 0], theirs) and torch.equal(ours[:, 1], theirs)

    image = Image.effect_mandelbrot((84, 56), (-2, -1, 1, 1), 20).convert("RGB")
    batch = processor.batch([Record(MARK, [image])])
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (6, 4, 588)
    pixels = (np.asarray(image, np.float32) / np.float32(255) - mean) / std  # [56, 84, 3]
    first = torch.from_numpy(pixels[:14, :14]).permute(2, 0, 1)  # the first patch, [3, 14, 14]
    assert torch.equal(batch.patches[0].view(3, 2, 14, 14), first[:, None].expand(3, 2, 14, 14))


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


# ---- the image processor's file

HUB = {  # the keys of the published checkpoints
    "min_pixels": 3136, "max_pixels": 28224, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
SWITCHES = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "resample": 3, "rescale_factor": 0.00392156862745098}
FAST = HUB | SWITCHES | {  # transformers 4.57
    "image_processor_type": "Qwen2VLImageProcessorFast", "crop_size": None,
    "data_format": "channels_first", "default_to_square": True, "device": None,
    "disable_grouping": None, "do_center_crop": None, "do_pad": None, "input_data_format": None,
    "pad_size": None, "return_tensors": None,
    "size": {"longest_edge": 28224, "shortest_edge": 3136}}
FIVE = {key: value for key, value in HUB.items() if "pixels" not in key} | SWITCHES | {
    "size": {"longest_edge": 28224, "shortest_edge": 3136}}  # transformers 5.17
LIMITS = {"min_pixels": 3136, "max_pixels": 28224}


def with_settings(checkpoint: Path, content: object, name: str = "preprocessor_config.json",
                  **given: int) -> Processor:
    """The checkpoint's processor, with another image processor's file."""
    (checkpoint / name).write_text(json.dumps(content))
    return Processor.load(checkpoint, load_config(checkpoint), **given)


@pytest.mark.parametrize("content", [
    HUB, FAST, FIVE, LIMITS, {"size": LIMITS}, {"size": LIMITS | {"shortest_edge": 3136}},
    LIMITS | {"size": None}, LIMITS | {"size": {"shortest_edge": 1, "longest_edge": 2}},
    {"min_pixels": None, "max_pixels": None, "size": FIVE["size"]},
    LIMITS | {"do_center_crop": False, "do_pad": False, "image_seq_length": None},
    LIMITS | {"image_mean": np.float32(HUB["image_mean"]).tolist()},  # as saved by some
    LIMITS | {"rescale_factor": float(np.float32(1 / 255))},
])
def test_settings_that_are_obeyed(checkpoint: Path, processor: Processor, content: dict) -> None:
    """All say the same, in the ways in which it is written; a limit beside a size comes first."""
    ours = with_settings(checkpoint, content)
    assert (ours.min_pixels, ours.max_pixels) == (3136, 28224)
    np.testing.assert_array_equal(np.float32(ours.normalise.mean), np.float32(HUB["image_mean"]))
    np.testing.assert_array_equal(np.float32(ours.normalise.std), np.float32(HUB["image_std"]))


def test_other_means_are_obeyed(checkpoint: Path) -> None:
    """As Qwen3-VL's, and what is not said is CLIP's."""
    ours = with_settings(checkpoint, {"image_mean": [0.5, 0.25, 0], "image_std": [0.5, 1, 0.25]})
    np.testing.assert_array_equal(np.float32(ours.normalise.mean), np.float32([0.5, 0.25, 0]))
    patches, _ = patches_of(ours, Image.new("RGB", (56, 56), "white"))
    values = patches.reshape(-1, 3, 2 * 14 * 14)
    for channel, expected in enumerate((1, 0.75, 4)):
        np.testing.assert_allclose(values[:, channel], expected, atol=1e-6)


def test_defaults_are_the_reference_s(checkpoint: Path) -> None:
    """An empty file is Qwen2VLImageProcessor's own defaults."""
    ours = with_settings(checkpoint, {})
    assert (ours.min_pixels, ours.max_pixels) == (56 * 56, 28 * 28 * 1280)


@pytest.mark.parametrize("key, value", [
    ("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("do_convert_rgb", False),
    ("do_normalize", None), ("do_resize", "true"), ("do_center_crop", True), ("do_pad", True),
    ("resample", 2), ("resample", None), ("resample", "bicubic"), ("rescale_factor", 1 / 127.5),
    ("rescale_factor", None), ("patch_size", 16), ("patch_size", None), ("merge_size", 1),
    ("temporal_patch_size", 1), ("image_processor_type", "CLIPImageProcessor"),
    ("image_mean", None), ("image_mean", [0.5, 0.5]), ("image_mean", ["0.5"] * 3),
    ("image_mean", 0.5), ("image_mean", [float("nan"), 0.5, 0.5]), ("image_mean", [1e30, 0, 0]),
    ("image_mean", [True, True, True]), ("image_mean", [123.7, 116.3, 103.5]),
    ("image_std", [0, 1, 1]), ("image_std", [-0.5, 0.5, 0.5]), ("image_std", {"a": 1}),
    ("image_std", [1e-30, 1, 1]), ("image_std", "abc"),
    ("min_pixels", "3136"), ("min_pixels", True), ("min_pixels", 0), ("min_pixels", -784),
    ("min_pixels", 3136.5), ("min_pixels", float("nan")), ("min_pixels", 10**12),
    ("max_pixels", 10**30), ("max_pixels", 1e30), ("max_pixels", 28), ("max_pixels", [28224]),
    ("size", 448), ("size", [448, 448]), ("size", {"height": 448, "width": 448}),
    ("size", {"shortest_edge": "56", "longest_edge": 28224}), ("size", 0), ("size", []),
    ("size", ""), ("size", False), ("size", {"size": {"longest_edge": 9}}),
    ("size", {"crop_size": 9}), ("size", {"image_mean": [0.5] * 3}),
    ("interpolate", "area"), ("do_tile", True), ("temporal_merge", 2),
])
def test_settings_that_are_refused(checkpoint: Path, key: str, value: object) -> None:
    """One line that names file and key: nothing is passed over."""
    content = {} if key == "size" else {"min_pixels": 3136, "max_pixels": 28224}
    with pytest.raises(MocaError, match=r"preprocessor_config\.json") as caught:
        with_settings(checkpoint, content | {key: value})
    said = str(caught.value)
    named = {"height", "width", "min_pixels"} if key == "size" else {key}
    assert key in said or any(name in said for name in named)
    assert "\n" not in said


@pytest.mark.parametrize("size", [{"shortest_edge": [56]}, {"longest_edge": -1},
                                  {"max_pixels": True}, {"min_pixels": 1e4}])
def test_a_size_is_looked_at_always(checkpoint: Path, size: dict) -> None:
    """Also if what stands beside it comes first."""
    (key, _), = size.items()
    with pytest.raises(MocaError, match=rf"preprocessor_config\.json: size\.{key} is "):
        with_settings(checkpoint, HUB | {"size": size})


def test_the_file_of_transformers_5(checkpoint: Path) -> None:
    """The image processor inside processor_config.json is read first, as transformers does; a
    file of that name without one stands beside the older one."""
    old = with_settings(checkpoint, LIMITS | {"max_pixels": 784 * 9})
    assert old.max_pixels == 784 * 9
    whole = {"processor_class": "Qwen2_5_VLProcessor"}
    same = with_settings(checkpoint, whole, "processor_config.json")
    assert same.max_pixels == 784 * 9
    new = with_settings(checkpoint, whole | {"image_processor": FIVE}, "processor_config.json")
    assert new.max_pixels == 28224
    (checkpoint / "preprocessor_config.json").unlink()
    new = with_settings(checkpoint, whole | {"image_processor": FIVE}, "processor_config.json")
    assert new.max_pixels == 28224
    with pytest.raises(MocaError, match="processor_config.json.*do_resize"):
        with_settings(checkpoint, {"image_processor": {"do_resize": 0}}, "processor_config.json")
    for wrong in (5, [], "", False, "Qwen2VLImageProcessor"):
        with pytest.raises(MocaError, match="/processor_config.json: image_processor is "):
            with_settings(checkpoint, {"image_processor": wrong}, "processor_config.json")
    for absent in (whole, {"image_processor": None}):
        with pytest.raises(MocaError, match="preprocessor_config.json"):
            with_settings(checkpoint, absent, "processor_config.json")


@pytest.mark.parametrize("given", [{"min_pixels": 0}, {"max_pixels": -5}, {"min_pixels": "56"},
                                   {"min_pixels": True}, {"min_pixels": 10**9},
                                   {"max_pixels": 1.5}])
def test_limits_that_are_refused(checkpoint: Path, given: dict) -> None:
    """A limit that a caller gives is checked like the file's, and the flag is named."""
    (name, _), = given.items()
    with pytest.raises(MocaError, match="--" + name.replace("_", "-")):
        with_settings(checkpoint, HUB, **given)


def test_saved_settings(checkpoint: Path, tmp_path: Path) -> None:
    """What is saved says the same when it is read again, whatever it was read from."""
    for content in (HUB, FAST, FIVE, {"size": LIMITS}):
        ours, folder = with_settings(checkpoint, content), tmp_path / "saved"
        folder.mkdir(exist_ok=True)
        ours.save(folder)
        assert "size" not in json.loads((folder / "preprocessor_config.json").read_text())
        again = Processor.load(folder, ours.config)
        assert (again.min_pixels, again.max_pixels) == (3136, 28224)
        np.testing.assert_array_equal(again.normalise.mean, ours.normalise.mean)
        np.testing.assert_array_equal(again.normalise.std, ours.normalise.std)


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
    assert batch.segments.offsets.tolist() == [0, *np.cumsum(batch.lengths)]
    offsets = batch.segments.offsets
    for item, begin, end in zip(encoded, offsets[:-1], offsets[1:], strict=True):
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
    """`encode` does not decode images; `decode` and `pack` do."""
    contents = as_bytes(picture(84, 56))
    cut = Record(MARK, [contents[: len(contents) // 2]], "line 5")
    assert len(processor.encode(cut).tokens) == 2 + 6
    with pytest.raises(MocaError, match="line 5"):
        processor.decode([processor.encode(cut)])
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


@pytest.mark.parametrize("end, kept", [
    ("<|im_end|>", 1), ("<|endoftext|>", 1), ("<|im_end|>\n", 2), ("<|im_end|><|endoftext|>", 1),
    ("", 0), (".\n", 0), ("\n", 0)])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_shortened_texts_keep_their_end(processor: Processor, end: str, kept: int, images: int
                                        ) -> None:
    """What closes a text stays its last tokens; what is before it is cut."""
    text = f"see {MARK * images}" + " and more words" * 20 + end
    record = Record(text, [picture(84, 56)] * images, "line 2")
    full = processor.encode(record)
    limit = len(full.tokens) - 30
    short = processor.encode(record, limit)
    assert len(short.tokens) == limit == short.positions.shape[1]
    np.testing.assert_array_equal(short.tokens[: limit - kept], full.tokens[: limit - kept])
    end_of_all = full.tokens[len(full.tokens) - kept :]
    np.testing.assert_array_equal(short.tokens[limit - kept :], end_of_all)
    np.testing.assert_array_equal(short.positions, full.positions[:, :limit])
    if kept:
        assert processor.tokenizer.decode(short.tokens[-kept:], skip_special_tokens=False) in end


@pytest.mark.parametrize("end, kept", [("<|im_end|>", 1), ("<|im_end|>\n", 2), ("", 0)])
def test_images_and_end_have_to_fit(processor: Processor, end: str, kept: int) -> None:
    """All up to the last image and the end need so many tokens; the text before counts."""
    record = Record(f"a few words before {MARK}{' after' * 9}{end}", [picture(84, 56)], "line 6")
    tokens = processor.encode(record).tokens
    needed = int(np.flatnonzero(tokens == processor.image_token)[-1]) + 2 + kept
    short = processor.encode(record, needed)
    np.testing.assert_array_equal(short.tokens[needed - kept :], tokens[len(tokens) - kept :])
    message = refusal(processor, record, needed - 1)
    assert f"{needed} tokens of {needed - 1}" in message and "--max-tokens" in message


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_mark_is_no_end(processor: Processor, end: str) -> None:
    """What follows the last image's mark may be cut, be it one line end."""
    record = Record(f"{MARK}{end}", [picture(84, 56)])
    assert len(processor.encode(record, 8).tokens) == 8


def test_a_limit_of_one_token(processor: Processor) -> None:
    """A text alone has a first token, or an end."""
    assert len(processor.encode(Record("many words in it"), 1).tokens) == 1
    assert processor.encode(Record("words<|im_end|>"), 1).tokens.tolist() == [processor.end_token]


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


def test_a_token_without_an_embedding(checkpoint: Path) -> None:
    """A token beyond the embedding is named; the last row that there is may be used."""
    config = load_config(checkpoint)
    path = checkpoint / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    for number in range(tokenizer.get_vocab_size(), config.vocabulary):
        tokenizer.add_special_tokens([f"<|{number}|>"])
    tokenizer.save(str(path))
    Processor.load(checkpoint, config)

    # one more, special or not; and an embedding that is smaller than the vocabulary
    for add in (tokenizer.add_special_tokens, tokenizer.add_tokens):
        add([f"<|{tokenizer.get_vocab_size()}|>"])
        tokenizer.save(str(path))
        with pytest.raises(MocaError, match=rf"tokenizer\.json: <\|70.\|> is 70., of {704}"):
            Processor.load(checkpoint, config)
    with pytest.raises(MocaError, match="of 300 in config.json"):
        Processor.load(checkpoint, replace(config, vocabulary=300))


@pytest.mark.parametrize("key", ["image_token_id", "video_token_id", "vision_start_token_id",
                                 "vision_end_token_id"])
def test_ids_that_config_json_says(checkpoint: Path, key: str) -> None:
    """Each is compared with the tokenizer's; null and absent say nothing."""
    config = load_config(checkpoint)
    for raw in ({**config.raw, key: None}, {k: v for k, v in config.raw.items() if k != key}):
        Processor.load(checkpoint, replace(config, raw=raw))
    for wrong in (5, -1, "x"):
        with pytest.raises(MocaError, match=rf"tokenizer\.json: .*{wrong}"):
            Processor.load(checkpoint, replace(config, raw={**config.raw, key: wrong}))


@pytest.mark.parametrize("change", [
    lambda raw: raw.update(normalizer={"type": "Replace", "pattern": {"Regex": "[a-z ]+"},
                                       "content": ""}),
    lambda raw: raw.update(model={"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "?"}),
    lambda raw: raw["model"].update(vocab={}, merges=[]),
    lambda raw: [raw["model"].update(vocab={}, merges=[]), raw.update(added_tokens=[])],
], ids=["all is removed", "no word is known", "special tokens only", "nothing"])
def test_tokenizers_that_give_no_tokens(checkpoint: Path, change: Callable) -> None:
    """A text without tokens has no vector: whether it shows at once or only then."""
    config, path = load_config(checkpoint), checkpoint / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MocaError, match=r"tokenizer"):
        Processor.load(checkpoint, config).encode(Record("words only", [], "line 3"))


def test_a_mark_that_is_no_token(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many image tokens as images, whatever a tokenizer makes of the text."""
    monkeypatch.setattr(processor, "image_token", 5)
    for images in (1, 2):
        record = Record(MARK * images + " words", [picture(60, 60)] * images, "line 4")
        assert "tokenizer.json" in refusal(processor, record)


def test_dropout_is_off(checkpoint: Path, processor: Processor) -> None:
    """A tokenizer may have been saved in the midst of its training: tokens are no dice."""
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.9
    path.write_text(json.dumps(content), encoding="utf-8")
    again = Processor.load(checkpoint, load_config(checkpoint))
    record = Record("the quick brown fox and the lazy dog")
    np.testing.assert_array_equal(again.encode(record).tokens, processor.encode(record).tokens)


def test_a_mask_token_of_the_vocabulary(checkpoint: Path) -> None:
    """A mask token that is no added token serves as one."""
    config, path = load_config(checkpoint), checkpoint / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    used = set("".join(map("".join, content["model"]["merges"])))
    unused = next(token for token in vocabulary if len(token) == 1 and token not in used)
    number = vocabulary["<|mask|>"] = vocabulary.pop(unused)
    path.write_text(json.dumps(content), encoding="utf-8")

    ours = Processor.load(checkpoint, config)
    assert ours.mask_token == number and ours.new_mask_token is None
    assert number in ours.special_tokens
    refusal(ours, Record("a <|mask|> b", [], "line 1"))


def test_files_that_are_no_files(checkpoint: Path) -> None:
    """A pipe, a folder or nothing in a file's place is named, and not waited for."""
    config = load_config(checkpoint)
    for name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json"):
        path = checkpoint / name
        content = path.read_bytes() if path.exists() else None
        for make in (os.mkfifo, os.mkdir):
            path.unlink(missing_ok=True)
            make(path)
            with pytest.raises(MocaError, match=name):
                Processor.load(checkpoint, config)
            path.rmdir() if path.is_dir() else path.unlink()
        if content:
            with pytest.raises(MocaError, match=name):
                Processor.load(checkpoint, config)
            path.write_bytes(content)
    Processor.load(checkpoint, config)
