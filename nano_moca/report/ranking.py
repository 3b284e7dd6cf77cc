"""Retrieval scores: how far up a query finds its right answer among all candidates.

The scores must not reward a collapsed model. Ties and NaN count as wrong, so a model
that maps everything to one point scores 0 (the released code counts both as right),
and each score comes with what guessing would reach.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nano_moca.batch import Pair, Record
from nano_moca.data import record_key

Embed = Callable[[list[Record]], np.ndarray]  # records -> unit vectors [N, D] float32
Scores = Iterator[tuple[str, dict[str, float]]]  # of each task, as soon as it is done


@dataclass
class Ranking:
    """Q queries and the C candidates that each of them could find."""

    queries: list[Record]
    candidates: list[Record]  # each once, although several pairs may have it
    right: np.ndarray  # [Q] int64: the candidate that each query should find
    similarities: np.ndarray  # [Q, C] cosines

    def places(self) -> np.ndarray:
        """The place of each query's right answer, from 1: [Q] int64."""
        own = np.take_along_axis(self.similarities, self.right[:, None], 1)  # [Q, 1]
        below = self.similarities < own  # [Q, C]

        # All that is not below stands before it (or is it): ties and NaN count against
        # it, or a model that maps everything to one point would be perfect.
        return (~below).sum(1)

    def scores(self) -> dict[str, float]:
        """Recall@1 and @10, nDCG@5 with the one right answer, and what guessing would
        score."""
        places = self.places()
        count = len(self.candidates)
        gains = np.where(places <= 5, 1 / np.log2(1 + places), 0.0)  # [Q]
        return {
            "recall@1": float((places <= 1).mean()), "recall@10": float((places <= 10).mean()),
            "ndcg@5": float(gains.mean()), "queries": len(places), "candidates": count,
            "chance recall@1": 1 / count, "chance recall@10": min(1.0, 10 / count)}


def rank_pairs(pairs: Sequence[Pair], embed: Embed) -> Ranking:
    """Rank the positives and hard negatives of all pairs for each query."""
    # A candidate's index by its content: equal ones are one candidate.
    queries, candidates, right = [], [], []
    index_of: dict[tuple, int] = {}
    for pair in pairs:
        for record in (pair.positive, *pair.negatives):
            key = record_key(record)
            if key not in index_of:
                index_of[key] = len(candidates)
                candidates.append(record)
        queries.append(pair.query)
        right.append(index_of[record_key(pair.positive)])

    # All in one call, which can pack them by length.
    vectors = embed(queries + candidates)  # [Q + C, D]
    similarities = cosines(vectors[: len(queries)], vectors[len(queries) :])
    return Ranking(queries, candidates, np.array(right), similarities)


def cosines(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """[Q, C] of unit vectors [Q, D] and [C, D]."""
    # Not by @: BLAS sums the last rows of a matrix in another order than the others,
    # and equal vectors would no longer tie.
    return np.einsum("qd,cd->qc", queries, candidates)
