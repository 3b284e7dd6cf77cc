"""Where rows come from: the files of data in a folder, a sample, rows in groups.

A data folder holds more than data, links, and places that may not be read. What is no
data is passed over by its name, pictures silently, other files in one line that counts
them; what may be data and cannot be read is an error.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from nano_moca.files import MocaError, one_line, reason, regular_file

NO_DATA = (".*", "~*", "cache-*.arrow")  # hidden; of an editor; what `datasets` computed
PICTURES = ".no_data"  # a file of this name: in its folder, and below, there is no data
LOGS = {"log.jsonl": b'{"step": ', "skipped.jsonl": b'{"count": '}  # how a run's begin
MEMORY = 2**27  # of the groups of rows that are read at the same time

# --- files and folders ------------------------------------------------------------


def find_files(path: Path, pattern: str, suffixes: Sequence[str], seen: set | None = None
               ) -> list[Path]:
    """A file; or the files of data in a folder and below whose paths from there fit
    `pattern` (its * stands for "/" too), in the order of their names. Links are followed,
    but no file comes twice, and none of those in `seen`. MocaError for what cannot be
    listed or read: it may hold data. What is neither data nor picture is counted, and a
    line says so."""

    def refuse(error: OSError) -> None:
        """What os.walk would pass over."""
        advice = "allow reading it, or move it away"
        raise MocaError(f"{error.filename} cannot be listed ({reason(error)}): {advice}")

    if not os.path.isdir(path):
        # load_records and load_tasks look for such a file only if more is asked.
        if path.name.partition(":")[0] == "builtin" and not path.exists():
            raise MocaError(f"{path}: the built-in data takes no --cap, and no other data "
                            "beside it: leave one of them out")
        return [regular_file(path)]
    seen = set() if seen is None else seen
    files = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        # A link may lead back to where it lies.
        over = identity(parent) in seen or PICTURES in names
        seen.add(identity(parent))
        folders[:] = [] if over else sorted(filter(is_data, folders))
        names = [] if over else sorted(filter(is_data, names))

        for name in names:
            file = Path(parent, name)
            if is_picture(name) or not fnmatchcase(os.path.relpath(file, path), pattern):
                continue

            # A link that leads nowhere may have been a folder: it is named as a file.
            if file.suffix.lower() in suffixes or not os.path.exists(file):
                if identity(regular_file(file)) not in seen and not is_log(file):
                    files.append(file)
                seen.add(identity(file))
            else:
                others[file.suffix or name] += 1
    if others:
        counts = [f"{count} {name}" for name, count in sorted(others.items())]
        tell(f"{path}: passed over: {', '.join(counts)}: only {', '.join(suffixes)} are read")
    return sorted(files)


@cache
def tell(line: str) -> None:
    """Print a line, but once, and by the main rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(one_line(line), flush=True)


def is_data(name: str) -> bool:
    """Whether a file or folder of this name is part of the data it lies in."""
    return not any(fnmatchcase(name, pattern) for pattern in NO_DATA)


def is_picture(name: str) -> bool:
    """Whether a file of this name is a picture: rows name those that they need."""
    return str(guess_type(name, strict=False)[0]).startswith("image/")


def is_log(file: Path) -> bool:
    """Whether a file is the log of a run, or its list of unusable records."""
    if file.name not in LOGS:
        return False
    with open(file, "rb") as opened:
        return opened.read(64).startswith(LOGS[file.name])


def identity(path: str | Path) -> tuple:
    """Equal for all paths to a file or folder, whatever links they take. (Some file
    systems give a number twice: hence size and time.)"""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def split_sources(path: str, flag: str = "--data") -> list[str]:
    """The paths in "a,b,c"; a path that exists is one, whatever is in its name."""
    sources = [path] if os.path.exists(path) else path.split(",")
    if "" in sources:
        raise MocaError(f"{flag}: an empty path: give a file, a folder, or several: a,b")

    # Nothing is read twice. (With "/" at its end, a folder begins what lies in it.)
    found = filter(os.path.exists, sources)
    places = sorted(os.path.join(os.path.realpath(source), "") for source in found)
    for outer, inner in zip(places, places[1:], strict=False):
        if inner.startswith(outer):
            raise MocaError(f"{flag}: {inner} is in {outer}: name it once")
    return sources


