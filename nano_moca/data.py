"""Records and pairs from files, and the batches of both stages.

Stage 1 reads unlabelled records: JSON lines beside their images, or parquet with the same two
fields,

    {"text": "... <|vision_start|><|image_pad|><|vision_end|> ...", "images": ["a.png"]}

from one file or a folder of files, or the built-in data ("builtin"). A step's batch is a token
budget over all ranks. Every rank draws the same records in the same order from the seed, then takes
its share by cost. So the number of ranks changes only the speed (as long as the token budget holds
a record for every micro-batch of every rank). Records that cannot be used stop the run, or are
counted and listed.

Stage 2 reads pairs, from the same kinds of file,

    {"task": "name", "kind": "long-document" | "image-text" | "text-only",
     "query": {"text", "images"}, "positive": {...}, "negatives": [{...}, ...]}

and a step's batch is a number of pairs of one task (MoCa, section 3.2): were tasks mixed, a query
could tell its positive from most others by the task alone. (The released code says task-aware too,
but its sampler is the trainer's own, which shuffles across tasks.)
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset

from nano_moca.config import MocaError
from nano_moca.processor import Encoded, Processor, Record

BUILTIN = "builtin"
KINDS = ("long-document", "image-text", "text-only")


@dataclass
class JsonLines(Sequence):
    """The objects of a JSON lines file, each as (object, the file's folder, where it stands); each
    is parsed when it is asked for."""

    path: Path

    def __post_init__(self) -> None:
        self.lines = self.path.read_bytes().splitlines()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[object, Path, str]:
        where = f"{self.path}:{index + 1}"
        try:
            return json.loads(self.lines[index]), self.path.parent, where
        except (ValueError, RecursionError) as error:
            raise MocaError(f"{where}: not JSON ({error}): correct or remove the line") from None


def parquet_rows(path: Path) -> list[tuple[object, Path, str]]:
    """The rows of a parquet file, likewise, all in memory: to read one of them a whole group would
    have to be unpacked, and they are read in any order."""
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise MocaError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None
    rows = read_table(path).to_pylist()
    return [(fields, path.parent, f"{path} row {row}") for row, fields in enumerate(rows, 1)]


FILE_KINDS = {".jsonl": JsonLines, ".parquet": parquet_rows}


def open_rows(path: str | Path, pattern: str = "**/*") -> Sequence[tuple[object, Path, str]]:
    """The rows of a .jsonl or .parquet file, or of all those in a folder whose names fit."""
    path = Path(path)
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    opened = []
    for file in (file for file in files if file.suffix in FILE_KINDS):
        try:
            opened.append(FILE_KINDS[file.suffix](file))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise MocaError(f"{file} cannot be read ({reason}): correct or replace it") from None
    if not sum(map(len, opened)):
        raise MocaError(f"{path} holds no records: give .jsonl or .parquet files, or their folder")
    return ConcatDataset(opened)


def make_record(fields: object, folder: Path | None, where: str) -> Record:
    """{"text", "images"} as a `Record`. Image paths are relative to `folder` and stay inside it.

    folder None: the caller is trusted, and gives images of any kind, from anywhere.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise MocaError(f'{where}: no "text": write {{"text": "...", "images": [...]}}')
    images = fields.get("images") or []
    if not isinstance(images, (list, tuple)):
        raise MocaError(f'{where}: "images" is not a list: write [image, ...]')
    if folder is None:
        return Record(fields["text"], list(images), where)
    folder, found = folder.resolve(), []
    for image in images:
        if isinstance(image, dict):  # the hub's image type: bytes, or a path
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = image.replace("\0", "?").encode(errors="replace").decode()  # any file system's
            image = Path(os.path.normpath(os.path.realpath(folder / image)))
            if not image.is_relative_to(folder):
                raise MocaError(f"{where}: {image} is outside the folder {folder}: move it inside")
        elif not isinstance(image, bytes):
            raise MocaError(f"{where}: an image is neither path nor bytes: correct the entry")
        found.append(image)
    return Record(fields["text"], found, where)


@dataclass
class Made(Sequence):
    """A lazy view of rows: item i is make(*rows[places[i]]), built and checked when indexed."""

    rows: Sequence
    places: Sequence[int]  # which rows
    make: Callable
    kind: str = ""  # of a task

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.make(*self.rows[self.places[index]])


def load_records(path: str, seed: int) -> Sequence[Record]:
    """Stage 1's data, from a file or folder, or "builtin" with ":" and a split."""
    if path.partition(":")[0] == BUILTIN:
        from nano_moca.builtin import Builtin  # only the built-in data needs it

        return Builtin(path.partition(":")[2] or "train", seed)
    rows = open_rows(path)
    return Made(rows, range(len(rows)), make_record)


@dataclass
class Draw:
    """One step's records for this rank: micro-batches of (number in the run, encoded record)."""

    parts: list[list[tuple[int, Encoded]]]
    tokens: int  # of the whole step, over all ranks
    state: dict  # from which the next step is drawn


def deal(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Split items into parts of nearly equal cost: costliest first, each to the cheapest part."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(shares, key=lambda share: sum(costs[i] for i in share)).append(item)
    return [sorted(share) for share in shares]


class Batches:
    """Base of both stages' batches: an endless iterator with a resumable position (`state`) and a
    list of skipped records."""

    skipped: Path | None  # lists what cannot be used; None: the first such record stops the run
    state: dict[str, int]  # all that the coming draws depend on, beside seed and data

    def skip(self, error: MocaError) -> None:
        """Count and list what cannot be used, or stop."""
        if not self.skipped:
            raise error
        self.state["skipped"] += 1
        with open(self.skipped, "a") as file:
            line = {"count": self.state["skipped"], "reason": str(error)}
            file.write(json.dumps(line) + "\n")


class TokenBatches(Batches):
    """Batches of at most `budget` tokens (and at least one record a micro-batch).

    Each epoch is a permutation by seed and epoch in which every record comes once; a step may reach
    into the next. All ranks draw the same records; `rank` takes its share, in `accumulate` parts.
    """

    def __init__(self, records: Sequence[Record], processor: Processor, budget: int,
                 max_tokens: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1,
                 skipped: Path | None = None) -> None:
        self.records, self.processor, self.budget = records, processor, budget
        self.max_tokens, self.seed, self.skipped = max_tokens, seed, skipped
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.state = {"epoch": 0, "next": 0, "usable": 0, "skipped": 0, "records": len(records)}
        self.order = lru_cache(maxsize=1)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(records)))

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
                self.skip(error)
                self.state["next"] += 1


