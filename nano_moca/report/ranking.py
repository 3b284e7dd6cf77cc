"""Retrieval scores: how far up a query finds its right answer among all candidates.

The scores must not reward a collapsed model. Ties and NaN count as wrong, so a model
that maps everything to one point scores 0 (the released code counts both as right),
and each score comes with what guessing would reach.

A query may stand in several pairs, each with another right answer, such as a picture with
five captions. Then each pair is scored as if the other right answers were not there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def also_right(self) -> np.ndarray:
        """Which candidates an equal query should find, [Q, C] bool: the same question
        may have several answers, each in a pair of its own."""
        answers: dict[tuple, list[int]] = {}
        keys = [record_key(query) for query in self.queries]
        for key, answer in zip(keys, self.right.tolist(), strict=True):
            answers.setdefault(key, []).append(answer)

        # A query's own answer is among them.
        also = np.zeros(self.similarities.shape, bool)
        for row, key in zip(also, keys, strict=True):
            row[answers[key]] = True
        return also

    def places(self) -> np.ndarray:
        """The place of each query's right answer, from 1, among all candidates but its
        other right answers: [Q] int64."""
        own = np.take_along_axis(self.similarities, self.right[:, None], 1)  # [Q, 1]
        below = self.similarities < own  # [Q, C]

        # All that is not below stands before it: ties and NaN count against it, or a
        # model that maps everything to one point would be perfect.
        before = ~below & ~self.also_right
        return 1 + before.sum(1)

    def scores(self, sizes: Sequence[int] = ()) -> dict[str, float]:
        """Recall@1 and @10, nDCG@5 with the one right answer, and what guessing would
        score.

        sizes: of several tasks one after the other, each of which is to count alike;
        none: every query counts alike.
        """
        places = self.places()
        ranked = 1 + (~self.also_right).sum(1)  # [Q]: its own answer, and all wrong ones
        gains = np.where(places <= 5, 1 / np.log2(1 + places), 0.0)  # [Q]
        figures = {
            "recall@1": places <= 1, "recall@10": places <= 10, "ndcg@5": gains,
            "chance recall@1": 1 / ranked, "chance recall@10": np.minimum(1, 10 / ranked)}

        weights = 1 / np.repeat(sizes, sizes) if sizes else None  # [Q]
        scores = {}
        for name, values in figures.items():
            scores[name] = float(np.average(values, weights=weights))
        return scores | {"queries": len(places), "candidates": len(self.candidates)}

    def twins_beaten(self, size: int) -> float:
        """How often the right answer is nearer than a twin's, where queries come in
        families of `size` twins. Guessing: 0.5."""
        own = np.take_along_axis(self.similarities, self.right[:, None], 1)  # [Q, 1]
        answers = self.right.reshape(-1, size).repeat(size, axis=0)  # [Q, size]: its family's
        beaten = np.take_along_axis(self.similarities, answers, 1) < own  # [Q, size]
        return float(beaten.sum() / (len(own) * (size - 1)))


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
