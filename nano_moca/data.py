"""Records and pairs from files, and the batches of both stages.

Stage 1 reads unlabelled records: JSON lines beside their images, or parquet with the same two
fields,

    {"text": "... <|vision_start|><|image_pad|><|vision_end|> ...", "images": ["a.png"]}

from one file or a folder of files, or the embedded default ("builtin"). A step's batch is a token
budget over all ranks. Every rank draws the same records in the same order from the seed, then takes
its share by cost, so the number of ranks changes nothing but the speed. Records that cannot be used
stop the run, or are counted and listed.

Stage 2 reads pairs, from the same kinds of file,

    {"task": "name", "kind": "long-document" | "image-text" | "text-only",
     "query": {"text", "images"}, "positive": {...}, "negatives": [{...}, ...]}

and a step's batch is a number of pairs of one task (MoCa, section 3.2): were tasks mixed, a query
could tell its positive from most others by the task alone. (The released code says task-aware too,
but its sampler is the trainer's own, which shuffles across tasks.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nano_moca.config import MocaError
from nano_moca.processor import Encoded, Processor, Record

BUILTIN = "builtin"
KINDS = ("long-document", "image-text", "text-only")


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
        index = range(len(self))[index]  # IndexError past the end, which is what ends a for loop
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        rows = self.group(group).slice(index - self.starts[group], 1)
        return rows.to_pylist()[0], f"{self.path} row {index + 1}"


FILE_KINDS = {".jsonl": JsonLines, ".parquet": Parquet}


def open_data(path: str | Path) -> list[Sequence]:
    """A .jsonl or .parquet file, or all of those in a folder, in the order of their names."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    opened = [FILE_KINDS[file.suffix](file) for file in files if file.suffix in FILE_KINDS]
    if not sum(map(len, opened)):
        raise MocaError(f"{path} holds no records: give .jsonl or .parquet files, or their folder")
    return opened


def make_record(fields: object, folder: Path, where: str) -> Record:
    """{"text", "images"} as a `Record`. Image paths are relative to `folder` and stay inside it."""
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise MocaError(f'{where}: no "text": write {{"text": "...", "images": [...]}}')
    images = fields.get("images") or []
    if not isinstance(images, list):
        raise MocaError(f'{where}: "images" is no list: write a list of paths')
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


class Rows(Sequence):
    """Lines of files as what `make` makes of them; each is made, and checked, when asked for."""

    def __init__(self, places: list[tuple[Sequence, int]], make: Callable) -> None:
        """places: (file, line) of each item."""
        self.places, self.make = places, make

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> object:
        part, line = self.places[index]
        fields, where = part[line]
        return self.make(fields, part.path.parent, where)


def load_records(path: str, seed: int) -> Sequence[Record]:
    """Stage 1's data, from a file or folder, or "builtin" with ":" and a split."""
    if path.partition(":")[0] == BUILTIN:
        from nano_moca.builtin import Builtin  # beside the road: only the default needs it

        return Builtin(path.partition(":")[2] or "train", seed)
    return Rows([(part, line) for part in open_data(path) for line in range(len(part))], make_record)


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
        raise MocaError(f'{where}: "negatives" is no list: write a list of records')
    query, positive = (make_record(fields.get(part), folder, f"{where} {part}")
                       for part in ("query", "positive"))
    return Pair(query, positive, [make_record(negative, folder, f"{where} negative {number}")
                                  for number, negative in enumerate(negatives, 1)])