# --- stage 2: pairs, tasks, and batches of one task -----------------------------------------------

@dataclass
class Pair:
    """A query, what it should find, and near misses that it should not (hard negatives)."""

    query: Record
    positive: Record
    negatives: list[Record]


def make_pair(fields: dict, folder: Path, where: str) -> Pair:
    """A line of stage 2's data as a `Pair`; MocaError names the line and the part of it."""
    negatives = fields.get("negatives") or []
    if not isinstance(negatives, list):
        raise MocaError(f'{where}: "negatives" is not a list: write a list of records')
    query, positive = (make_record(fields.get(part), folder, f"{where} {part}")
                       for part in ("query", "positive"))
    return Pair(query, positive, [make_record(negative, folder, f"{where} negative {number}")
                                  for number, negative in enumerate(negatives, 1)])


def load_tasks(path: str, seed: int, unusable: list[MocaError] | None = None
               ) -> dict[str, Sequence[Pair]]:
    """Stage 2's data: {task: its pairs}, from a file or folder, or the built-in tasks.

    Every row says its task and kind; nothing is guessed. unusable: a list that collects the errors
    of rows that do not; if it is None, the first such row raises.
    """
    if path.partition(":")[0] == BUILTIN:
        from nano_moca.builtin import builtin_tasks

        return builtin_tasks(path.partition(":")[2] or "train", seed)
    tasks, rows = {}, open_rows(path)
    for place in range(len(rows)):
        try:
            fields, _, where = rows[place]
            fields = fields if isinstance(fields, dict) else {}
            name, kind = fields.get("task"), fields.get("kind")
            if not isinstance(name, str) or kind not in KINDS:
                raise MocaError(f'{where}: no "task" with a name, or no "kind" among '
                                f'{", ".join(KINDS)}: correct the line')
            task = tasks.setdefault(name, Made(rows, [], make_pair, kind))
            if task.kind != kind:
                raise MocaError(f"{where}: task {name} is {kind} here and {task.kind} before: give "
                                "each kind its own task")
            task.places.append(place)
        except MocaError as error:
            if unusable is None:
                raise
            unusable.append(error)
    return tasks


def record_key(record: Record) -> tuple:
    """Equal for records of the same text, and of images of the same path, bytes or pixels."""
    return record.text, *(
        (image.size, hashlib.sha256(image.tobytes()).digest()) if isinstance(image, Image.Image)
        else image for image in record.images)


@dataclass
class Contrast:
    """One step of stage 2: B pairs over all ranks, n of them on this one, with M hard negatives."""

    task: str
    items: list[Encoded]  # this rank's records: n queries, n positives, M negatives
    mine: Tensor  # [n] int64: which of the B pairs are this rank's
    forbidden: Tensor  # [n, B + M] bool: candidates (positives, negatives) that a query may not see
    batch: int  # B
    largest: int  # the most records on any rank
    spare: Encoded  # for a rank that has fewer chunks than the others
    tokens: int  # of the whole step, over all ranks
    state: dict  # from which the next step is drawn

    def chunks(self, size: int) -> list[list[Encoded]]:
        """The items in order, in parts of at most `size` (0: in one). Ranks have equally many."""
        number = math.ceil(self.largest / size) if size else 1
        return [[self.items[i] for i in part]
                for part in np.array_split(np.arange(len(self.items)), number)]