def fingerprint(file: Path) -> str:
    """A digest of a file's name, its size, and 64 parts of 4 KB spread over it."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name} {size}".encode(errors="surrogateescape"))
    with open(file, "rb") as opened:
        for place in np.linspace(0, max(0, size - 4096), 64, dtype=int):
            opened.seek(place)
            digest.update(opened.read(4096))
    return digest.hexdigest()


# --- rows in groups ---------------------------------------------------------------


def pieces_of(rows: Sequence) -> np.ndarray:
    """[3, pieces] int64: the pieces in which rows are best read, one after the other; of
    each its number of rows, its group, and the group's bytes. The pieces of a
    group are read in order, and those of several groups side by side."""
    if isinstance(rows, ConcatDataset):
        parts = []
        before = 0
        for part in rows.datasets:
            pieces = pieces_of(part) + [[0], [before], [0]]
            before = pieces[1].max(initial=before - 1) + 1
            parts.append(pieces)
        return np.concatenate(parts, 1)

    # Some of other rows: what is left of each piece.
    if hasattr(rows, "stored"):
        lengths, groups, sizes = pieces_of(rows.stored)
        lengths = np.diff(np.searchsorted(rows.numbers, lengths.cumsum()), prepend=0)
        return np.stack([lengths, groups, sizes])[:, lengths > 0]

    # Those that can be read in any order go with the others.
    if hasattr(rows, "pieces"):
        return rows.pieces
    lengths = np.diff(np.r_[0 : len(rows) : 1000, len(rows)])
    return np.stack([lengths, np.arange(len(lengths)), np.zeros(len(lengths), int)])


def cost(size: int | np.ndarray) -> float | np.ndarray:
    """The share of MEMORY that a group of `size` bytes takes: at least an eighth, so that
    no more files are open; at most all of it, for a larger one is read by pages."""
    return np.clip(size / MEMORY, 1 / 8, 1)


def side_by_side(rows: Sequence, generator: np.random.Generator) -> np.ndarray:
    """[N] int64, a random order of N rows in groups: the groups follow each other in
    random order, in bunches that fit into MEMORY; of a bunch come all first pieces, their
    rows shuffled, then all second ones, and so on."""
    lengths, groups, sizes = pieces_of(rows)
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    turns = np.arange(len(groups)) - first[groups]  # of a piece in its group

    order = generator.permutation(len(first))
    bunches = np.empty(len(first), int)
    bunches[order] = cost(sizes[first][order]).cumsum()
    windows = bunches[groups] * (turns.max() + 1) + turns
    return np.lexsort((generator.random(len(rows)), windows.repeat(lengths)))


def sample(rows: Any, cap: int | None, key: tuple[int, ...]) -> Any:
    """At most `cap` of some rows (data.LazyRows; None: all), in order: a random sample,
    which `key` and `cap` seed."""
    if cap is None:
        return rows
    generator = np.random.default_rng((*key, cap))
    chosen = np.arange(len(rows))

    # To read some rows of a group costs as much as all: take the first groups of a random
    # order that hold enough.
    if rows.grouped:
        lengths, groups, _ = pieces_of(rows)
        members = np.bincount(groups, lengths)
        order = generator.permutation(len(members))
        taken = order[: np.searchsorted(members[order].cumsum(), cap) + 1]
        chosen = np.flatnonzero(np.isin(groups, taken).repeat(lengths))
    chosen = np.sort(generator.choice(chosen, min(cap, len(chosen)), replace=False))
    return replace(rows, numbers=np.asarray(rows.numbers)[chosen])
