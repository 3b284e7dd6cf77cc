"""ViDoRe: find the right pages of documents, which are images, for a question.

    DATA/<task>/corpus/*     corpus-id, image
    DATA/<task>/queries/*    query-id, query, and in ViDoRe-v2 language
    DATA/<task>/qrels/*      query-id, corpus-id, score

An image is given as on the hub, or as a path from DATA/<task>. The score is nDCG@5: the
gains of the first five pages, each divided by log2(1 + place), over what the best order
would have. A page's gain is its relevance, as in trec_eval; if judged twice, the last one.

ViDoRe-v2 is four data sets, three of them in four languages. A task's score is the mean
of its languages' scores, as mteb has it; "<task>, english" is that of its English queries.
The paper counts these as tasks too, seven in all; mteb averages over four.
"""

from pathlib import Path
from typing import Any

import numpy as np

from nano_moca.batch import MARK
from nano_moca.data import make_record, open_rows
from nano_moca.files import MocaError
from nano_moca.report.ranking import Embed, Scores, cosines

CUTOFF = 5  # of nDCG@5
# ViDoRe-v2, by the hub's names; the first is in English only.
VERSION_2 = ["esg_reports_human_labeled_v2", "esg_reports_v2", "economics_reports_v2",
             "biomedical_lectures_v2"]
ENGLISH = ", english"  # after a task's name: its English queries


def score_folder(folder: Path, embed: Embed, flags: Any) -> Scores:
    """The scores of the task in a folder of --data; and in English, if that is one of
    its languages."""
    corpus = read_table(folder / "corpus", "corpus-id", "image")
    queries = read_table(folder / "queries", "query-id", "language", "query")
    relevance = read_relevance(folder, corpus, queries)

    # Where no page is right, no order of them is.
    questions, languages, gains = [], [], []
    for key, language, text, source in queries:
        if relevance[key].any():
            questions.append(make_record({"text": text}, folder, source))
            languages.append(language)
            gains.append(relevance[key])  # [C]
    if not questions:
        raise MocaError(f"{folder / 'qrels'} names no right page for any query: copy it again")

    # Pages stand beside a prompt, in the released code's spacing; questions alone.
    pages = []
    for _, image, source in corpus:
        item = {"text": f"{MARK}\n{flags.prompt}", "images": [image]}
        pages.append(make_record(item, folder, source))
    vectors = embed(pages + questions)  # [C + Q, D]
    similarities = cosines(vectors[len(pages) :], vectors[: len(pages)])  # [Q, C]

    # Each beside what chance would score, by language.
    scored: dict[str, list[tuple[float, float]]] = {}
    for language, row, gain in zip(languages, similarities, gains, strict=True):
        scored.setdefault(language, []).append((ndcg(row, gain), ndcg_by_chance(gain)))
    more = {"pages": len(pages), "queries without a right page": len(queries) - len(questions)}
    yield folder.name, means(scored) | more
    if len(scored) > 1 and "english" in scored:
        yield folder.name + ENGLISH, means({"english": scored["english"]})


def means(scored: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """The means over languages of the means over a language's queries.

    scored: of each language, what each of its queries scores, and what chance would.
    """
    by_language = [np.mean(scores, 0) for scores in scored.values()]  # [2] each
    score, chance = np.mean(by_language, 0)
    count = sum(map(len, scored.values()))
    return {"ndcg@5": float(score), "queries": count, "chance": float(chance)}


def meta_tasks(names: list[str]) -> dict[str, list[str]]:
    """The tasks over which a mean is reported, by the name of that mean. names: of the
    tasks that are there."""
    english = [name + ENGLISH for name in VERSION_2[1:]]
    whole = [name for name in names if not name.endswith(ENGLISH)]
    return {"ViDoRe-v2 as in the paper": VERSION_2 + english, "ViDoRe(v2) as in mteb": VERSION_2,
            "overall": whole}


def read_relevance(folder: Path, corpus: list, queries: list) -> dict[str, np.ndarray]:
    """{query-id: relevance of each page, [C]} of a task; 0 where nobody judged.

    corpus, queries: as `read_table` gives them.
    """
    # In the order of the corpus, which is the order of the vectors.
    columns = {page: column for column, (page, *_) in enumerate(corpus)}
    relevance = {query: np.zeros(len(corpus)) for query, *_ in queries}
    for part, ids, rows in ("corpus", columns, corpus), ("queries", relevance, queries):
        if len(ids) < len(rows):
            raise MocaError(f"{folder / part} has an id twice: copy it again")

    # A query or page that is not there: the folders are of two tasks, or incomplete.
    qrels = read_table(folder / "qrels", "query-id", "corpus-id", "score")
    for query, page, score, source in qrels:
        known = query in relevance and page in columns
        if not (known and isinstance(score, (int, float)) and 0 <= score < 1e6):
            raise MocaError(
                f"{source}: query {query[:40]} or page {page[:40]} is not among the task's, or its "
                "score is no relevance: copy its three folders again")
        relevance[query][columns[page]] = score
    return relevance


def read_table(folder: Path, *columns: str) -> list[tuple]:
    """The columns of all rows in a folder, all but the last as text, and each row's
    source."""
    table = []
    for fields, _, source in open_rows(folder, columns=columns):
        # A null says nothing, and few benchmarks say a language.
        row = {"language": ""}
        if isinstance(fields, dict):
            row |= {name: value for name, value in fields.items() if value is not None}

        # Ids may be numbers in one folder and texts in another.
        *names, value = map(row.get, columns)
        if value is None or not {str, int} >= set(map(type, names)):
            raise MocaError(f"{source}: a row needs {', '.join(columns)}, ids as texts or whole "
                            "numbers: copy the file again")
        table.append((*map(str, names), value, source))
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
