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

    def choose(self, names: list[str]) -> None:
        """Keep those of a file's columns that are read."""
        self.names = [name for name in names if name in (self.columns or names)]


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
        self.choose(table.column_names)
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
        self.choose(footer.schema.to_arrow_schema().names)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        if sum(group.num_rows for group in groups) != footer.num_rows:
            raise ValueError("its row groups have other numbers of rows than the file")

        # The pieces of each group; the last one is the rest. See `sources.pieces_of`.
        pieces = []
        for number, group in enumerate(groups):
            most = PIECE_BYTES * group.num_rows // max(group.total_byte_size, 1)
            most = min(max(most, 1), PIECE_ROWS)
            for start in range(0, group.num_rows, most):
                length = min(most, group.num_rows - start)
                pieces.append((length, number, group.total_byte_size))
        self.pieces = np.array(pieces, int).reshape(-1, 3).T
        self.ends = self.pieces[0].cumsum()

    def __len__(self) -> int:
        return int(self.pieces[0].sum())

    def find(self, index: int) -> tuple[pyarrow.RecordBatch, int]:
        """The piece that holds a row, and the row's place in it."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        first = int(np.searchsorted(self.pieces[1], self.pieces[1, number]))  # of its group

        # A group that is new, or was read beyond the piece, is read from its beginning.
        last, piece, rest = OPEN.pop((self, first), (number + 1, None, None))
        if last > number:
            last, rest = first - 1, self.open_group(first)
        while last < number:
            last, piece = next(rest)
            if len(piece) != self.pieces[0, last]:
                raise MemoryError(f"{self.pieces[0, last]} rows unpack to over 2 GB")
        OPEN[self, first] = last, piece, rest
        return piece, index - int(self.ends[number]) + len(piece)

    def open_group(self, first: int) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """The pieces of a group, the first of which has this number, with their numbers.
        Closes those of groups that were not used lately."""
        most, group, size = self.pieces[:, first].tolist()

        # At most what two bunches of `sources.side_by_side` may take.
        while sum(cost(rows.pieces[2, other]) for rows, other in OPEN) + cost(size) > 2:
            OPEN.popitem(last=False)

        # Neither memory nor threads for what is ahead.
        footer = read_footer(self.path, identity(self.path))
        file = ParquetFile(self.path, metadata=footer, buffer_size=2**20, pre_buffer=False)
        return enumerate(file.iter_batches(most, [group], self.names, use_threads=False), first)


# Groups that are being read, by file and first piece, the last used last: (the number of
# the piece last read, this piece, those to come).
OPEN: OrderedDict[tuple, tuple] = OrderedDict()
