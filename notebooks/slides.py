"""Write ten pictures for a lecture, each as PNG and SVG, from the repository's root:

    python notebooks/slides.py [names] [--out FOLDER]

A slide is one line of SLIDES: its name, and a function that draws it. Most are drawn by the
lessons: `DrawnBy("staircase(")` finds the notebook with that piece of code, runs its cells up to
that one, and takes the figure. So a slide shows what the lesson shows, measured anew. Some lessons
train on their way: all ten take some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figures import FIGURES, ROOT, draw_search
from journey import draw_journey
from matplotlib.figure import Figure
from PIL import Image
from stages import both_stages

from nano_moca.ablate import plot

LESSONS = ROOT / "notebooks"
Draw = Callable[[], Figure]


def code_cells(path: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def lesson_with(code: str) -> tuple[Path, int]:
    """The notebook and the number of its code cell that hold a piece of code; the first one, if
    there are more. LookupError if there is none."""
    for path in sorted(LESSONS.glob("*.ipynb")):
        for number, cell in enumerate(code_cells(path)):
            if code in cell:
                return path, number
    raise LookupError(f"no cell of a notebook in {LESSONS.name}/ holds {code!r}")


class Lesson:
    """A notebook that is run cell by cell, in one namespace, and goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.cells = code_cells(path)
        self.done = 0
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.figures: dict[int, Figure] = {}  # the last figure of each cell that drew one

    def figure(self, number: int) -> Figure:
        """What cell `number` draws, after all cells before it."""
        os.chdir(ROOT)  # where the notebooks find their files
        while self.done <= number:
            plt.close("all")
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # such as that this window cannot be shown
                code = compile(self.cells[self.done], f"cell {self.done}", "exec")
                exec(code, self.names)  # noqa: S102 (our own lessons)
            if plt.get_fignums():
                self.figures[self.done] = plt.figure(plt.get_fignums()[-1])
            self.done += 1
        if number not in self.figures:
            raise LookupError(f"code cell {number} draws nothing: {self.cells[number][:60]!r}")
        return self.figures[number]


lesson = cache(Lesson)  # each is run once, whatever number of slides it gives


@dataclass
class DrawnBy:
    """The figure of the notebook cell that holds this piece of code."""

    code: str

    def __call__(self) -> Figure:
        path, number = lesson_with(self.code)
        return lesson(path).figure(number)


@dataclass
class Picture:
    """A picture that is there already; in an SVG its pixels are embedded."""

    name: str

    def __call__(self) -> Figure:
        pixels = Image.open(FIGURES / self.name).convert("RGB")
        figure = plt.figure(figsize=(pixels.width / 100, pixels.height / 100))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(pixels)
        axis.axis("off")
        return figure


def ablations() -> Figure:
    """As `python -m nano_moca.ablate` draws them."""
    results = json.loads((FIGURES / "ablations.json").read_text(encoding="utf-8"))
    figure = Figure(layout="constrained")
    plot.__wrapped__(figure, results)
    return figure


SLIDES: dict[str, Draw] = {
    "1-stages": both_stages,
    "2-journey": draw_journey,
    "3-attention": DrawnBy("who_sees_whom("),
    "4-staircase": DrawnBy("staircase("),
    "5-fused-loss": DrawnBy("memory_figure("),
    "6-temperature": DrawnBy("draw_temperatures("),
    "7-gap": DrawnBy("draw_maps("),
    "8-search": draw_search,
    "9-reconstruction": Picture("reconstruction.png"),
    "10-ablations": ablations,
}


def write_slide(name: str, folder: Path) -> list[Path]:
    """Both files of a slide."""
    figure = SLIDES[name]()
    files = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=max(figure.dpi, 200))
    plt.close(figure)
    return files


def main(words: list[str] | None = None) -> None:
    """Write the slides that are asked for; a slide that cannot be drawn is said, and costs no
    other."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="names",
                        help=f"of {', '.join(SLIDES)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "slides", help="a folder")
    asked = parser.parse_args(words)
    for name in asked.names:
        if name not in SLIDES:
            parser.error(f"no slide {name}: there are {', '.join(SLIDES)}")

    folder = asked.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in asked.names or SLIDES:
        started = time.time()
        try:
            write_slide(name, folder)
        except Exception as error:  # noqa: BLE001 (whatever a lesson raises)
            failed.append(name)
            print(f"{name}: not drawn: {error!r}", flush=True)
            continue
        print(f"{name}: {time.time() - started:.0f} s", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
