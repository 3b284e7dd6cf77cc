"""The pictures: slides are written as PNG and SVG, lessons are run for them, shapes in the journey
agree, and RESULTS.md's tables are those of ablations.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from measures import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "notebooks"))
import figures
import journey
import slides

RESULTS = json.loads((figures.FIGURES / "ablations.json").read_text())


def test_a_slide_is_written_as_png_and_svg(tmp_path: Path) -> None:
    slides.main(["9-reconstruction", "--out", str(tmp_path / "new")])
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "9-reconstruction.png", "9-reconstruction.svg"]
    with (Image.open(tmp_path / "new" / "9-reconstruction.png") as slide,
          Image.open(figures.FIGURES / "reconstruction.png") as picture):
        assert slide.width >= picture.width
        assert abs(slide.width / slide.height - picture.width / picture.height) < 0.02
    assert "<svg" in (tmp_path / "new" / "9-reconstruction.svg").read_text()


def lesson(folder: Path, *cells: str) -> None:
    """A notebook of these code cells."""
    content = {"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}
    (folder / "1_a.ipynb").write_text(json.dumps(content))


def test_a_slide_can_be_the_figure_of_a_cell(tmp_path: Path, monkeypatch) -> None:
    """The cells before it are run, once, and those after it are not."""
    monkeypatch.setattr(slides, "LESSONS", tmp_path)
    monkeypatch.setattr(slides, "SLIDES", {"one": slides.DrawnBy("plot(1"), "two":
                                           slides.DrawnBy("plot(2"),
                                           "none": slides.DrawnBy("runs")})
    monkeypatch.chdir(tmp_path)
    lesson(tmp_path, "import matplotlib.pyplot as plt\nruns = [0]", "runs[0] += 1",
           "plt.figure()\nplt.title(str(runs))\nplt.plot(1, 1)\nplt.show()",
           "plt.figure()\nplt.plot(2, 2)", "raise SystemExit")
    first, second = (slides.SLIDES[name]() for name in ("one", "two"))
    assert first.axes[0].get_title() == "[1]" and not second.axes[0].get_title()

    # What draws nothing, or is nowhere, is said, and costs no other slide.
    with pytest.raises(SystemExit):
        slides.main(["none", "one", "--out", str(tmp_path)])
    assert (tmp_path / "one.svg").exists() and not (tmp_path / "none.svg").exists()
    with pytest.raises(LookupError, match="nothing like it"):
        slides.lesson_with("nothing like it")


@pytest.mark.repository
@pytest.mark.parametrize("name", [name for name, draw in slides.SLIDES.items()
                                  if isinstance(draw, slides.DrawnBy)])
def test_a_lesson_draws_the_slide(name: str) -> None:
    """Some cell of a notebook holds the piece of code that the slide is found by."""
    assert slides.lesson_with(slides.SLIDES[name].code)


def test_no_slide_of_that_name(capsys) -> None:
    with pytest.raises(SystemExit):
        slides.main(["11-none"])
    assert "no slide 11-none" in capsys.readouterr().err


def test_a_letter_of_the_journey_is_one_number() -> None:
    """Within a stage; and what a glossary lacks is no letter."""
    for stage in (journey.stage_1(), journey.stage_2()):
        sizes: dict[str, int] = {}
        for met in stage.values():
            for letter, size in zip(met.letters.split(", ") if met.letters else (), met.shape,
                                    strict=True):
                assert sizes.setdefault(letter, size) == size, f"{met.name}: {letter} is {size}"
        assert sizes.get("4704", 4704) == 4704 and sizes.get("1176", 1176) == 1176
        if "J" in sizes:
            assert sizes["P"] == 4 * sizes["J"] and 0 < sizes["G"] < sizes["J"]
            assert 0 < sizes["R"] < sizes["T"]
        else:
            assert sizes["B + M"] > sizes["B"] and sizes["N"] == sizes["B"] + sizes["B + M"]
    assert journey.glossary("NT")["N"] == "records in a batch"


@pytest.mark.repository
def test_the_journey_is_still_drawn(tmp_path: Path) -> None:
    """What the code is now looks like the committed picture: no box or shape is of before."""
    journey.draw_journey().savefig(tmp_path / "journey.png", dpi=100)
    with (Image.open(tmp_path / "journey.png") as drawn,
          Image.open(figures.FIGURES / "journey.png") as committed):
        now, then = (np.asarray(picture.convert("L").resize((110, 111)), np.float32)
                     for picture in (drawn, committed))
    assert np.abs(now - then).max() < 40  # fonts and edges may differ a little


def test_the_tables_have_a_row_for_each_arm() -> None:
    arms = figures.arms_table(RESULTS).splitlines()
    assert len(arms) == 2 + len(RESULTS) + 1 and len({line.count("|") for line in arms}) == 1
    claims = figures.findings_table(RESULTS).splitlines()
    asked = [name for name, _ in figures.CLAIMS.values() if name in RESULTS]
    assert len(claims) == 2 + len(asked) > 2 and len({line.count("|") for line in claims}) == 1
    signs = figures.signs_table(RESULTS).splitlines()
    papers = [name for name in RESULTS if figures.ARMS[name].paper is not None]
    assert len(signs) == 2 + len(papers) and len({line.count("|") for line in signs}) == 1


@pytest.mark.parametrize(("full", "none", "verdict"), [
    ([0.5, 0.52], [0.1, 0.11], "shown"), ([0.1, 0.11], [0.5, 0.52], "the opposite"),
    ([0.5, 0.1], [0.2, 0.3], "not shown"), ([0.5], [0.1], "one run: a hint")])
def test_a_verdict_follows_from_the_runs(full: list, none: list, verdict: str) -> None:
    results = {}
    for name, values in (("full", full), ("none", none)):
        results[name] = {f"seed {seed}": {"tasks": {task: {"recall@10": value} for tasks, _ in
                                                    figures.COLUMNS.values() for task in tasks}}
                         for seed, value in enumerate(values)}
    rows = figures.findings_table(results).splitlines()[2:]
    assert rows and all(row.endswith(f" {verdict} |") for row in rows)


@pytest.mark.repository
def test_results_has_the_tables_as_measured() -> None:
    """`python notebooks/figures.py tables` would change nothing."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert figures.with_tables(text, RESULTS) == text
