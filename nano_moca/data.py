"""Records from files, and batches of a token budget.

Stage 1 reads unlabelled records: JSON lines beside their images, or parquet with the same two
fields,

    {"text": "... <|vision_start|><|image_pad|><|vision_end|> ...", "images": ["a.png"]}

from one file or a folder of files, or the embedded default ("builtin"). A step's batch is a token
budget over all ranks. Every rank draws the same records in the same order from the seed, then takes
its share by cost, so the number of ranks changes nothing but the speed. Records that cannot be used
stop the run, or are counted and listed.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nano_moca.config import MocaError
from nano_moca.processor import Encoded, Processor, Record

BUILTIN = "builtin"


class JsonLines(Sequence):
    """The objects of a JSON lines file, each with its place; read one at a time, by byte offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.offsets = np.cumsum([0, *map(len, file)])
        except OSError as error:
            raise MocaError(f"{path} cannot be read ({error.strerror}): correct the path") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[object, str]:
        where = f"{self.path}:{index + 1}"
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            line = file.read(self.offsets[index + 1] - self.offsets[index])
        try:
            return json.loads(line), where
        except ValueError as error:
            raise MocaError(f"{where}: not JSON ({error}): correct or remove the line") from None


class Parquet(Sequence):
    """The rows of a parquet file, each with its place. Row groups last used stay in memory."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise MocaError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None
        self.path = path
        try:
            self.file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise MocaError(f"{path} cannot be read as parquet ({error}): copy it again") from None
        groups = range(self.file.num_row_groups)
        self.starts = np.cumsum([0, *(self.file.metadata.row_group(g).num_rows for g in groups)])
        self.group = lru_cache(maxsize=8)(self.file.read_row_group)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[object, str]:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        rows = self.group(group).slice(index - self.starts[group], 1)
        return rows.to_pylist()[0], f"{self.path} row {index + 1}"


def open_data(path: str | Path) -> list[Sequence]:
    """A .jsonl or .parquet file, or all of those in a folder, in the order of their names."""
    path, kinds = Path(path), {".jsonl": JsonLines, ".parquet": Parquet}
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    opened = [kinds[file.suffix](file) for file in files if file.suffix in kinds]
    if not sum(map(len, opened)):
        raise MocaError(f"{path} holds no records: give .jsonl or .parquet files, or their folder")
    return opened


def make_record(fields: object, folder: Path | None, where: str) -> Record:
    """{"text", "images"} as a `Record`. Image paths are relative to `folder` and stay inside it.

    folder None: the caller is trusted, and gives images of any kind, from anywhere.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise MocaError(f'{where}: no "text": write {{"text": "...", "images": [...]}}')
    images = fields.get("images") or []
    if not isinstance(images, (list, tuple)):
        raise MocaError(f'{where}: "images" is no list: write [image, ...]')
    if folder is None:
        return Record(fields["text"], list(images), where)
    folder, found = folder.resolve(), []
    for image in images:
        if isinstance(image, dict):  # the hub's image type: bytes, or a path
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = Path(os.path.normpath(os.path.realpath(folder / image.replace("\0", "?"))))
            if not image.is_relative_to(folder):
                raise MocaError(f"{where}: {image} is outside the folder {folder}: move it inside")
        elif not isinstance(image, bytes):
            raise MocaError(f"{where}: an image is neither path nor bytes: correct the entry")
        found.append(image)
    return Record(fields["text"], found, where)


class Records(Sequence):
    """All records of stage 1's data; each is made, and checked, when it is asked for."""

    def __init__(self, path: str, seed: int) -> None:
        self.builtin = path.partition(":")[0] == BUILTIN
        if self.builtin:
            from nano_moca.builtin import Builtin  # beside the road: only the default needs it

            self.parts: list[Sequence] = [Builtin(path.partition(":")[2] or "train", seed)]
        else:
            self.parts = open_data(path)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        item = self.parts[part][index - self.starts[part]]
        return item if self.builtin else make_record(item[0], self.parts[part].path.parent, item[1])


@dataclass
class Draw:
    """One step's records for this rank: micro-batches of (number in the run, encoded record)."""

    parts: list[list[tuple[int, Encoded]]]
    tokens: int  # of the whole step, over all ranks
    state: dict  # from which the next step is drawn


def deal(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Divide items into `parts` of nearly equal cost: the dearest first, each to the poorest."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(shares, key=lambda share: sum(costs[i] for i in share)).append(item)
    return [sorted(share) for share in shares]


class TokenBatches:
    """Endless batches of at most `budget` tokens (and at least one record a micro-batch).

    Each epoch is a permutation by seed and epoch in which every record comes once; a step may reach
    into the next. All ranks draw the same records; `rank` takes its share, in `accumulate` parts.
    """

    def __init__(self, records: Sequence[Record], processor: Processor, budget: int,
                 max_tokens: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1,
                 skipped: Path | None = None) -> None:
        """skipped: a file to list unusable records in; None: the first one stops the run."""
        self.records, self.processor, self.budget = records, processor, budget
        self.max_tokens, self.seed, self.skipped = max_tokens, seed, skipped
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.state = {"epoch": 0, "next": 0, "usable": 0, "skipped": 0}
        self.order = lru_cache(maxsize=1)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(records)))

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        taken: list[tuple[int, Encoded]] = []
        parts, total = self.world * self.accumulate, 0
        while True:
            number, item = self._peek()
            if len(taken) >= parts and total + len(item.tokens) > self.budget:
                break  # it opens the next step
            taken.append((number, item))
            total += len(item.tokens)
            self.state["next"] += 1
            self.state["usable"] += 1
        shares = deal([len(item.tokens) for _, item in taken], parts)[self.rank :: self.world]
        mine = [[taken[index] for index in share] for share in shares]
        return Draw(mine, total, dict(self.state))

    def _peek(self) -> tuple[int, Encoded]:
        """The next record that can be used, and its number in the run; it is not taken yet."""
        while True:
            if self.state["next"] == len(self.records):
                if not self.state["usable"]:
                    raise MocaError("no record of the data can be used: skipped.jsonl says why")
                self.state |= {"epoch": self.state["epoch"] + 1, "next": 0, "usable": 0}
            index = int(self.order(self.state["epoch"])[self.state["next"]])
            number = self.state["epoch"] * len(self.records) + self.state["next"]
            try:
                # all ranks have to skip the same records, so then each decodes all images
                decode = self.skipped is not None
                return number, self.processor.encode(self.records[index], self.max_tokens, decode)
            except MocaError as error:
                if not self.skipped:
                    raise
                self.state["next"] += 1
                self.state["skipped"] += 1
                with open(self.skipped, "a") as file:
                    line = {"count": self.state["skipped"], "reason": str(error)}
                    file.write(json.dumps(line) + "\n")
