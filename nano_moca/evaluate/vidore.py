"""ViDoRe: find the right pages of documents, which are images, for a question.

    DATA/<task>/corpus/*     corpus-id, image
    DATA/<task>/queries/*    query-id, query
    DATA/<task>/qrels/*      query-id, corpus-id, score

An image is given as on the hub, or as a path from DATA/<task>. The score is nDCG@5: the
gains of the first five pages, each divided by log2(1 + place), over what the best order
would have. A page's gain is its relevance, as in trec_eval.
"""

import argparse
from pathlib import Path

import numpy as np

from nano_moca.batch import MARK
from nano_moca.data import make_record, open_rows
from nano_moca.evaluate.mmeb import task_folders
from nano_moca.files import MocaError
from nano_moca.report.ranking import Embed, Scores, cosines

CUTOFF = 5  # of nDCG@5


def score_tasks(embed: Embed, args: argparse.Namespace) -> Scores:
    """The scores of all tasks in --data."""
    for folder in task_folders(args.data):
        corpus = read_table(folder / "corpus", "corpus-id", "image")
        queries = read_table(folder / "queries", "query-id", "query")
        relevance = read_relevance(folder, corpus, queries)

        # Where no page is right, no order of them is.
        questions, gains = [], []
        for key, text, source in queries:
            if relevance[key].any():
                questions.append(make_record({"text": text}, folder, source))
                gains.append(relevance[key])  # [C]
        if not questions:
            raise MocaError(f"{folder / 'qrels'} names no right page for any query: copy it again")

        # Pages stand beside a prompt, questions alone.
        pages = []
        for _, image, source in corpus:
            item = {"text": f"{MARK} {args.prompt}", "images": [image]}
            pages.append(make_record(item, folder, source))
        vectors = embed(pages + questions)  # [C + Q, D]
        similarities = cosines(vectors[len(pages) :], vectors[: len(pages)])  # [Q, C]

        # Each beside what chance would score.
        scores = list(map(ndcg, similarities, gains))
        chance = list(map(ndcg_by_chance, gains))
        yield folder.name, {
            "ndcg@5": float(np.mean(scores)), "queries": len(questions),
            "chance": float(np.mean(chance)), "pages": len(pages),
            "queries without a right page": len(queries) - len(questions)}


def read_relevance(folder: Path, corpus: list, queries: list) -> dict[str, np.ndarray]:
    """{query-id: relevance of each page, [C]} of a task; 0 where nobody judged.

    corpus, queries: as `read_table` gives them.
    """
    # In the order of the corpus, which is the order of the vectors.
    columns = {page: column for column, (page, *_) in enumerate(corpus)}
    relevance = {query: np.zeros(len(corpus)) for query, *_ in queries}
    if len(columns) < len(corpus):
        raise MocaError(f"{folder / 'corpus'} has a corpus-id twice: copy it again")

    # A query or page that is not there: the folders are of two tasks, or incomplete.
    qrels = read_table(folder / "qrels", "query-id", "corpus-id", "score")
    for query, page, score, source in qrels:
        known = query in relevance and page in columns
        if not (known and isinstance(score, (int, float)) and score >= 0):
            raise MocaError(
                f"{source}: query {query} or page {page} is not among the task's, or {score} is "
                "not a relevance: copy its three folders again")
        relevance[query][columns[page]] = score
    return relevance


def read_table(folder: Path, *columns: str) -> list[tuple]:
    """The columns of all rows in a folder, all but the last as text, and each row's
    source."""
    # Ids may be numbers in one folder and texts in another.
    table = []
    for fields, _, source in open_rows(folder):
        if not isinstance(fields, dict) or not fields.keys() >= set(columns):
            raise MocaError(f"{source}: a row needs {', '.join(columns)}: copy the file again")
        *ids, value = map(fields.get, columns)
        table.append((*map(str, ids), value, source))
    return table


def ndcg(similarities: np.ndarray, relevance: np.ndarray) -> float:
    """nDCG@5 of one query over [C] pages. Among equals, and among NaN, the worst comes
    first."""
    order = np.lexsort((relevance, -similarities))  # NaN last
    best = np.sort(relevance)[::-1]
    return discounted(relevance[order]) / discounted(best)


def ndcg_by_chance(relevance: np.ndarray) -> float:
    """What a random order of [C] pages scores on average."""
    expected = np.full(len(relevance), relevance.mean())  # at every place
    best = np.sort(relevance)[::-1]
    return discounted(expected) / discounted(best)


def discounted(gains: np.ndarray) -> float:
    """The sum of the first five of [C] gains, each divided by log2(1 + place)."""
    first = gains[:CUTOFF]
    return float((first / np.log2(np.arange(2, len(first) + 2))).sum())
