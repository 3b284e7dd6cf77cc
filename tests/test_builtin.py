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
    ALL, CELL, COLOURS, FACTORS, GROUND, KNOWN, KNOWN_COLOURS, LABELLED, NAMES, NEW, NEW_COLOURS,
    BuiltinRecords, Palette, Scene, base, builtin_tasks, factor_tasks)
from nano_moca.builtin.base import WORDS, make_tokenizer
from nano_moca.builtin.scenes import PARTS, glyph
from nano_moca.builtin.tasks import SHOWN
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
    """The cells that a caption describes, in English."""
    parts = [part.split(" ") for part in text.split(", ")]
    assert all(len(part) == 3 or part == ["nothing"] for part in parts)
    assert all(part[0] == ("an" if part[1] == "orange" else "a") for part in parts if part[1:])
    return tuple(tuple(part[1:]) if part[1:] else None for part in parts)


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
    assert len(NAMES) == 72 and len(COLOURS) == 8 and len(set(words)) == len(words)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert len(KNOWN) == 2 * len(NEW) == 48 and set(KNOWN) | set(NEW) == set(NAMES)
    assert len(KNOWN_COLOURS) == len(NEW_COLOURS) == 4
    assert {*KNOWN_COLOURS, *NEW_COLOURS} == {*COLOURS}
    values = np.array(list(COLOURS.values()), float)
    apart = np.abs(values[:, None] - values[None]).max(-1) + 255 * np.eye(len(values))
    assert apart.min() >= 90  # no two colours are near in all three channels


def test_each_symbol_fills_its_cell_and_looks_like_no_other():
    inks = np.stack([glyph(name) for name in NAMES])  # [72, CELL, CELL]
    assert inks.dtype == np.float32 and inks.min() >= 0 and inks.max() <= 1
    for name, ink in zip(NAMES, inks):
        box = [np.flatnonzero((ink > 0.2).any(axis)) for axis in (1, 0)]
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
        scene = ALL.scene(random, int(random.integers(1, 4)), 2)
        said = read_cells(scene.caption())
        assert said == scene.cells
        for cell, pixels in zip(said, look(scene)):
            if cell is None:
                assert (pixels == GROUND).all()
                continue
            ink = glyph(cell[1]) > 0.99
            assert not ink.any() or np.abs(pixels[ink] - COLOURS[cell[0]]).max() <= 4
            # and at the edges, where ink is partial, a blend of ground and colour
            ink = glyph(cell[1])[..., None]  # [CELL, CELL, 1]
            expected = GROUND + ink * (np.array(COLOURS[cell[0]]) - GROUND)
            assert np.abs(pixels - expected).max() <= 1


def test_random_scenes_keep_to_their_palette_and_vary(random):
    scenes = [LABELLED.scene(random) for _ in range(400)]
    full = [cell for scene in scenes for cell in scene.cells if cell]
    assert {symbol for _, symbol in full} == set(KNOWN)
    assert {colour for colour, _ in full} == set(KNOWN_COLOURS)
    assert abs(1 - len(full) / 1200 - LABELLED.empty) < 0.05
    assert all(any(scene.cells) for scene in scenes)
    assert len(set(scenes)) > 380
    shades = [len({cell[0] for cell in scene.cells if cell}) for scene in scenes]
    assert 0.55 < np.mean(np.array(shades) == 1) < 0.75  # and a few by chance
    plain = [Palette(NEW, KNOWN_COLOURS, 1.0, 0.0).scene(random) for _ in range(50)]
    assert all(len({cell[0] for cell in scene.cells}) == 1 for scene in plain)  # none is empty


