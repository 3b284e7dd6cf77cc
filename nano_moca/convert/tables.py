"""Rows of parquet and Arrow files, of which little is ever in memory.

An Arrow file is mapped: a row is read where it lies. A parquet file is compressed in row
groups, and a row costs all those before it in its group. So a group is read from its
beginning to its end, in pieces of some 32 MB, and of the groups last used the piece
last read is kept. Whoever takes rows in the order of `sources.side_by_side` reads each
piece once (thousands of rows per second); in random order there would be some tens.

How much a group takes is the writer's choice: pyarrow makes one page of up to 1,024
rows, which cannot be read in parts. So a group may take twice its unpacked size.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow.parquet import ParquetFile

from nano_moca.convert.sources import cost
from nano_moca.files import MocaError, reason

PIECE_BYTES = 2**25
PIECE_ROWS = 1024  # at most: of equal values a file holds, and counts, only one
# Raised for damaged content, for values that Python has no type for, for want of memory.
UNREADABLE = (pyarrow.ArrowException, OSError, ValueError, TypeError, ArithmeticError,
              LookupError, MemoryError, StopIteration)


@dataclass(eq=False)
class TableRows(Sequence):
    """What both kinds of file share. A row is {column: value}."""

    path: Path
    columns: Sequence[str] | None  # those that are read; None: all

    def __getitem__(self, index: int) -> tuple[dict, Path, str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = f"{self.path} row {index + 1}"
        try:
            table, place = self.find(index)
            fields = {name: table.column(name)[place].as_py() for name in self.names}
        except UNREADABLE as error:
            OPEN.clear()
            what = " ".join(reason(error).split())
            raise MocaError(f"{source} cannot be read ({what}): copy or write the file "
                            "again") from None
        return fields, self.path.parent, source

    def choose(self, names: Sequence[str]) -> list[str]:
        """Those of a file's columns that are read."""
        return [name for name in names if self.columns is None or name in self.columns]


@dataclass(eq=False)
class ArrowRows(TableRows):
    """The rows of an Arrow file as the `datasets` library keeps them (a stream), or with
    an index at its end."""

    def __post_init__(self) -> None:
        # The mapping stays when the file is closed: there may be many.
        with pyarrow.memory_map(str(self.path)) as file:
            indexed = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if indexed else pyarrow.ipc.open_stream(file)
            self.table = reader.read_all()
        self.names = self.choose(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def find(self, index: int) -> tuple[pyarrow.Table, int]:
        """The table that holds a row, and the row's place in it."""
        return self.table, index


@dataclass(eq=False)
class ParquetRows(TableRows):
    """The rows of a parquet file. Only its footer is read at first."""

    grouped = True

    def __post_init__(self) -> None:
        with ParquetFile(self.path) as file:
            footer = file.metadata
            self.names = self.choose(file.schema_arrow.names)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        rows = np.array([group.num_rows for group in groups], int)
        self.ends = rows.cumsum()

        # How many rows a piece has, in each group; and `pieces`: see `sources.pieces_of`.
        self.sizes = np.array([group.total_byte_size for group in groups], int)
        self.piece_rows = np.clip(PIECE_BYTES * rows // np.maximum(self.sizes, 1), 1, PIECE_ROWS)
        self.pieces = np.zeros((3, 0), int)
        for number, (count, most) in enumerate(zip(rows, self.piece_rows, strict=True)):
            lengths = np.diff(np.r_[0:count:most, count])
            same = np.full((2, len(lengths)), [[number], [self.sizes[number]]])
            self.pieces = np.concatenate([self.pieces, [lengths, *same]], 1)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def find(self, index: int) -> tuple[pyarrow.RecordBatch, int]:
        """The piece that holds a row, and the row's place in it."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[group - 1]) if group else 0
        number, place = divmod(index - before, int(self.piece_rows[group]))
        return open_group(self, group).piece(number), place


class OpenGroup:
    """A row group that is read from its beginning on. The last piece is kept."""

    def __init__(self, rows: ParquetRows, group: int) -> None:
        self.rows, self.group = rows, group
        self.lengths = rows.pieces[0, rows.pieces[1] == group]
        self.start()

    def start(self) -> None:
        """Go to the beginning."""
        # Neither memory nor threads for what is ahead.
        file = ParquetFile(self.rows.path, buffer_size=2**20, pre_buffer=False)
        self.batches = file.iter_batches(
            int(self.rows.piece_rows[self.group]), [self.group], self.rows.names, use_threads=False)
        self.number = -1

    def piece(self, number: int) -> pyarrow.RecordBatch:
        """The piece of this number, from 0."""
        if number < self.number:
            self.start()
        while self.number < number:
            self.last = next(self.batches)
            self.number += 1
            if len(self.last) != self.lengths[self.number]:
                raise MemoryError(f"{self.lengths[self.number]} rows unpack to over 2 GB")
        return self.last


OPEN: OrderedDict[tuple[ParquetRows, int], OpenGroup] = OrderedDict()  # the last used is last


def open_group(rows: ParquetRows, group: int) -> OpenGroup:
    """A group, as it was left if it was used lately."""
    key = (rows, group)
    if key not in OPEN:
        OPEN[key] = OpenGroup(rows, group)

        # At most what two bunches of `sources.side_by_side` may take.
        while sum(cost(rows.sizes[group]) for rows, group in OPEN) > 2:
            OPEN.popitem(last=False)
    OPEN.move_to_end(key)
    return OPEN[key]
