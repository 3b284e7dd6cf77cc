"""The embedded default: what is drawn is what is said, and what is said can be learned.

Each test guards a premise of the miniature: captions are true, twins differ in exactly one respect,
records depend on (seed, split, index) alone, and no caption word is split into tokens.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from nano_moca import builtin
from nano_moca.batch import MARK, Record
from nano_moca.builtin import (
    CELL, COLOURS, GROUND, KNOWN, NAMES, NEW, BuiltinRecords, Scene, base)
from nano_moca.builtin.base import make_tokenizer
from nano_moca.builtin.scenes import EMPTY, glyph
from nano_moca.config import BASE
from nano_moca.families import load_config
from nano_moca.files import MocaError

SPECIAL = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad").split()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def read_cells(text: str) -> tuple:
    """The cells that a caption describes."""
    parts = text.split(", ")
    return tuple(None if part == "nothing" else tuple(part.split(" ")) for part in parts)


def look(scene: Scene) -> list[np.ndarray]:
    """The pixels of each cell, [CELL, CELL, 3], cut from the finished picture."""
    pixels = np.asarray(scene.image(), np.float32)
    rows = len(scene.cells) // scene.columns
    assert pixels.shape == (rows * CELL, scene.columns * CELL, 3)
    return [
        pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
        for y in range(rows)
        for x in range(scene.columns)
    ]


def test_the_words_are_distinct_single_and_well_divided():
    words = [*NAMES, *COLOURS, "nothing"]
    assert len(NAMES) == 48 and len(COLOURS) == 8 and len(set(words)) == len(words)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert len(KNOWN) == len(NEW) == 24 and set(KNOWN) | set(NEW) == set(NAMES)
    values = np.array(list(COLOURS.values()), float)
    apart = np.abs(values[:, None] - values[None]).max(-1) + 255 * np.eye(len(values))
    assert apart.min() >= 90  # no two colours are near in all three channels


def test_each_symbol_fills_its_cell_and_looks_like_no_other():
    inks = np.stack([glyph(name) for name in NAMES])  # [48, CELL, CELL]
    assert inks.dtype == np.float32 and inks.min() >= 0 and inks.max() <= 1
    for name, ink in zip(NAMES, inks):
        box = [np.flatnonzero((ink > 0.5).any(axis)) for axis in (1, 0)]
        assert 46 <= max(span[-1] - span[0] + 1 for span in box) <= CELL, name
        assert all(abs(span[0] + span[-1] - CELL + 1) <= 3 for span in box), f"{name}: off centre"
        assert ink.mean() > 0.05, f"{name}: too little ink to learn from"
    flat = inks.reshape(len(inks), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    alike = flat @ flat.T - np.eye(len(flat))
    first, second = np.unravel_index(alike.argmax(), alike.shape)
    assert alike.max() < 0.93, (NAMES[first], NAMES[second])  # disc and square, the nearest: 0.90


def test_pictures_show_what_captions_say(random):
    for _ in range(40):
        scene = builtin.random_scene(random, rows=int(random.integers(1, 4)), columns=2)
        said = read_cells(scene.caption())
        assert said == scene.cells
        for cell, pixels in zip(said, look(scene)):
            if cell is None:
                assert (pixels == GROUND).all()
                continue
            ink = glyph(cell[1]) > 0.99
            assert ink.any() and np.abs(pixels[ink] - COLOURS[cell[0]]).max() <= 4
            # and at the edges, where ink is partial, a blend of ground and colour
            ink = glyph(cell[1])[..., None]  # [CELL, CELL, 1]
            expected = GROUND + ink * (np.array(COLOURS[cell[0]]) - GROUND)
            assert np.abs(pixels - expected).max() <= 1


def test_random_scenes_keep_to_their_names_and_vary(random):
    scenes = [builtin.random_scene(random, KNOWN) for _ in range(400)]
    full = [cell for scene in scenes for cell in scene.cells if cell]
    assert {symbol for _, symbol in full} == set(KNOWN)
    assert {colour for colour, _ in full} == set(COLOURS)
    assert abs(1 - len(full) / 1600 - EMPTY) < 0.05
    assert all(any(scene.cells) for scene in scenes)
    assert len(set(scenes)) == 400  # 385^4 scenes: chance meetings are negligible


def test_twins_differ_in_exactly_what_they_say(random):
    for _ in range(200):
        scene = builtin.random_scene(random, NEW)
        swapped, recoloured, replaced = family = builtin.twins(scene, random, NEW)
        assert len({scene.caption(), *(twin.caption() for twin in family)}) == 4
        pairs = [[(a, b) for a, b in zip(scene.cells, twin.cells) if a != b] for twin in family]
        (a, b), (c, d) = pairs[0]
        assert (a, b) == (d, c) and sorted(map(str, swapped.cells)) == sorted(map(str, scene.cells))
        ((old, new),) = pairs[1]
        assert old[0] != new[0] and old[1] == new[1] and new[0] in COLOURS
        ((old, new),) = pairs[2]
        assert old[0] == new[0] and old[1] != new[1] and new[1] in NEW
        assert {twin.columns for twin in family} == {scene.columns}


def test_twins_exist_whenever_two_cells_differ(random):
    scene = Scene((("red", "star"), None, None, None))
    swapped, *_ = builtin.twins(scene, random)
    assert swapped != scene and swapped.cells.count(None) == 3


def test_page_queries_name_what_is_on_the_page(random):
    for _ in range(100):
        page = builtin.random_scene(random, rows=4, columns=4)
        query, _ = builtin.page_query(page, random)
        words = query.replace(",", "").split()
        pairs = zip(words, words[1:])
        named = [pair for pair in pairs if pair[0] in COLOURS and pair[1] in NAMES]
        assert 2 <= len(set(named)) == len(named) <= 3 and set(named) <= set(page.cells)
        assert sum(word in COLOURS for word in words) == len(named)  # and nothing else is named


def test_documents_are_real_and_in_a_fixed_order():
    pairs = builtin.documents()
    headings = [heading for heading, _ in pairs]
    assert len(pairs) > 300 and len(set(headings)) == len(headings)
    assert all(len(body.split()) > 5 for _, body in pairs)
    # an address would differ from run to run
    assert not [(heading, body) for heading, body in pairs if " at 0x" in body]
    # nor may it matter who else is here: pytest itself replaces one of the functions
    code = "from nano_moca.builtin import documents; print(ascii(documents()))"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(alone.stdout) == pairs
    builtin.documents.cache_clear()
    assert builtin.documents() == pairs


def same(a: Record, b: Record) -> bool:
    """Two records with the same text and the same pictures."""
    pictures = zip(a.images, b.images)
    return a.text == b.text and len(a.images) == len(b.images) and all(
        x.tobytes() == y.tobytes() for x, y in pictures
    )


def test_records_depend_on_seed_split_and_index_alone():
    data, again = BuiltinRecords("train", seed=3), BuiltinRecords("train", seed=3)
    backwards = {index: again[index] for index in reversed(range(60))}
    assert all(same(data[index], backwards[index]) for index in range(60))
    other = BuiltinRecords("train", seed=4)
    assert not any(same(data[index], other[index]) for index in range(60))
    assert len(data) >= 1_000_000 and same(data[len(data) - 1], again[len(data) - 1])


def test_splits_never_share_a_scene():
    texts = {}
    for split in ("train", "development", "test"):
        records = [BuiltinRecords(split)[index] for index in range(400)]
        texts[split] = {r.text for r in records if r.images}
        assert len(texts[split]) > 300
    assert not texts["train"] & texts["development"]
    assert not texts["train"] & texts["test"]
    assert not texts["development"] & texts["test"]


def test_an_unknown_split_is_refused():
    with pytest.raises((KeyError, MocaError)):
        BuiltinRecords("tset")[0]


def test_the_mixture_is_what_the_constants_say():
    records = [BuiltinRecords("train")[index] for index in range(1500)]
    texts = sum(not record.images for record in records) / 1500
    pictured = [record for record in records if record.images]
    pages = sum(record.text.count(", ") > 3 for record in pictured) / 1500
    assert abs(texts - BuiltinRecords.TEXTS) < 0.02 and abs(pages - BuiltinRecords.PAGES) < 0.02
    for record in records:
        assert record.text.count(MARK) == len(record.images) <= 1
        assert record.text.startswith(MARK) == bool(record.images)  # the picture comes first
        assert len(record.text.split()) < 90


def test_the_base_never_meets_the_new_symbols():
    for index in range(300):
        record = BuiltinRecords("base")[index]
        if record.images:
            caption = record.text.removeprefix(MARK).removesuffix(builtin.END)
            symbols = {cell[1] for cell in read_cells(caption) if cell}
            assert symbols and symbols <= set(KNOWN)
    met = " ".join(BuiltinRecords("train")[index].text for index in range(300))
    assert all(name in met for name in NEW)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_each_caption_word_is_one_token(tokenizer):
    for word in [*NAMES, *COLOURS, "nothing"]:
        assert tokenizer.encode(word).tokens == [word]
        assert len(tokenizer.encode(" " + word)) == 1, word
    scene = Scene((("red", "anchor"), ("blue", "star"), None, ("yellow", "snowman")))
    assert len(tokenizer.encode(scene.caption())) == 7 + 3  # words and commas


def test_the_tokenizer_is_like_qwens(tokenizer):
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    ids = [tokenizer.token_to_id(f"<|{name}|>") for name in SPECIAL]
    assert ids == list(range(size, size + 14))  # after the vocabulary, as in Qwen
    config = load_config(BASE).raw  # which the next base is made with too
    for key, name in (("bos_token_id", "endoftext"), ("eos_token_id", "im_end"),
                      ("vision_start_token_id", "vision_start"), ("image_token_id", "image_pad"),
                      ("vision_end_token_id", "vision_end"), ("video_token_id", "video_pad")):
        assert config[key] == ids[SPECIAL.index(name)]
    assert tokenizer.encode("<|vision_start|><|image_pad|>").ids == [ids[9], ids[12]]
    text = "Caf\u00e9 \u4f60\u597d 12345 \U0001f98a\n\n  spaces   and\ttabs 'tis it's"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text  # byte-level: nothing is unknown
    assert tokenizer.encode("Cafe\u0301").ids == tokenizer.encode("Caf\u00e9").ids  # NFC
    assert tokenizer.encode("12345").tokens == list("12345")  # digits stand alone


# --- making the base anew -----------------------------------------------------------------------

@pytest.fixture
def making(tmp_path, monkeypatch):
    """A base of its own to replace, and no training."""
    monkeypatch.chdir(tmp_path)
    place = Path(shutil.copytree(BASE, tmp_path / "package" / "base"))
    (place / "mine.txt").write_text("edited")
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "model.safetensors").write_bytes(b"new" * 1000)
    monkeypatch.setattr(base, "BASE", place)
    monkeypatch.setattr(base, "train_base", lambda start, words: trained)
    monkeypatch.setattr(base, "make_tokenizer",
                        lambda: Tokenizer.from_file(str(BASE / "tokenizer.json")))
    return place


def contents(folder):
    """What is in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_base_takes_the_place_whole(making):
    """What the user put into the folder moves with it."""
    base.make_base([])
    assert (making / "model.safetensors").read_bytes() == b"new" * 1000
    assert (making / "mine.txt").read_text() == "edited"
    assert [path.name for path in making.parent.iterdir()] == ["base"]
    base.make_base([])


def test_a_full_disk_keeps_the_old_base(making, full_disk):
    """And the message is a line that names it."""
    before = contents(making)
    with full_disk(100_000), pytest.raises((MocaError, OSError)) as caught:
        base.make_base([])
    assert contents(making) == before and len(str(caught.value).splitlines()) == 1
    base.make_base([])


@pytest.mark.parametrize("ending", [".old", ".new"])
def test_a_users_copy_beside_the_base(making, ending):
    """A backup of that name is the user's: refused before the work."""
    copy = making.with_name("base" + ending)
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(MocaError, match="move it away"):
        base.make_base([])
    assert contents(copy) == {"model.safetensors": b"mine"} and not Path("runs").exists()


def test_a_package_that_may_not_be_written(making):
    """Said before half an hour of work."""
    shutil.rmtree(making.parent)
    with pytest.raises(MocaError, match="base cannot be written"):
        base.make_base([])