def test_a_scene_is_of_one_part_whatever_its_order_and_colours(random):
    """What is tested is in no training data, in no arrangement."""
    parts = {part: Palette(part=part) for part in PARTS}
    drawn = [ALL.scene(random) for _ in range(50)]
    drawn += [parts["test"].scene(random) for _ in range(50)]
    for number, scene in enumerate(drawn):
        owners = [part for part, palette in parts.items() if palette.has(scene)]
        assert owners == ["train" if number < 50 else "test"]
        turned = Scene(tuple(cell and ("red", cell[1]) for cell in scene.cells[::-1]))
        assert [part for part, palette in parts.items() if palette.has(turned)] == owners


@pytest.mark.parametrize("part", sorted(set(PARTS)))
def test_a_twin_differs_in_its_factor_alone(random, part):
    palette = Palette(NEW, NEW_COLOURS, empty=0.0, part=part)
    for _ in range(60):
        scene = palette.scene(random)
        for factor in FACTORS:
            family = palette.family(scene, [factor] * 3, random)
            assert len(set(family)) == 4 and all(map(palette.has, family))
            for twin in family[1:]:
                changed = [(a, b) for a, b in zip(scene.cells, twin.cells) if a != b]
                if factor == "place":
                    (a, b), (c, d) = changed
                    assert (a, b) == (d, c)
                    continue
                ((old, new),) = changed
                place = ("colour", "name").index(factor)
                assert old[place] != new[place] and old[1 - place] == new[1 - place]
                assert new[0] in NEW_COLOURS and new[1] in NEW


@pytest.mark.parametrize("names", [KNOWN, NEW])
def test_every_part_has_scenes_of_a_single_symbol_and_twins_of_them(names):
    """Else a search for one would not end."""
    for part in PARTS:
        palette = Palette(names, part=part)
        assert sum(palette.has(Scene((("red", name),))) for name in names) > 1


def test_twins_exist_whenever_two_cells_differ(random):
    scene = Scene((("red", "star"), None, None, None), 2)
    palette = next(palette for palette in map(lambda part: Palette(part=part), PARTS)
                   if palette.has(scene))
    for twin in palette.family(scene, ["place"] * 3, random)[1:]:
        assert twin != scene and twin.cells.count(None) == 3


def test_page_queries_name_what_is_on_the_page(random):
    for _ in range(100):
        page = ALL.scene(random, 2, 2)
        query, near = ALL.page_query(page, random)
        said = query.removeprefix("Find a page with ").replace(" and ", ", ")
        named = read_cells(said)
        assert 1 <= len(set(named)) == len(named) <= 2 and set(named) <= set(page.cells)
        assert not set(named) <= set(near.cells) and ALL.has(near)


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


def things(records: list[Record]) -> set:
    """What is said or shown, in whatever order: the items of captions and descriptions, the
    cells of pictures, the words of other texts."""
    seen = set()
    for record in records:
        for image in record.images:
            pixels = np.asarray(image)
            cells = [pixels[y : y + CELL, x : x + CELL].tobytes()
                     for y in range(0, len(pixels), CELL) for x in range(0, pixels.shape[1], CELL)]
            seen.add(tuple(sorted(cells)))
        words = record.text.replace(MARK, "").removesuffix(builtin.END)
        if words and words != SHOWN:  # what stands beside every picture
            seen.add(tuple(sorted(words.split(", "))))
    return seen


def test_nothing_of_a_test_is_in_other_data():
    """Scenes in no order, passages in no part: stage 1's records, labelled pairs, their hard
    negatives, the base's records; development and test."""
    found = {}
    for split in ("base", "train", "development", "test"):
        records = [BuiltinRecords(split)[index] for index in range(200)]
        pairs = []
        if split != "base":
            pairs += [task[index] for task in builtin_tasks(split).values() for index in range(24)]
        if split in ("development", "test"):
            pairs += [task[index] for task in factor_tasks(split).values() for index in range(24)]
        for pair in pairs:
            records += [pair.positive, *pair.negatives]
        found[split] = things(records)
        assert len(found[split]) > 300
    for split in ("development", "test"):
        for other in {*found} - {split}:
            assert not found[split] & found[other], (split, other)
    bodies = {split: [body for body, _ in builtin.split_documents(split)] for split in found}
    assert bodies["base"] == bodies["train"]
    every = sum((bodies[split] for split in ("train", "development", "test")), [])
    assert len(set(every)) == len(every) > 300


