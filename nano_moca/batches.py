"""What each step trains on: the records of stage 1, the pairs of stage 2.

All ranks draw the same records in the same order; then each takes its share by cost. So
the number of ranks changes only the speed, as long as there is a record for each. What a
step draws follows from the seed and a small `state`, which a checkpoint keeps: a resumed
run goes on with the very next record. Records that cannot be used stop the run, or are
counted and listed.

To draw is to read texts and the sizes of images, on every rank. A rank decodes only
the images of its own share, in threads, while the model computes the step before.
So a step in work and the next one are in memory, and no more. If records are
skipped, all ranks skip the same (see skipping.py), and what is left is shared out
anew.

**Stage 1** (`TokenBatches`): a step takes records up to a budget of tokens.

1. An epoch is a permutation of all records, by seed and epoch (see `shuffle`).
2. A step takes the next records of it while they fit into the budget, and at least one
   per micro-batch; it may reach into the next epoch.
3. They are divided among ranks and micro-batches so that all have about the same work.

**Stage 2** (`PairBatches`): a step takes a number of pairs, all of one task (MoCa,
section 3.2). Were tasks mixed, a query could tell its positive from most others by
the task alone. (The released code says task-aware too, but it draws by its trainer's
default sampler, which shuffles across tasks: src/dataset.py:66-93,
src/trainer.py:10-18.)
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_moca.batch import EncodedRecord, Pair, Record, Sendable
from nano_moca.data import Joined, record_key
from nano_moca.files import MocaError
from nano_moca.processor import Processor
from nano_moca.skipping import Skipping


def prefetch(steps: Iterator, count: int) -> Iterator:
    """The next `count` steps, each made one ahead in a thread, while the model computes
    the last: two are in memory at a time."""
    thread = ThreadPoolExecutor(1)
    ahead = thread.submit(next, steps)
    for number in range(1, count + 1):
        step = ahead.result()
        if number < count:
            ahead = thread.submit(next, steps)
        yield step


def balance(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Split items into parts of nearly equal cost: the costliest first, each
    to the part that is cheapest so far. Returns the numbers of the items in
    each part, in order."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        cheapest = totals.index(min(totals))
        shares[cheapest].append(item)
        totals[cheapest] += costs[item]
    return [sorted(share) for share in shares]


def cut(records: Sequence[EncodedRecord], budget: int) -> list[list[EncodedRecord]]:
    """The records in order, in chunks of at most `budget` tokens or of one record; in one
    chunk if the budget is 0."""
    chunks: list[list[EncodedRecord]] = [[]]
    tokens = 0
    for record in records:
        tokens += len(record.tokens)
        if budget and chunks[-1] and tokens > budget:
            chunks.append([])
            tokens = len(record.tokens)
        chunks[-1].append(record)
    return chunks


def shuffle(records: Sequence, generator: np.random.Generator) -> np.ndarray:
    """[N] int64: a random order of N records. Those of parquet files, of which a single
    one costs many, come in groups, as convert/sources.py describes."""
    if not getattr(records, "grouped", False):
        return generator.permutation(len(records))
    from nano_moca.convert.sources import side_by_side

    return side_by_side(records, generator)


class Steps(Iterator):
    """What both stages do: decode the images of this rank's records, in threads; and with
    records that cannot be used, stop, or count and list.

    Of a stage's own fields it needs `processor`, `world_size`, `skipped` (the path
    of the list; None: the first such record stops the run) and `state` (all that
    the coming draws depend on, beside seed and data).
    """

    def __post_init__(self) -> None:
        # Ranks share the processors of their machine; one is for the model's own thread. A
        # thread decodes 17 pictures of 1024 x 768 a second: more than eight help no GPU.
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.threads = ThreadPoolExecutor(min(max(1, os.cpu_count() // local_ranks - 1), 8))

        # With --on-error skip, ranks tell each other what they could not decode.
        self.skipping = Skipping(self.skipped, self.world_size) if self.skipped else None

    def decode(self, own: dict[int, list[EncodedRecord]]) -> set[int]:
        """Decode this rank's items of a step: their numbers, and the records of each.

        Returns the numbers of those, on all ranks, that cannot be used.
        """
        # Beside each other; what comes out does not depend on which is done first.
        jobs = {number: self.threads.submit(self.processor.decode, records)
                for number, records in own.items()}
        failed: dict[int, MocaError] = {}
        for number, job in jobs.items():
            try:
                job.result()
            except MocaError as error:
                failed[number] = error

        # All ranks leave out, count and list the same.
        if self.skipping:
            failed = self.skipping.of_all_ranks(failed, self.state["skipped"])
        for number in sorted(failed):
            self.skip(failed[number])
        return set(failed)

    def skip(self, error: MocaError) -> None:
        """Count and list what cannot be used, or stop."""
        if not self.skipping:
            raise error
        self.state["skipped"] += 1
        self.skipping.add(self.state["skipped"], error)


# --- stage 1 --------------------------------------------------------------------------


@dataclass
class StepRecords:
    """One step's records for this rank, by micro-batch."""

    micro_batches: list[list[tuple[int, EncodedRecord]]]  # (number in the run, record)
    tokens: int  # of the whole step, over all ranks
    state: dict[str, Any]  # from which the next step is drawn