class PairBatches(Batches):
    """Steps of `batch` pairs over all ranks, each step of one task, planned by seed alone.

    A task of p pairs has p // batch batches a pass: each pair comes once a pass, but for those of
    the last partial batch (others every time, as each pass is shuffled anew). An epoch has as many
    steps as all tasks have batches; a task's share of them is its size^alpha (in batches) among
    all, to the nearest step. So with alpha 1 an epoch is one pass of every task. With less, small
    tasks begin their next pass early and large ones finish theirs in a later epoch.
    """

    def __init__(self, tasks: dict[str, Sequence[Pair]], processor: Processor, batch: int,
                 max_tokens: int, hard_negatives: int, seed: int, alpha: float = 1.0,
                 rank: int = 0, world: int = 1, skipped: Path | None = None,
                 unusable: Sequence[MocaError] = ()) -> None:
        """unusable: what load_tasks found, to be listed with the rest."""
        for name, pairs in tasks.items():
            if len(pairs) < batch:
                raise MocaError(f"task {name} has {len(pairs)} pairs and a batch takes {batch}: "
                                "lower --batch, or add pairs")
        self.tasks, self.processor, self.batch, self.seed = tasks, processor, batch, seed
        self.max_tokens, self.hard_negatives = max_tokens, hard_negatives
        self.rank, self.world, self.skipped, self.unusable = rank, world, skipped, unusable
        records = sum(map(len, tasks.values()))
        self.state = {"step": 0, "usable": 0, "skipped": 0, "records": records}
        self.full = {name: len(pairs) // batch for name, pairs in tasks.items()}  # batches a pass
        self.steps = sum(self.full.values())  # of an epoch
        weights = np.array([*self.full.values()], float) ** alpha
        exact = self.steps * weights / weights.sum()
        counts = exact.astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: self.steps - counts.sum()]] += 1
        self.counts = dict(zip(tasks, counts.tolist(), strict=True))  # steps of each in an epoch

    def plan(self, epoch: int) -> list[tuple[str, int]]:
        """(task, which of the task's batches since the run began) for each step of an epoch."""
        batches = [(name, epoch * count + number) for name, count in self.counts.items()
                   for number in range(count)]
        order = np.random.default_rng((self.seed, epoch)).permutation(len(batches))
        return [batches[i] for i in order]

    def members(self, name: str, number: int) -> list[int]:
        """The pairs of a task's batch."""
        turn, slot = divmod(number, self.full[name])
        key = self.seed, list(self.tasks).index(name), turn
        order = np.random.default_rng(key).permutation(len(self.tasks[name]))
        return order[slot * self.batch : (slot + 1) * self.batch].tolist()

    def __next__(self) -> Contrast:
        if not self.state["step"]:
            for error in self.unusable:
                self.skip(error)
        pairs: list[tuple[Pair, list[Encoded]]] = []  # with its records encoded
        while not pairs:
            epoch, place = divmod(self.state["step"], self.steps)
            if epoch and not place and not self.state["usable"]:
                raise MocaError("no pair of the data can be used: skipped.jsonl says why")
            name, number = self.plan(epoch)[place]
            for index in self.members(name, number):
                try:
                    pairs.append(self._encode(self.tasks[name][index], number // self.full[name]))
                except MocaError as error:
                    self.skip(error)
            self.state["usable"] = len(pairs) + (self.state["usable"] if place else 0)
            self.state["step"] += 1
        costs = [sum(len(item.tokens) for item in items) for _, items in pairs]
        shares = deal(costs, self.world)
        mine = shares[self.rank]
        return Contrast(
            task=name, batch=len(pairs), mine=torch.tensor(mine, dtype=torch.int64),
            items=[*(pairs[i][1][0] for i in mine), *(pairs[i][1][1] for i in mine),
                   *(item for i in mine for item in pairs[i][1][2:])],
            forbidden=forbidden([pair for pair, _ in pairs], mine), spare=pairs[0][1][0],
            largest=max(sum(len(pairs[i][1]) for i in share) for share in shares),
            tokens=sum(costs), state=dict(self.state))

    def _encode(self, pair: Pair, turn: int) -> tuple[Pair, list[Encoded]]:
        """A pair with its hard negatives of this pass (they take turns), and all as tokens."""
        have, take = len(pair.negatives), min(self.hard_negatives, len(pair.negatives))
        chosen = [pair.negatives[(turn * take + i) % have] for i in range(take)]
        # all ranks have to skip the same pairs, so then each decodes all images
        return replace(pair, negatives=chosen), [
            self.processor.encode(record, self.max_tokens, self.skipped is not None)
            for record in (pair.query, pair.positive, *chosen)]


def forbidden(pairs: list[Pair], mine: list[int]) -> Tensor:
    """[n, B + M] bool, of the B positives and the M hard negatives of the pairs `mine`: those that
    equal the query's own positive, and hard negatives that are another query's."""
    keys = [record_key(pair.positive) for pair in pairs]  # B
    negatives = [(j, record_key(negative)) for j in mine for negative in pairs[j].negatives]  # M
    rows = [[j != i and key == keys[i] for j, key in enumerate(keys)]
            + [j != i or key == keys[i] for j, key in negatives] for i in mine]
    return torch.tensor(rows, dtype=torch.bool).view(len(mine), len(keys) + len(negatives))