def test_labelled_pairs_show_what_the_base_knows_and_no_more():
    """So that what is measured on the others was taught by stage 1 alone."""
    for split in ("train", "all-kinds"):
        said = set()
        for task in builtin_tasks(split).values():
            for index in range(150):
                pair = task[index]
                if task.name != "long-text":
                    for record in (pair.query, pair.positive, *pair.negatives):
                        said |= set(record.text.removesuffix(builtin.END).replace(",", "").split())
        assert not said & {*NEW, *NEW_COLOURS} and said >= {*KNOWN, *KNOWN_COLOURS}


def test_other_kinds_are_hard_negatives_where_they_are_asked_for():
    """The same pairs but for them; the paper has none."""
    for task, plain in zip(builtin_tasks("all-kinds").values(), builtin_tasks().values()):
        for index in range(20):
            pair, alone = task[index], plain[index]
            assert same(pair.query, alone.query) and same(pair.positive, alone.positive)
            count = len(alone.negatives)
            assert all(map(same, pair.negatives, alone.negatives))
            kinds = [bool(record.images) for record in pair.negatives[count:]]
            right = bool(pair.positive.images)
            assert kinds == {"page-retrieval": [False], "long-text": [],
                             "text-pairs": [True, False]}.get(task.name, [not right])
    pairs = builtin_tasks("test")["caption-to-scene"]
    assert all(not pairs[index].negatives for index in range(8))


def test_families_test_one_factor_at_a_time():
    for name, task in factor_tasks("development").items():
        assert len(task) == 600
        for first in (0, 4, 596):
            texts = []
            for index in range(first, first + 4):
                pair = task[index]
                text = (pair.query if pair.positive.images else pair.positive).text
                texts.append(text.removeprefix("Find a picture: ").removesuffix(builtin.END))
            scenes = [read_cells(text) for text in texts]
            assert len(set(scenes)) == 4
            symbols = [cell[1] for cells in scenes for cell in cells if cell]
            if "unlabelled symbols" in name:
                assert set(symbols) <= set(NEW)
                assert len({cell[0] for cells in scenes for cell in cells}) == 1
            else:
                assert set(symbols) <= set(KNOWN)
            if "places" in name:
                assert len({tuple(sorted(map(str, cells))) for cells in scenes}) == 1
            if "colours" in name:
                assert len({tuple(cell[1] for cell in cells) for cells in scenes}) == 1


def test_an_unknown_split_is_refused():
    with pytest.raises((KeyError, MocaError)):
        BuiltinRecords("tset")[0]


def test_the_mixture_is_what_the_constants_say():
    records = [BuiltinRecords("train")[index] for index in range(1500)]
    texts = sum(not record.images for record in records) / 1500
    pictured = [record for record in records if record.images]
    pages = sum(record.images[0].height > CELL for record in pictured) / 1500
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
            cells = {cell for cell in read_cells(caption) if cell}
            assert cells and {cell[1] for cell in cells} <= set(KNOWN)
            assert {cell[0] for cell in cells} <= set(KNOWN_COLOURS)
    met = " ".join(BuiltinRecords("train")[index].text for index in range(300))
    assert all(name in met for name in (*NEW, *NEW_COLOURS))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_each_caption_word_is_one_token(tokenizer):
    for word in [*NAMES, *COLOURS, *WORDS.split()]:
        assert tokenizer.encode(word).tokens == [word]
        assert len(tokenizer.encode(" " + word)) == 1, word
    scene = Scene((("red", "anchor"), ("orange", "star"), None))
    assert len(tokenizer.encode(scene.caption())) == 7 + 2  # words and commas


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