class Task(Rows):
    """The pairs of one task, of one of the three kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__([], make_pair)
        self.kind = kind


def load_tasks(path: str, seed: int, unusable: list[str] | None = None) -> dict[str, Sequence]:
    """Stage 2's data: {task: its pairs}, from a file or folder or the embedded default.

    Every line says its task and kind; nothing is guessed. unusable: takes what is wrong with lines
    that do not (None: the first one is an error).
    """
    if path.partition(":")[0] == BUILTIN:
        from nano_moca.builtin import builtin_tasks  # beside the road

        return builtin_tasks(path.partition(":")[2] or "train", seed)
    tasks: dict[str, Task] = {}
    for part in open_data(path):
        for line in range(len(part)):
            try:
                fields, where = part[line]
                name, kind = (isinstance(fields, dict) and fields.get(key)
                              for key in ("task", "kind"))
                if not isinstance(name, str) or kind not in KINDS:
                    raise MocaError(f'{where}: no "task" with a name, or no "kind" among '
                                    f'{", ".join(KINDS)}: correct the line')
                if tasks.setdefault(name, Task(kind)).kind != kind:
                    raise MocaError(f"{where}: task {name} is {kind} here and {tasks[name].kind} "
                                    "before: give each kind its own task")
                tasks[name].places.append((part, line))
            except MocaError as error:
                if unusable is None:
                    raise
                unusable.append(str(error))
    return tasks


def record_key(record: Record) -> tuple:
    """Equal for records of equal text and images, whatever their source."""
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


class PairBatches:
    """Endless steps of `batch` pairs, each of one task, planned by seed alone.

    A task of p pairs has p // batch batches a pass: each pair comes once a pass, but for those of
    the last partial batch (others every time, as each pass is shuffled anew). An epoch has as many
    steps as all tasks have batches; a task's share of them is its size^alpha (in batches) among
    all, to the nearest step. So with alpha 1 an epoch is one pass of every task. With less, small
    tasks begin their next pass early and large ones finish theirs in a later epoch.
    """

    def __init__(self, tasks: dict[str, Sequence[Pair]], processor: Processor, batch: int,
                 max_tokens: int, hard_negatives: int, seed: int, alpha: float = 1.0,
                 rank: int = 0, world: int = 1, skipped: Path | None = None,
                 unusable: Sequence[str] = ()) -> None:
        """skipped: a file to list unusable pairs in (None: the first one stops the run), with what
        load_tasks found unusable."""
        for name, pairs in tasks.items():
            if len(pairs) < batch:
                raise MocaError(f"task {name} has {len(pairs)} pairs and a batch takes {batch}: "
                                "lower --batch, or add pairs")
        self.tasks, self.processor, self.batch, self.max_tokens = tasks, processor, batch, max_tokens
        self.hard_negatives, self.seed, self.rank, self.world = hard_negatives, seed, rank, world
        self.skipped, self.unusable = skipped, unusable
        self.state = {"step": 0, "usable": 0, "skipped": 0}  # usable: pairs of this epoch
        self.full = {name: len(pairs) // batch for name, pairs in tasks.items()}  # batches a pass
        self.steps = sum(self.full.values())  # of an epoch
        shares = np.array([full**alpha for full in self.full.values()])
        exact = self.steps * shares / shares.sum()
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: self.steps - counts.sum()]] += 1
        self.counts = dict(zip(tasks, counts.tolist(), strict=True))  # steps of each task an epoch
        self.plan = lru_cache(maxsize=2)(self.plan)

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

    def __iter__(self) -> Iterator[Contrast]:
        return self

    def __next__(self) -> Contrast:
        if self.unusable and not self.state["skipped"]:
            self._skip(self.unusable)
        pairs: list[tuple[Pair, list[Encoded]]] = []  # (pair, its records encoded)
        while not pairs:
            epoch, place = divmod(self.state["step"], self.steps)
            if not place and epoch and not self.state["usable"]:
                raise MocaError("no pair of the data can be used: skipped.jsonl says why")
            name, number = self.plan(epoch)[place]
            for index in self.members(name, number):
                try:
                    pairs.append(self._encode(self.tasks[name][index], number // self.full[name]))
                except MocaError as error:
                    if not self.skipped:
                        raise
                    self._skip([str(error)])
            usable = len(pairs) + (self.state["usable"] if place else 0)
            self.state |= {"step": self.state["step"] + 1, "usable": usable}
        costs = [sum(len(item.tokens) for item in items) for _, items in pairs]
        shares = deal(costs, self.world)
        mine = [pairs[i] for i in shares[self.rank]]
        items = [[items[0] for _, items in mine], [items[1] for _, items in mine],
                 [item for _, items in mine for item in items[2:]]]
        return Contrast(
            task=name, items=sum(items, []), mine=torch.tensor(shares[self.rank]),
            forbidden=self._forbidden([pair for pair, _ in pairs], shares[self.rank]),
            batch=len(pairs), spare=pairs[0][1][0], tokens=sum(costs), state=dict(self.state),
            largest=max(sum(len(pairs[i][1]) for i in share) for share in shares))

    def _encode(self, pair: Pair, turn: int) -> tuple[Pair, list[Encoded]]:
        """A pair with the hard negatives of this turn (each comes, if turns enough), as tokens."""
        have = len(pair.negatives)
        first = turn * self.hard_negatives
        chosen = [pair.negatives[(first + i) % have] for i in range(min(self.hard_negatives, have))]
        pair = Pair(pair.query, pair.positive, chosen)
        # all ranks have to skip the same pairs, so then each decodes all images
        decode = self.skipped is not None
        return pair, [self.processor.encode(record, self.max_tokens, decode)
                      for record in (pair.query, pair.positive, *chosen)]

    def _forbidden(self, pairs: list[Pair], mine: list[int]) -> Tensor:
        """[n, B + M]: positives that equal the query's own, and hard negatives that do or that are
        another query's."""
        keys = [record_key(pair.positive) for pair in pairs]  # B
        rows = []
        for i in mine:
            equal = [j != i and key == keys[i] for j, key in enumerate(keys)]
            owned = [j != i or record_key(negative) == keys[i]
                     for j in mine for negative in pairs[j].negatives]
            rows.append(equal + owned)
        return torch.tensor(rows, dtype=torch.bool).view(len(mine), -1)

    def _skip(self, reasons: Sequence[str]) -> None:
        """Count and list what cannot be used."""
        with open(self.skipped, "a") as file:
            for reason in reasons:
                self.state["skipped"] += 1
                line = {"count": self.state["skipped"], "reason": reason}
                file.write(json.dumps(line) + "\n")
