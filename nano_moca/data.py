"""Records and pairs from files.

Stage 1 reads unlabelled records: JSON lines beside their images, or parquet with the
same two fields,

    {"text": "<|vision_start|><|image_pad|><|vision_end|> ...", "images": ["a.png"]}

from one file or a folder of files. Stage 2 reads pairs, from the same kinds of file,

    {"task": "name", "kind": "long-document" | "image-text" | "text-only",
     "query": {"text", "images"}, "positive": {...}, "negatives": [{...}, ...]}

In place of a path, "builtin" (with ":" and a split) names the built-in data.

A row is checked when it is asked for: stage 1 starts at once, stage 2 after it has read
each row's task. Nothing is guessed, and nothing in the data is executed. A row that cannot
be used is a MocaError that names its file and line. Images stay inside the folder of
their file.

Left out: streaming, from the hub or from archives. What a step takes of the data is
the subject of batches.py.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
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


@dataclass
class JsonLines(Sequence):
    """The rows of a JSON lines file; each is parsed when it is asked for."""

    path: Path

    def __post_init__(self) -> None:
        self.lines = self.path.read_bytes().splitlines()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Row:
        source = f"{self.path}:{index + 1}"
        try:
            return json.loads(self.lines[index]), self.path.parent, source
        except (ValueError, RecursionError) as error:
            raise MocaError(f"{source}: not JSON ({error}): correct or remove the line") from None


def parquet_rows(path: Path) -> list[Row]:
    """The rows of a parquet file, held in memory. They are read in any order, and
    parquet would decompress thousands of rows for each."""
    # An optional package: only these files need it.
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise MocaError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None

    rows = enumerate(read_table(path).to_pylist(), 1)
    return [(fields, path.parent, f"{path} row {number}") for number, fields in rows]


FILE_KINDS = {".jsonl": JsonLines, ".parquet": parquet_rows}


def open_rows(path: str | Path, pattern: str = "**/*") -> Sequence[Row]:
    """The rows of a .jsonl or .parquet file; or of all those in a folder whose names
    fit `pattern`, in the order of their names. MocaError if there are none."""
    path = Path(path)
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]

    # Other files, such as images, may lie among them.
    opened = []
    for file in files:
        if file.suffix not in FILE_KINDS:
            continue
        try:
            opened.append(FILE_KINDS[file.suffix](file))
        except (OSError, ValueError) as error:
            # Pyarrow's messages have several lines.
            reason = " ".join(str(error).split())
            raise MocaError(f"{file} cannot be read ({reason}): correct or replace it") from None

    # A run over nothing would only fail later.
    if sum(map(len, opened)) == 0:
        raise MocaError(f"{path} holds no records: give .jsonl or .parquet files, or their folder")
    return ConcatDataset(opened)


@dataclass
class LazyRows(Sequence):
    """Some rows of files as records or pairs: item i is make(*stored[numbers[i]]),
    built and checked when it is asked for."""

    stored: Sequence[Row]  # all rows, from `open_rows`
    numbers: Sequence[int]  # which of them
    make: Callable[[Any, Path, str], Record | Pair]
    kind: str = ""  # of a task

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record | Pair:
        return self.make(*self.stored[self.numbers[index]])


# --- records of stage 1 -----------------------------------------------------------


def make_record(fields: object, folder: Path | None, source: str) -> Record:
    """{"text", "images"} as a `Record`. Image paths are relative to `folder`, and
    stay in it. MocaError names the source.

    folder None: the caller is trusted, and gives images of any kind, from anywhere.
    """
    # A file may hold anything: look before using it.
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise MocaError(f'{source}: no "text": write {{"text": "...", "images": [...]}}')
    images = fields.get("images")
    images = [] if images is None else images
    if not isinstance(images, (list, tuple)):
        raise MocaError(f'{source}: "images" is not a list: write [image, ...]')

    # From Python code they may be PIL images, and paths to any place.
    if folder is None:
        return Record(fields["text"], list(images), source)
    folder = folder.resolve()
    found = [find_image(image, folder, source) for image in images]
    return Record(fields["text"], found, source)


def find_image(image: object, folder: Path, source: str) -> Path | bytes:
    """An entry of "images": its bytes, or its path inside `folder` (which is
    resolved already). MocaError if it is neither."""
    # The hub's image type: bytes, or a path.
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise MocaError(f"{source}: an image is neither path nor bytes: correct the entry")

    # Zeros and halves of surrogate pairs, which no file system takes, become "?".
    name = image.replace("\0", "?").encode(errors="replace").decode()

    # Links and ".." may lead anywhere: follow them first, then look.
    path = Path(os.path.normpath(os.path.realpath(folder / name)))
    if not path.is_relative_to(folder):
        raise MocaError(f"{source}: {path} is outside the folder {folder}: move it inside")
    return path


def load_records(path: str, seed: int) -> Sequence[Record]:
    """Stage 1's data, from a file or folder; or "builtin" with ":" and a split.

    seed: of the built-in data.
    """
    # What belongs to the built-in data is imported only for it.
    name, _, split = path.partition(":")
    if name == BUILTIN:
        from nano_moca.builtin.tasks import BuiltinRecords

        return BuiltinRecords(split or "train", seed)
    stored = open_rows(path)
    return LazyRows(stored, range(len(stored)), make_record)


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
    entries = fields.get("negatives") or []
    if not isinstance(entries, list):
        raise MocaError(f'{source}: "negatives" is not a list: write a list of records')

    # Each part is a record, and named in errors as this part of the row.
    query = make_record(fields.get("query"), folder, f"{source} query")
    positive = make_record(fields.get("positive"), folder, f"{source} positive")
    negatives = []
    for number, entry in enumerate(entries, 1):
        negatives.append(make_record(entry, folder, f"{source} negative {number}"))
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


def load_tasks(path: str, seed: int, unusable: list[MocaError] | None = None
               ) -> dict[str, Sequence[Pair]]:
    """Stage 2's data as {task: its pairs}, from a file or folder, or built in.

    unusable: a list that collects the errors of rows without task or kind; if it is
    None, the first such row raises. seed: of the built-in data.
    """
    # What belongs to the built-in data is imported only for it.
    name, _, split = path.partition(":")
    if name == BUILTIN:
        from nano_moca.builtin.tasks import builtin_tasks

        return builtin_tasks(split or "train", seed)

    # Each row is parsed once for its task, and again whenever its pair is asked for.
    stored = open_rows(path)
    tasks: dict[str, LazyRows] = {}
    for number in range(len(stored)):
        try:
            fields, _, source = stored[number]
            task, kind = read_task(fields, source)
            if task not in tasks:
                tasks[task] = LazyRows(stored, [], make_pair, kind)

            # A task has one kind.
            before = tasks[task].kind
            if before != kind:
                raise MocaError(f"{source}: task {task} is {kind} here and {before} before: "
                                "give each kind its own task")
            tasks[task].numbers.append(number)
        except MocaError as error:
            if unusable is None:
                raise
            unusable.append(error)
    return tasks
