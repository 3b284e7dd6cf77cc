"""Pictures that cannot cost a run its scores.

A picture is the least of a run's results, and shows what the data says: names and words
in any script, with dollars and line ends. So nothing in a text is taken for a formula, and
whatever goes wrong with a picture is one printed line.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nano_moca.files import one_line, reason, replacing


@contextmanager
def picture(path: Path, size: tuple[float, float], dpi: int, layout: str = "tight"
            ) -> Iterator[Any]:
    """A matplotlib figure to draw on, of some size in inches. After the block it is
    saved as a PNG. Whatever is raised in the block or by saving is printed, and ends
    here."""
    import matplotlib
    from matplotlib.figure import Figure

    # A character that the font lacks is an empty box, without a warning for each.
    try:
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = Figure(size, dpi=dpi, layout=layout)
            yield figure
            with replacing(path) as fresh:
                figure.savefig(fresh, format="png")
    except Exception as error:
        print(one_line(f"no picture {path.name}: {reason(error)}"), flush=True)
