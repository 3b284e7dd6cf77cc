"""Records and pairs from files.

Stage 1 reads unlabelled records: JSON lines beside their images, or parquet and Arrow
files with the same two fields,

    {"text": "<|vision_start|><|image_pad|><|vision_end|> ...", "images": ["a.png"]}

from one file or a folder of files, or from several of them: "a,b,c". Stage 2 reads
pairs, from the same kinds of file,

    {"task": "name", "kind": "long-document" | "image-text" | "text-only",
     "query": {"text", "images"}, "positive": {...}, "negatives": [{...}, ...]}

In place of a path, "builtin" (with ":" and a split) names the built-in data.

No file is held in memory. A row is checked when it is asked for: stage 1 starts at
once, stage 2 after it has read each row's task. Nothing is guessed, and nothing in the
data is executed. A row that cannot be used is a MocaError that names its file and line.
How a file becomes rows is in convert/rows.py.
A path written in the data stays inside the folder of its file; links that lie in that
folder are the user's own, and followed.

Left out: streaming, from the hub or from archives (nano_moca.convert unpacks archives);
pictures that are equal under two paths count as two.
What a step takes of the data is the subject of batches.py.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import ConcatDataset

from nano_moca.batch import KINDS, Pair, Record
from nano_moca.files import MocaError

BUILTIN = "builtin"
Row = tuple[object, Path, str]  # (what is written, file's folder, source)


# --- rows -------------------------------------------------------------------------


class Joined(ConcatDataset):
    """Sequences end to end."""

    def __init__(self, parts: Iterable[Sequence]) -> None:
        super().__init__(parts)
        digests = "".join(getattr(part, "fingerprint", "") for part in self.datasets)
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()

        # Whether some are read by groups, since a single row costs a whole group:
        # see batches.shuffle.
        self.grouped = any(getattr(part, "grouped", False) for part in self.datasets)


def open_rows(path: str | Path, pattern: str = "*", columns: Sequence[str] | None = None,
              seen: set | None = None) -> Joined:
    """The rows of a .jsonl, .parquet or .arrow file; or of all those in a folder and
    below whose paths from there fit `pattern` (its * stands for "/" too), in the order
    of their names. MocaError if there are none, or if one cannot be read.

    columns: which of a parquet or Arrow file are read; None: all. seen: files that
    are left out, as they were read before; these are added.
    """
    # A folder may hold much else, and files are of three kinds.
    from nano_moca.convert.rows import FILE_KINDS, open_file
    from nano_moca.convert.sources import find_files

    files = find_files(Path(path), pattern, FILE_KINDS, seen)
    opened = [open_file(file, columns) for file in files]

    # A run over nothing would only fail later.
    if sum(map(len, opened)) == 0:
        raise MocaError(f"{path} holds no records: give {', '.join(FILE_KINDS)} files, or "
                        "their folder")
    return Joined(opened)


@dataclass
class LazyRows(Sequence):
    """Some rows of files as records or pairs: item i is make(*stored[numbers[i]]),
    built and checked when it is asked for."""

    stored: Sequence[Row]  # all rows, from `open_rows`
    numbers: Sequence[int]  # which of them, in order
    make: Callable[[Any, Path, str], Record | Pair]
    kind: str = ""  # of a task

    def __post_init__(self) -> None:
        self.fingerprint = self.stored.fingerprint
        self.grouped = self.stored.grouped

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record | Pair:
        return self.make(*self.stored[self.numbers[index]])


# --- records of stage 1 -----------------------------------------------------------


def make_record(fields: object, folder: Path | None, source: str) -> Record:
    """{"text", "images"} as a `Record`. Image paths are relative to `folder`, and do
    not leave it. MocaError names the source.

    folder None: the caller is trusted, and gives images of any kind, from anywhere.
    """
    # A file may hold anything: look before using it. ("image" would be lost silently.)
    usable = isinstance(fields, dict) and isinstance(fields.get("text"), str)
    if not usable or "image" in fields:
        raise MocaError(f'{source}: no "text", or "image" in place of "images": correct the item')
    images = fields.get("images")
    if not isinstance(images, (list, tuple, type(None))):
        raise MocaError(f'{source}: "images" is not a list: write [image, ...]')

    # From Python code they may be PIL images, and paths to any place.
    if folder is None:
        return Record(fields["text"], list(images or ()), source)
    folder = folder.resolve()
    found = [find_image(image, folder, source) for image in images or ()]
    return Record(fields["text"], found, source)


def find_image(image: object, folder: Path, source: str) -> Path | bytes:
    """An entry of "images": its bytes, or its path in `folder`. MocaError if it is
    neither, or if the path leads out of it by what is written."""
    # The hub's image type: bytes, or a path.
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise MocaError(f"{source}: an image is neither path nor bytes: correct the entry")

    # Zeros and halves of surrogate pairs, which no file system takes, become "?".
    name = image.replace("\0", "?").encode(errors="replace").decode()

    # Where links lead is the user's choice: only what is written has to stay inside.
    name = os.path.normpath(name)
    if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
        raise MocaError(f"{source}: {name} is outside the folder {folder}: move it inside")
    return folder / name


def load_records(path: str, seed: int, cap: int | None = None) -> Sequence[Record]:
    """Stage 1's data, from files or folders, "a,b"; or "builtin" with ":" and a split.

    seed: of the built-in data, and of the sample if cap is given: at most so many rows of
    each source, the same in every epoch.
    """
    # What belongs to the built-in data is imported only for it. It takes no cap.
    name, _, split = path.partition(":")
    if name == BUILTIN and cap is None:
        from nano_moca.builtin.tasks import BuiltinRecords

        return BuiltinRecords(split or "train", seed)
    from nano_moca.convert.sources import sample, split_sources

    parts = []
    seen: set = set()  # no file is read twice
    for number, source in enumerate(split_sources(path)):
        stored = open_rows(source, "*", ("text", "images"), seen)
        rows = LazyRows(stored, range(len(stored)), make_record)
        parts.append(sample(rows, cap, (seed, number)))
    return Joined(parts)


def record_key(record: Record) -> tuple:
    """Equal for records of the same text, and of images of the same path, bytes or
    pixels."""
    # Of a picture in memory, a digest stands for its pixels.
    keys = []
    for image in record.images:
        if isinstance(image, Image.Image):
            image = (image.size, hashlib.sha256(image.tobytes()).digest())
        keys.append(image)
    return record.text, *keys


# --- pairs of stage 2 -------------------------------------------------------------


def make_pair(fields: dict, folder: Path, source: str) -> Pair:
    """A row of stage 2's data as a `Pair`; MocaError names the row and its part."""
    entries = fields.get("negatives")
    if not isinstance(entries, (list, type(None))):
        raise MocaError(f'{source}: "negatives" is not a list: write a list of records')

    # Each part is a record, and named in errors as this part of the row.
    query = make_record(fields.get("query"), folder, f"{source} query")
    positive = make_record(fields.get("positive"), folder, f"{source} positive")
    negatives = [make_record(entry, folder, f"{source} negative {number}")
                 for number, entry in enumerate(entries or (), 1)]
    return Pair(query, positive, negatives)


