"""The rows of one file: (what is written, the file's folder, the source that errors name).

JSON lines are read here, parquet and Arrow files in tables.py, which needs an optional
package. No file is held in memory: a row is read when it is asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nano_moca.convert.sources import fingerprint
from nano_moca.files import MocaError, reason

FILE_KINDS = (".jsonl", ".parquet", ".arrow")


@dataclass
class JsonLines(Sequence):
    """The rows of a JSON lines file. Where its lines end is kept; each is read and parsed
    when it is asked for. Blank lines at the file's edges hold nothing."""

    path: Path

    def __post_init__(self) -> None:
        # Read this way a byte is a character, and lines end as in any text file.
        with open(self.path, encoding="latin-1", newline="") as file:
            self.ends = np.fromiter(map(len, file), np.int64).cumsum()

        # "Utf-8-sig": a byte order mark is nothing, too.
        first, end = 0, len(self.ends)
        while first < end and not self.line(first).decode("utf-8-sig", "replace").strip():
            first += 1
        while first < end and not self.line(end - 1).decode("utf-8-sig", "replace").strip():
            end -= 1
        self.numbers = range(first, end)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[object, Path, str]:
        number = self.numbers[index]
        source = f"{self.path}:{number + 1}"
        try:
            fields = json.loads(self.line(number), object_pairs_hook=unique)
        except (OSError, ValueError, RecursionError) as error:
            raise MocaError(f"{source}: not JSON ({reason(error)}): correct or remove the line"
                            ) from None
        return fields, self.path.parent, source

    def line(self, number: int) -> bytes:
        """A line of the file, counted from 0."""
        start = self.ends[number - 1] if number else 0
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(self.ends[number] - start)


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. ValueError if a key comes twice: one of its values would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key comes twice")
    return fields


def open_file(file: Path, columns: Sequence[str] | None) -> Sequence:
    """The rows of a file, by its suffix. MocaError if it cannot be read."""
    # What needs an optional package is imported only for its files.
    kind = file.suffix.lower()
    try:
        if kind == ".jsonl":
            rows = JsonLines(file)
        else:
            from nano_moca.convert.tables import ArrowRows, ParquetRows

            rows = (ArrowRows if kind == ".arrow" else ParquetRows)(file, columns)
        rows.fingerprint = fingerprint(file)
    except ImportError:
        raise MocaError(f"{file}: reading it needs pyarrow: pip install pyarrow") from None
    # Pyarrow's errors are of many kinds, and their messages have several lines.
    except Exception as error:
        what = " ".join(reason(error).split())
        raise MocaError(f"{file} cannot be read ({what}): correct it, or give a file of "
                        f"{', '.join(FILE_KINDS)}") from None
    return rows
