"""Rows of parquet and Arrow files, of which little is ever in memory.

An Arrow file is mapped: a row is read where it lies. A parquet file is compressed in row
groups, and a row costs all those before it in its group. So a group is read from its
beginning to its end, in pieces of some 32 MB, and of the groups last used the piece
last read is kept. Whoever takes rows in the order of `sources.side_by_side` reads each
piece once (thousands of rows per second); in random order there would be some tens.

How much a group takes is the writer's choice: pyarrow makes pages of up to 1,024 rows,
which cannot be read in parts. So a group may take twice its unpacked size. And an Arrow
file that was compressed (as Feather files are) is unpacked into memory as a whole.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow.parquet import FileMetaData, ParquetFile, read_metadata

from nano_moca.convert.sources import cost, identity
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
            row = table.slice(place, 1)
            row.validate(full=True)  # a damaged one might lead outside the memory
            fields = {name: row.column(name)[0].as_py() for name in self.names}
        except UNREADABLE as error:
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
            table = reader.read_all()
        self.names = self.choose(table.column_names)
        self.table = table.select(self.names)

    def __len__(self) -> int:
        return len(self.table)

    def find(self, index: int) -> tuple[pyarrow.Table, int]:
        """The table that holds a row, and the row's place in it."""
        return self.table, index


@lru_cache(8)
def read_footer(path: Path, identity: tuple) -> FileMetaData:
    """What a parquet file says of its row groups, which may be many; read again if its
    `sources.identity` is another."""
    return read_metadata(path)


@dataclass(eq=False)
class ParquetRows(TableRows):
    """The rows of a parquet file. Only its footer is read at first."""

    grouped = True

    def __post_init__(self) -> None:
        footer = read_footer(self.path, identity(self.path))
        self.names = self.choose(footer.schema.to_arrow_schema().names)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        rows = np.array([group.num_rows for group in groups], int)
        self.ends = rows.cumsum()

        # How many rows a piece has, in each group; and how many pieces a group.
        self.sizes = np.array([group.total_byte_size for group in groups], int)
        self.piece_rows = np.clip(PIECE_BYTES * rows // np.maximum(self.sizes, 1), 1, PIECE_ROWS)
        counts = -(-rows // self.piece_rows)  # rounded up

        # `pieces`: see `sources.pieces_of`. The last one of a group is the rest.
        which = np.arange(len(rows)).repeat(counts)
        turns = np.arange(len(which)) - (counts.cumsum() - counts)[which]
        rest = rows[which] - turns * self.piece_rows[which]
        self.pieces = np.stack([np.minimum(rest, self.piece_rows[which]), which, self.sizes[which]])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def find(self, index: int) -> tuple[pyarrow.RecordBatch, int]:
        """The piece that holds a row, and the row's place in it."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[group - 1]) if group else 0
        most = int(self.piece_rows[group])
        number, place = divmod(index - before, most)

        # A group that is new, or was read beyond the piece, is read from its beginning.
        last, piece, pieces = OPEN.pop((self, group), (number + 1, None, None))
        if last > number:
            last, pieces = -1, self.open_group(group)
        while last < number:
            last, piece = next(pieces)
            expected = min(most, self.ends[group] - before - last * most)
            if len(piece) != expected:
                raise MemoryError(f"{expected} rows unpack to over 2 GB")
        OPEN[self, group] = last, piece, pieces
        return piece, place

    def open_group(self, group: int) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """The pieces of a group, with their numbers. Closes those of groups that were not
        used lately."""
        # At most what two bunches of `sources.side_by_side` may take.
        while sum(cost(rows.sizes[other]) for rows, other in OPEN) + cost(self.sizes[group]) > 2:
            OPEN.popitem(last=False)

        # Neither memory nor threads for what is ahead.
        footer = read_footer(self.path, identity(self.path))
        file = ParquetFile(self.path, metadata=footer, buffer_size=2**20, pre_buffer=False)
        return enumerate(file.iter_batches(
            int(self.piece_rows[group]), [group], self.names, use_threads=False))


# Groups that are being read, the last used last: (the piece's number, it, those to come).
OPEN: OrderedDict[tuple, tuple] = OrderedDict()
