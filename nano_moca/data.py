"""Records from files, and batches of a token budget.

Stage 1 reads unlabelled records: JSON lines beside their images, or parquet with the same two fields,

    {"text": "... <|vision_start|><|image_pad|><|vision_end|> ...", "images": ["a.png"]}

from one file or a folder of files, or the embedded default ("builtin"). A step's batch is a token budget over all
ranks. Every rank draws the same records in the same order from the seed, then takes its share by cost, so the number
of ranks changes nothing but the speed. Records that cannot be used stop the run, or are counted and listed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nano_moca.config import MocaError
from nano_moca.processor import Encoded, Processor, Record

BUILTIN = "builtin"


class JsonLines(Sequence):
    """The objects of a JSON lines file, read one at a time by their byte offsets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                lengths = [len(line) for line in file]
        except OSError as error:
            raise MocaError(f"{path} cannot be read ({error.strerror}): correct --data") from None
        self.offsets = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[dict, str]:
        where = f"{self.path}:{index + 1}"
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            line = file.read(self.offsets[index + 1] - self.offsets[index])
        try:
            return json.loads(line), where
        except ValueError as error:
            raise MocaError(f"{where}: the line is not JSON ({error}): correct or remove it") from None


class Parquet(Sequence):
    """The rows of a parquet file. A few row groups are kept in memory, so small groups read faster."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise MocaError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
        self.path = path
        try:
            self.file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise MocaError(f"{path} cannot be read as parquet ({error}): copy the file again") from None
        groups = range(self.file.num_row_groups)
        self.starts = np.cumsum([0, *(self.file.metadata.row_group(g).num_rows for g in groups)])
        self.group = lru_cache(maxsize=8)(self.file.read_row_group)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[dict, str]:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = self.group(group).slice(index - int(self.starts[group]), 1).to_pylist()[0]
        return row, f"{self.path} row {index + 1}"


def data_files(path: str | Path) -> list[Path]:
    """A .jsonl or .parquet file, or all of a folder, in the order of their names."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet"))
    if not files or not files[0].is_file() or files[0].suffix not in (".jsonl", ".parquet"):
        raise MocaError(f"--data {path} is no .jsonl or .parquet file and no folder of them")
    return files


def make_record(fields: object, folder: Path, where: str) -> Record:
    """{"text", "images"} as a `Record`. Image paths are relative to `folder` and must stay inside it."""
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise MocaError(f'{where}: no object with a "text": write {{"text": "...", "images": [...]}}')
    images = fields.get("images") or []
    if not isinstance(images, list):
        raise MocaError(f'{where}: "images" is no list: write a list of paths')
    folder, opened = folder.resolve(), []
    for image in images:
        if isinstance(image, dict):  # the hub's image type: bytes, or a path
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = (folder / image).resolve()
            if not image.is_relative_to(folder):
                raise MocaError(f"{where}: the image {image} leaves the folder {folder}: move it inside")
        elif not isinstance(image, bytes):
            raise MocaError(f"{where}: an image is neither a path nor bytes: correct the entry")
        opened.append(image)
    return Record(fields["text"], opened, where)


class Records(Sequence):
    """All records of stage 1's data as one sequence; an item is made, and checked, when it is asked for."""

    def __init__(self, path: str, seed: int) -> None:
        if path.startswith(BUILTIN):
            from nano_moca.builtin import Builtin  # stands beside the road: only the default needs it

            self.parts: list[Sequence] = [Builtin(path.partition(":")[2] or "train", seed)]
        else:
            self.parts = [JsonLines(f) if f.suffix == ".jsonl" else Parquet(f) for f in data_files(path)]
        self.starts = np.cumsum([0, *map(len, self.parts)])
        if not len(self):
            raise MocaError(f"--data {path} holds no record")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        fields, where = self.parts[part][index - int(self.starts[part])]
        if isinstance(fields, Record):
            return fields
        return make_record(fields, self.parts[part].path.parent, where)


@dataclass
class Draw:
    """One step's records for this rank: `parts` micro-batches of (key, encoded record)."""

    parts: list[list[tuple[int, Encoded]]]
    tokens: int  # of the whole step, over all ranks
    state: dict  # from which the next step can be drawn again


def deal(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Divide items into `parts` of nearly equal cost: the dearest first, each to the poorest part."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        poorest = totals.index(min(totals))
        shares[poorest].append(item)
        totals[poorest] += costs[item]
    return [sorted(share) for share in shares]


class TokenBatches:
    """Endless batches of at most `budget` tokens (at least one record a micro-batch), in an order by seed and epoch.

    Each epoch is one permutation; every record comes once, and a step may reach over its end. All ranks hold the
    same state and draw the same records; `rank` of `world` then takes its share of `accumulate` micro-batches.
    """

    def __init__(self, records: Sequence[Record], processor: Processor, budget: int, max_tokens: int, seed: int,
                 rank: int = 0, world: int = 1, accumulate: int = 1,
                 skipped: Callable[[str], None] | None = None) -> None:
        """skipped: called with the reason for each record left out; None stops the run instead."""
        self.records, self.processor, self.budget, self.max_tokens = records, processor, budget, max_tokens
        self.seed, self.rank, self.world, self.accumulate, self.skipped = seed, rank, world, accumulate, skipped
        self.state = {"epoch": 0, "next": 0, "usable": 0}
        self.order = lru_cache(maxsize=1)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(records)))

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        taken: list[tuple[int, Record, int, Encoded | None]] = []
        total, parts = 0, self.world * self.accumulate
        while True:
            state = dict(self.state)
            key, record, length, encoded = self._next_record()
            if len(taken) >= parts and total + length > self.budget:
                self.state = state  # it opens the next step
                break
            taken.append((key, record, length, encoded))
            total += length
        shares = deal([length for _, _, length, _ in taken], parts)[self.rank :: self.world]
        mine = [[(taken[i][0], taken[i][3] or self.processor.encode(taken[i][1], self.max_tokens)) for i in share]
                for share in shares]
        return Draw(mine, total, dict(self.state))

    def _next_record(self) -> tuple[int, Record, int, Encoded | None]:
        """The next usable record: its number in the run, itself, its tokens, and, if skipping, encoded."""
        while True:
            state = self.state
            if state["next"] == len(self.records):
                if not state["usable"]:
                    raise MocaError("the data holds no usable record: see skipped.jsonl")
                state = self.state = {"epoch": state["epoch"] + 1, "next": 0, "usable": 0}
            index = int(self.order(state["epoch"])[state["next"]])
            state["next"] += 1
            try:
                record = self.records[index]
                if self.skipped:  # every rank must leave out the same records: decode images here, on all
                    encoded = self.processor.encode(record, self.max_tokens)
                    length = len(encoded.tokens)
                else:
                    encoded, length = None, self.processor.measure(record, self.max_tokens)
            except MocaError as error:
                if not self.skipped:
                    raise
                self.skipped(str(error))
                continue
            state["usable"] += 1
            return state["epoch"] * len(self.records) + state["next"], record, length, encoded