@dataclass
class TokenBatches(Steps):
    """Steps of at most `budget` tokens over all ranks (more only if there would be no
    record for each micro-batch): an endless iterator.

    An epoch brings every record once; a record's number in the run is epoch *
    records + its place in the epoch's permutation.
    """

    records: Sequence[Record]
    processor: Processor
    budget: int  # tokens per step over all ranks
    max_tokens: int  # of a record; longer texts are shortened
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1  # micro-batches per step on each rank
    skipped: Path | None = None
    state: dict[str, Any] | None = None  # where to go on; None: at the beginning

    def __post_init__(self) -> None:
        super().__post_init__()
        self.permutation = (-1, np.arange(0))  # (epoch, its order): made once per epoch
        if self.state is None:
            self.state = {"epoch": 0, "next": 0, "skipped": 0, "records": len(self.records),
                          "fingerprint": getattr(self.records, "fingerprint", "")}

    def __next__(self) -> StepRecords:
        part_count = self.world_size * self.accumulate
        taken: list[tuple[int, EncodedRecord]] = []  # (number in the run, record)
        lost = 0
        while True:
            self.fill(taken, part_count)

            # Divide them: of W * accumulate shares this rank takes every W-th.
            costs = [record.cost for _, record in taken]
            shares = balance(costs, part_count)[self.rank :: self.world_size]
            own = sum(shares, [])
            failed = self.decode({item: [taken[item][1]] for item in own})
            if not failed:
                break

            # What cannot be decoded makes room for the next records, if there can be any.
            taken = [taken[item] for item in range(len(taken)) if item not in failed]
            lost += len(failed)
            if not taken and lost >= len(self.records):
                raise MocaError(f"no record of the data can be used: {self.skipped} says why")

        micro_batches = []
        for share in shares:
            micro_batches.append([taken[item] for item in share])
        tokens = sum(len(record.tokens) for _, record in taken)
        return StepRecords(micro_batches, tokens, dict(self.state))

    def fill(self, taken: list[tuple[int, EncodedRecord]], least: int) -> None:
        """Add records to `taken` until the next one would exceed the budget, which then
        opens the next step; but `least` of them in any case."""
        tokens = sum(len(record.tokens) for _, record in taken)
        while True:
            number, record = self.next_usable()
            tokens += len(record.tokens)
            if len(taken) >= least and tokens > self.budget:
                return
            taken.append((number, record))
            self.state["next"] += 1

    def next_usable(self) -> tuple[int, EncodedRecord]:
        """The next record that can be used, as far as one sees without decoding it, and
        its number in the run; it is not taken yet."""
        for _ in range(len(self.records)):  # all of them once
            if self.state["next"] == len(self.records):
                self.state |= {"epoch": self.state["epoch"] + 1, "next": 0}
            epoch = self.state["epoch"]
            place = self.state["next"]
            index = int(self.order(epoch)[place])
            try:
                record = self.processor.encode(self.records[index], self.max_tokens)
                return epoch * len(self.records) + place, record
            except MocaError as error:
                self.skip(error)
                self.state["next"] += 1
        raise MocaError(f"no record of the data can be used: {self.skipped} says why")

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of all records in an epoch."""
        if self.permutation[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self.permutation = (epoch, shuffle(self.records, generator))
        return self.permutation[1]


# --- stage 2 --------------------------------------------------------------------------


@dataclass
class EncodedPair:
    """A pair, with the hard negatives that this step takes of it, and all as tokens."""

    pair: Pair
    records: list[EncodedRecord]  # the query, the positive, the negatives
    cost: int  # of all of them


@dataclass
class PairBatch(Sendable):
    """One step of stage 2: B pairs over all ranks, n of them on this one,
    with M hard negatives."""

    task: str
    records: list[EncodedRecord]  # this rank's: n queries, n positives, M negatives
    chunks: list[list[EncodedRecord]]  # the same; on all ranks as many, so some may be empty
    local_index: Tensor  # [n] int64: which of the B pairs are this rank's
    excluded: Tensor  # [n, B + M] bool: candidates that a query is not compared with
    batch: int  # B
    filler: EncodedRecord  # for a chunk without records: another rank needed more chunks
    tokens: int  # of the whole step, over all ranks
    state: dict[str, Any]  # from which the next step is drawn


@dataclass
class PairBatches(Steps):
    """Steps of `batch` pairs over all ranks, each of one task: an endless iterator.

    1. A *pass* of a task of p pairs has p // batch batches. Each pair comes once per pass,
       but for those of the last partial batch (others every time, as passes are shuffled).
    2. An *epoch* has as many steps as all tasks have batches in a pass.
    3. A task's share of them goes with its size^alpha (its size in batches). With alpha 1
       an epoch is one pass of every task. With less, small tasks begin their next pass
       early, and large ones finish theirs in a later epoch.
    4. The steps of an epoch are shuffled, by seed and epoch.
    """

    tasks: dict[str, Sequence[Pair]]
    processor: Processor
    batch: int  # B, over all ranks
    max_tokens: int  # of a record; longer texts are shortened
    hard_negatives: int  # at most so many per query
    seed: int
    alpha: float = 1.0
    chunk: int = 0  # tokens embedded at once; 0: all
    rank: int = 0
    world_size: int = 1
    skipped: Path | None = None
    unusable: Sequence[MocaError] = ()  # what load_tasks found, to be listed with the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, pairs in self.tasks.items():
            if len(pairs) < self.batch:
                raise MocaError(f"task {name} has {len(pairs)} pairs and a batch takes "
                                f"{self.batch}: lower --batch, or add pairs")
        pair_count = sum(len(pairs) for pairs in self.tasks.values())
        self.state = {"step": 0, "skipped": 0, "records": pair_count,
                      "fingerprint": Joined(self.tasks.values()).fingerprint}

        # How many batches each task has in a pass, and how many steps in an epoch.
        per_pass = [len(pairs) // self.batch for pairs in self.tasks.values()]
        self.batches_per_pass = dict(zip(self.tasks, per_pass, strict=True))
        self.steps = sum(per_pass)  # of an epoch
        weights = np.array(per_pass, float) ** self.alpha
        shares = largest_remainder(self.steps * weights / weights.sum(), self.steps)
        self.counts = dict(zip(self.tasks, shares, strict=True))

    def plan(self, epoch: int) -> list[tuple[str, int]]:
        """For each step of an epoch, the task, and which of its batches
        since the run began."""
        batches = []
        for name, count in self.counts.items():
            batches += [(name, number) for number in range(epoch * count, (epoch + 1) * count)]
        order = np.random.default_rng((self.seed, epoch)).permutation(len(batches))
        return [batches[step] for step in order]

    def members(self, name: str, number: int) -> list[int]:
        """Which pairs of a task are in its batch `number`."""
        task_pass, place = divmod(number, self.batches_per_pass[name])
        key = (self.seed, list(self.tasks).index(name), task_pass)
        order = shuffle(self.tasks[name], np.random.default_rng(key))
        return order[place * self.batch : (place + 1) * self.batch].tolist()

    def __next__(self) -> PairBatch:
        if not self.state["step"]:
            for error in self.unusable:
                self.skip(error)

        # The pairs of all ranks, without those that cannot be decoded on theirs. A step of
        # which no pair can be used is left out.
        first = self.state["step"]
        pairs: list[EncodedPair] = []
        while not pairs:
            if self.state["step"] == first + self.steps:
                raise MocaError(f"no pair of the data can be used: {self.skipped} says why")
            name, pairs = self.draw()
            self.state["step"] += 1
            own = balance([pair.cost for pair in pairs], self.world_size)[self.rank]
            failed = self.decode({item: pairs[item].records for item in own})
            pairs = [pairs[item] for item in range(len(pairs)) if item not in failed]

        # The records of each rank: queries, then positives, then all hard negatives.
        shares = balance([pair.cost for pair in pairs], self.world_size)
        by_rank: list[list[EncodedRecord]] = []
        tokens = 0
        for share in shares:
            queries = [pairs[item].records[0] for item in share]
            positives = [pairs[item].records[1] for item in share]
            by_rank.append(queries + positives)
            for item in share:
                by_rank[-1] += pairs[item].records[2:]
            tokens += sum(len(record.tokens) for record in by_rank[-1])

        # Another rank may need more chunks: the cheapest record stands in for an empty one.
        divided = [cut(records, self.chunk) for records in by_rank]
        chunks = divided[self.rank]
        chunks += [[]] * (max(map(len, divided)) - len(chunks))
        filler = min(sum(by_rank, []), key=lambda record: record.cost)
        return PairBatch(
            task=name, records=by_rank[self.rank], chunks=chunks,
            local_index=torch.tensor(shares[self.rank], dtype=torch.int64),
            excluded=excluded_candidates([pair.pair for pair in pairs], shares[self.rank]),
            batch=len(pairs), filler=filler, tokens=tokens, state=dict(self.state))

    def draw(self) -> tuple[str, list[EncodedPair]]:
        """The next step's task, and those of its pairs that can be used."""
        epoch, place = divmod(self.state["step"], self.steps)
        name, number = self.plan(epoch)[place]
        task_pass = number // self.batches_per_pass[name]

        pairs = []
        for index in self.members(name, number):
            try:
                pairs.append(self.encode(self.tasks[name][index], task_pass))
            except MocaError as error:
                self.skip(error)
        return name, pairs

    def encode(self, pair: Pair, task_pass: int) -> EncodedPair:
        """A pair as tokens, with the hard negatives of this pass: they take turns. (The
        released code always takes the first two: src/dataset.py:177-186.)"""
        available = len(pair.negatives)
        taken = min(self.hard_negatives, available)
        turns = range(task_pass * taken, (task_pass + 1) * taken)
        chosen = [pair.negatives[turn % available] for turn in turns]
        records = [self.processor.encode(record, self.max_tokens)
                   for record in (pair.query, pair.positive, *chosen)]
        cost = sum(record.cost for record in records)
        return EncodedPair(replace(pair, negatives=chosen), records, cost)