def read_task(fields: object, source: str) -> tuple[str, str]:
    """The name and kind of the task that a row says it belongs to."""
    fields = fields if isinstance(fields, dict) else {}
    task = fields.get("task")
    kind = fields.get("kind")
    if not isinstance(task, str) or kind not in KINDS:
        raise MocaError(f'{source}: no "task" with a name, or no "kind" among '
                        f'{", ".join(KINDS)}: correct the line')
    return task, kind


def load_tasks(path: str, seed: int, unusable: list[MocaError] | None = None,
               cap: int | None = None) -> dict[str, Sequence[Pair]]:
    """Stage 2's data as {task: its pairs}, from files or folders, "a,b", or built in.

    unusable: a list that collects the errors of rows without task or kind; if it is
    None, the first such row raises. seed: of the built-in data, and of the sample if cap
    is given: at most so many pairs of each task, the same in every epoch.
    """
    # What belongs to the built-in data is imported only for it. It takes no cap.
    name, _, split = path.partition(":")
    if name == BUILTIN and cap is None:
        from nano_moca.builtin.tasks import builtin_tasks

        return builtin_tasks(split or "train", seed)

    from nano_moca.convert.sources import sample, split_sources

    # Each row is parsed once for its task, and again whenever its pair is asked for.
    columns = ("task", "kind", "query", "positive", "negatives")
    seen: set = set()  # no file is read twice
    parts = [open_rows(source, "*", columns, seen) for source in split_sources(path)]
    stored = Joined(parts)
    tasks: dict[str, LazyRows] = {}
    for number in range(len(stored)):
        try:
            fields, _, source = stored[number]
            task, kind = read_task(fields, source)
            rows = tasks.setdefault(task, LazyRows(stored, [], make_pair, kind))

            # A task has one kind.
            if rows.kind != kind:
                raise MocaError(f"{source}: task {task} is {kind} here and {rows.kind} before: "
                                "give each kind its own task")
            rows.numbers.append(number)
        except MocaError as error:
            if unusable is None:
                raise
            unusable.append(error)
    return {name: sample(task, cap, (seed, place))
            for place, (name, task) in enumerate(tasks.items())}
