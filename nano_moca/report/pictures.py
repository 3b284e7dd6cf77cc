"""What cannot cost a run its scores: a picture, and a record that cannot be used.

A picture is the least of a run's results, and shows what the data says: names and words
in any script, with dollars and line ends. So nothing in a text is taken for a formula, and
whatever goes wrong with a picture, or with the records of a report, is one printed line.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nano_moca.distributed import World
from nano_moca.files import MocaError, one_line, reason, replacing


def picture(draw: Callable[..., None]) -> Callable[..., None]:
    """Makes of draw(figure, ...) a function of (path, ...), which saves the figure as a PNG.
    Whatever is raised by drawing or saving is printed, and ends there."""

    @functools.wraps(draw)
    def save(path: Path, *content: object) -> None:
        try:
            import matplotlib
            from matplotlib.figure import Figure

            # A character that the font lacks is an empty box, without a warning for each.
            with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure = Figure(dpi=110, layout="constrained")
                draw(figure, *content)
                with replacing(path) as fresh:
                    figure.savefig(fresh, format="png")
        except Exception as error:
            print(one_line(f"no picture {path.name}: {reason(error)}"), flush=True)

    return save


def panels(figure: Any, rows: int, columns: int, width: float, height: float) -> Any:
    """Axes [rows, columns] on a figure that grows with them; of each, inches."""
    figure.set_size_inches(columns * width, rows * height)
    return figure.subplots(rows, columns, squeeze=False)


@contextmanager
def report_on(what: str, world: World) -> Iterator[None]:
    """A part of a report: a record that cannot be used ends it with one line. (The model
    is saved already.)"""
    try:
        yield
    except MocaError as error:
        if world.main:
            print(f"no report on {one_line(what)}: {error}", flush=True)