def largest_remainder(exact: np.ndarray, total: int) -> list[int]:
    """Whole numbers near `exact` that add up to `total`: all are rounded down, then
    those with the largest remainders get one more (the largest remainder method)."""
    counts = exact.astype(int)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts.tolist()


def excluded_candidates(pairs: list[Pair], local_index: list[int]) -> Tensor:
    """[n, B + M] bool: which candidates the queries of the pairs `local_index` [n]
    are not compared with.

    The candidates are the B positives and the M hard negatives of these n pairs.
    Excluded are other candidates that are a right answer as well: the positive of this
    pair, or of another one with an equal query; and the hard negatives of other queries.
    Only the pairs of this step are looked at, and images are equal by path, bytes or
    pixels (see `record_key`).
    """
    query_keys = [record_key(pair.query) for pair in pairs]  # B
    positive_keys = [record_key(pair.positive) for pair in pairs]  # B
    negative_keys = []  # M of (the pair it belongs to, key)
    for own in local_index:
        for negative in pairs[own].negatives:
            negative_keys.append((own, record_key(negative)))

    excluded = []
    for own in local_index:
        # Its right answers: those of all pairs with an equal query.
        answers = {key for query, key in zip(query_keys, positive_keys, strict=True)
                   if query == query_keys[own]}

        # Positives: those of other pairs that are right as well.
        for other, key in enumerate(positive_keys):
            excluded.append(other != own and key in answers)

        # Hard negatives: those of other queries, and any that is a right answer.
        for other, key in negative_keys:
            excluded.append(other != own or key in answers)
    candidates = len(positive_keys) + len(negative_keys)
    return torch.tensor(excluded, dtype=torch.bool).view(len(local_index), candidates)
