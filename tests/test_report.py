"""What a run says at its end: the scores whatever happens to the pictures, and what counts as
right where a question has several answers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import train_cpt
from nano_moca import Moca, MocaError, Record
from nano_moca.batch import Pair
from nano_moca.builtin import BuiltinRecords
from nano_moca.distributed import World
from nano_moca.masking import mask_batch
from nano_moca.model import ReconstructionModel
from nano_moca.report import stage1, stage2
from nano_moca.report.curves import plot_losses
from nano_moca.report.pictures import panels, picture
from nano_moca.report.ranking import Ranking, rank_pairs
from nano_moca.report.stage1 import mean

MAIN, OTHER = (World(rank, 2, torch.device("cpu"), torch.float32) for rank in (0, 1))
LINES = [{"step": step, "loss": 1 / step, "accuracy": 0.5, "mlm_loss": 1 / step, "mae_loss": 0.5}
         for step in range(1, 4)]

# --- pictures -------------------------------------------------------------------------------------

TEXTS = {
    "dollars": "prices (US$, 100% of AU$)", "a formula": r"$\frac{1}{", "an odd dollar": "5$",
    "braces": "}{^_\\", "an unknown command": r"$\unknown$", "a surrogate": "\ud800", "empty": "",
    "lines": "one\ntwo\r\nthree\x85four", "control characters": "\x00\x1b[31m\x07",
    "long": "ab" * 5000, "long words": "word " * 2000, "Chinese": "文档检索",
    "right to left": "مستندات עברית",
    "emoji": "👩\u200d💻", "private": "\ue000", "beyond": "\U0010ffff",
}


@picture
def save(figure: Figure, text: str = "a title") -> None:
    """A small picture with a text at every place that texts have."""
    axis = panels(figure, 1, 1, 3, 2)[0, 0]
    axis.set(title=text, xlabel=text, ylabel=text)
    axis.set_xticks([0, 1], [text, text])
    axis.text(0.5, 0.5, text)


@picture
def fail(figure: Figure, error: BaseException) -> None:
    """One that fails when something is drawn already."""
    figure.subplots()
    raise error


def is_picture(path: Path) -> bool:
    """A whole PNG."""
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 50


@pytest.mark.parametrize("text", [text for name, text in TEXTS.items() if "surrogate" not in name],
                         ids=lambda text: ascii(text)[:20])
def test_no_text_is_a_formula_nor_a_warning(tmp_path: Path, text: str, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(tmp_path / "a.png", text[:200])
    assert is_picture(tmp_path / "a.png") and not caught
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [
    ValueError("two\nlines"), MocaError("a broken image"), MemoryError(), KeyError("loss"),
    OSError(28, "No space left on device"), RuntimeError("")], ids=repr)
def test_a_picture_that_fails_is_one_line(tmp_path: Path, error: Exception, capsys):
    """And what stood there stays."""
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    fail(path, error)
    said = capsys.readouterr().out
    assert said.startswith("no picture a.png: ") and said.count("\n") == 1
    assert len(said) > len("no picture a.png: \n")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_is_no_failed_picture(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "a.png", KeyboardInterrupt())


@pytest.mark.parametrize("name", ["matplotlib", "matplotlib.figure"])
def test_a_library_that_is_broken_costs_pictures_alone(tmp_path: Path, moca: Moca, name: str,
                                                       monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert report(tmp_path, moca, ["one"])["tasks"]["one"]["queries"] == 3
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["scores.json"]
    said = capsys.readouterr().out
    assert said.count("no picture") == 3 and name in said


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_full_disk_costs_the_picture_alone(tmp_path: Path, size: int, full_disk: Callable):
    path = tmp_path / "a.png"
    save(path)
    good, said = path.read_bytes(), io.StringIO()
    with contextlib.redirect_stdout(said), full_disk(size):
        save(path, "another title")
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
    assert f"{path} cannot be written" in said.getvalue()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys):
    for place in (tmp_path, tmp_path / "gone" / "a.png"):
        save(place)
        assert str(place) in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_losses_of_a_log_that_lacks_one(tmp_path: Path, capsys):
    plot_losses(tmp_path / "loss.png", LINES, ["loss", "absent"])
    assert "no picture" in capsys.readouterr().out and not list(tmp_path.iterdir())


# --- stage 2 --------------------------------------------------------------------------------------

def report(folder: Path, moca: Moca, names: list[str], world: World = MAIN) -> dict | None:
    """The report on three pairs of each task; its scores."""
    data = folder / "pairs.jsonl"
    rows = []
    for name in names:
        for number in range(3):
            query, positive = {"text": f"a question {number}"}, {"text": f"an answer {number}"}
            rows.append({"task": name, "kind": "text-only", "query": query, "positive": positive})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "run"
    output.mkdir(exist_ok=True)
    flags = Namespace(output=str(output), data=str(data), held_out=None, on_error="stop")
    stage2.write_report(flags, world, moca, LINES)
    scores = output / "scores.json"
    return json.loads(scores.read_text(encoding="ascii")) if scores.exists() else None


@pytest.mark.parametrize("half", [0, 1])
def test_no_name_of_a_task_costs_scores_or_pictures(tmp_path: Path, moca: Moca, half: int, capsys):
    names = list(TEXTS.values())[half::2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = report(tmp_path, moca, names)
    assert list(scores["tasks"]) == names and len(names) <= stage2.SHOWN
    for file in ("loss.png", "retrieval.png", "similarity.png"):
        assert is_picture(tmp_path / "run" / file)
    said = capsys.readouterr().out
    assert said.count("\n") == len(names) + 2 and "no picture" not in said
    assert "\x1b" not in said and "\x00" not in said


def test_many_tasks_are_all_scored_and_not_all_drawn(tmp_path: Path, moca: Moca):
    names = [f"task {number}" for number in range(60)]
    scores = report(tmp_path, moca, names)
    assert list(scores["tasks"]) == names
    for file in ("retrieval.png", "similarity.png"):
        with Image.open(tmp_path / "run" / file) as image:
            assert max(image.size) < 5000


def test_scores_come_before_pictures(tmp_path: Path, moca: Moca, monkeypatch, capsys):
    """Each picture fails in its own way; none keeps the next from being drawn."""
    drawn = []

    def fail(axis: object, record: Record, title: str) -> None:
        drawn.append((tmp_path / "run" / "scores.json").exists())
        raise RuntimeError("no font")

    monkeypatch.setattr(stage2, "show_record", fail)
    assert report(tmp_path, moca, ["one"])["tasks"]["one"]["queries"] == 3
    assert drawn == [True]
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "loss.png", "scores.json", "similarity.png"]
    said = capsys.readouterr().out
    assert said.count("no picture") == 1 and "retrieval.png: no font" in said


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(99)])
def test_a_bad_pair_costs_its_task_alone(tmp_path: Path, moca: Moca, content: bytes, capsys):
    """What stands before it and behind it is scored and drawn."""
    (tmp_path / "a.png").write_bytes(content)
    bad = {"text": "<|vision_start|><|image_pad|><|vision_end|>", "images": ["a.png"]}
    rows = [{"task": name, "kind": "image-text", "query": query, "positive": {"text": "b"}}
            for name, query in (("one", {"text": "a"}), ("two\n", bad), ("three", {"text": "c"}))]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run").mkdir()
    flags = Namespace(output=str(tmp_path / "run"), data=str(data), held_out=None, on_error="stop")
    stage2.write_report(flags, MAIN, moca, LINES)
    assert list(json.loads((tmp_path / "run" / "scores.json").read_text())["tasks"]) == [
        "one", "three"]
    said = capsys.readouterr().out
    assert said.count("no report on two\\n: ") == 1 and f"{data}:2 query" in said
    assert is_picture(tmp_path / "run" / "retrieval.png")


def test_other_ranks_write_nothing(tmp_path: Path, moca: Moca, capsys):
    assert report(tmp_path, moca, ["one"], OTHER) is None
    assert not list((tmp_path / "run").iterdir()) and capsys.readouterr().out == ""


def test_a_large_picture_is_drawn_small(tmp_path: Path):
    """And what the caller holds stays as it is. Its words stand below it, not on it."""
    large = Image.new("RGB", (3000, 2000))
    shown, below = [], []
    axis = SimpleNamespace(set=lambda **_: 0, set_title=lambda *_, **__: 0, imshow=shown.append,
                           set_xlabel=lambda text, **_: below.append(text))
    stage2.show_record(axis, Record("<|image_pad|>a page", [large]), "title")
    assert below == ["a page"]
    assert shown[0].size == (480, 320) and large.size == (3000, 2000)


# --- stage 1 --------------------------------------------------------------------------------------

class Unseen:
    """What would come next: nothing that holds an image."""

    def __init__(self, epoch: int) -> None:
        self.state = {"epoch": epoch}

    def __next__(self) -> SimpleNamespace:
        return SimpleNamespace(micro_batches=[[]])


@pytest.mark.parametrize(("epoch", "said"), [(0, "next, unseen"), (1, "next, seen before"),
                                             (7, "next, seen before")])
def test_the_report_says_whether_its_records_were_seen(tmp_path: Path, epoch: int, said: str,
                                                       capsys):
    flags = train_cpt.Flags(output=str(tmp_path))
    stage1.write_report(flags, MAIN, None, None, Unseen(epoch), LINES, False)
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["mae_loss, last tenth"] == 0.5


def test_restorations_are_drawn_by_the_main_rank_after_the_scores(tmp_path: Path, monkeypatch,
                                                                  capsys):
    """The model runs on all ranks, whatever becomes of the picture."""
    ran = []
    texts = ("$a $b", "[$] 文", "\x00" * 99)
    views = [[(np.zeros((28, 28, 3)), [(text, stage1.SEEN)]) for text in texts]] * 2
    record = SimpleNamespace(grids=[(1, 2, 2)])
    batch = SimpleNamespace(micro_batches=[[(0, record)]])
    monkeypatch.setattr(Unseen, "__next__", lambda _: batch)
    monkeypatch.setattr(stage1, "cross_modal_report", lambda *_, **__: {"words restored": None})
    monkeypatch.setattr(stage1, "restorations", lambda *_, **__: ran.append(1) or views)
    flags = train_cpt.Flags(output=str(tmp_path))  # all of them: a report may come to ask for more
    stage1.write_report(flags, OTHER, None, None, Unseen(0), LINES, False)
    assert ran == [1] and not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    stage1.write_report(flags, MAIN, None, None, Unseen(0), LINES, False)
    assert is_picture(tmp_path / "reconstruction.png") and is_picture(tmp_path / "loss.png")
    assert json.loads((tmp_path / "scores.json").read_text())["words restored"] is None


def test_restored_words_are_coloured_by_right_and_wrong(moca: Moca, monkeypatch):
    """And only they: what was given is in the colour of all texts."""
    model = ReconstructionModel(moca.model)
    record = moca.processor.encode(BuiltinRecords()[0])
    masked = mask_batch(moca.processor.pack([record]), moca.processor, 0.9, 0.5, [(0, 0)])
    count = len(masked.labels)
    assert count > 1 and len(masked.group_index)

    # The first masked word is restored, and no other.
    answers = (masked.labels + 1) % 100
    answers[0] = masked.labels[0]
    monkeypatch.setattr(stage1, "restore", lambda *_: (answers, masked.target * 0))
    (column,) = stage1.restorations(model, moca.processor, [(0, record)], 0.9, 0.5, 0, MAIN, False)
    given, restored, original = (words for _, words in column)
    colours = [colour for _, colour in restored if colour != stage1.SEEN]
    assert colours == [stage1.RIGHT] + [stage1.WRONG] * (count - 1)
    assert [word for word, _ in given].count(" _") == count
    for words in (given, original):
        assert {colour for _, colour in words} == {stage1.SEEN}


def test_words_below_a_picture_fill_at_most_four_lines():
    axis = Figure().subplots()
    words = [(" word\n", "#123456"), ("a" * 40, "#654321"), *[(" more", "#000000")] * 99]
    stage1.show_words(axis, words)
    texts = axis.texts
    assert [text.get_text() for text in texts[:2]] == ["word ", "a" * 30]
    assert [text.get_color() for text in texts[:2]] == ["#123456", "#654321"]
    places = [text.xyann for text in texts]
    assert len(places) == len(set(places)) and len({y for _, y in places}) == 4
    assert all(x >= 0 and y < 0 for x, y in places)


@pytest.mark.parametrize(("values", "expected"), [
    ([], None), ([1.0, 2.0], 1.5), ([1.0, math.nan], None), ([math.inf], None),
    ([True, False, False, True], 0.5)])
def test_no_mean_is_other_than_a_number(values: list, expected: float | None):
    assert mean(torch.tensor(values)) == expected


# --- a question's other right answers -------------------------------------------------------------

def vector(angle: float) -> np.ndarray:
    """A unit vector in the plane."""
    return np.array([math.cos(angle), math.sin(angle)], np.float32)


ANGLES = {"q": 0.0, "a": 0.3, "b": 0.2, "c": 0.1, "other": 1.0, "wrong": 0.25, "far": 3.0}


def ranking(*pairs: tuple[str, ...]) -> Ranking:
    """Of pairs (query, answer, hard negatives), by their angles."""
    made = [Pair(Record(query), Record(answer), [Record(text) for text in negatives])
            for query, answer, *negatives in pairs]
    return rank_pairs(made, lambda records: np.stack([vector(ANGLES[r.text]) for r in records]))


def test_other_right_answers_do_not_count_against_an_answer():
    """q finds c, b, a in this order, and nothing wrong before them."""
    made = ranking(("q", "a"), ("q", "b"), ("q", "c"), ("other", "far"))
    assert made.places().tolist() == [1, 1, 1, 4]
    scores = made.scores()
    assert scores["recall@1"] == 3 / 4 and scores["candidates"] == 4
    assert scores["chance recall@1"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 2 + 1 / 4) / 4)


def test_what_is_wrong_still_counts():
    """Another question's answer and a hard negative: before a, behind b."""
    assert ranking(("q", "a", "wrong"), ("q", "b"), ("other", "c")).places().tolist() == [
        3, 2, 4]


def test_a_right_answer_listed_as_a_negative_is_right():
    made = ranking(("q", "a", "b", "wrong"), ("q", "b", "a"))
    assert made.places().tolist() == [2, 1]
    assert made.also_right.tolist() == [[True, True, False]] * 2


def test_questions_are_equal_by_text_and_pictures():
    red, blue, again = (Image.new("RGB", (56, 56), colour) for colour in ("red", "blue", "red"))
    pairs = [Pair(Record("what?", [image]), Record(text), []) for image, text in
             ((red, "a"), (blue, "b"), (again, "c"))]
    made = rank_pairs(pairs, lambda records: np.ones((len(records), 2), np.float32))
    assert made.also_right.tolist() == [[True, False, True], [False, True, False],
                                        [True, False, True]]
    assert made.places().tolist() == [2, 3, 2]  # all ties


def test_ties_and_nan_still_count_as_wrong():
    pairs = [Pair(Record("q"), Record(text), []) for text in "ab"] + [
        Pair(Record("other"), Record("c"), [])]
    for value in (1.0, math.nan):
        made = rank_pairs(pairs, lambda records: np.full((len(records), 2), value, np.float32))
        assert made.places().tolist() == [2, 2, 3]
        assert made.scores()["recall@1"] == 0
