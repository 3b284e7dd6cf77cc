"""What a trained model is for: vectors of a list of items, and the benchmarks' scores.

    python -m nano_moca.evaluate embed   --model DIR|HUB_ID --input items.jsonl --output vectors.npy
    python -m nano_moca.evaluate builtin --model DIR|HUB_ID --output scores.json
    python -m nano_moca.evaluate mmeb    --model DIR|HUB_ID --data DIR --output scores.json
    python -m nano_moca.evaluate vidore  --model DIR|HUB_ID --data DIR --output scores.json

`embed`: items.jsonl holds {"text": ..., "images": [...]} a line, the images beside it. vectors.npy
is float32 [lines, width] of unit length, in the file's order: the best match of a query is the item
with the largest dot product.

`builtin`: the built-in tasks, each query among all answers of its task and their
near twins. `mmeb` and `vidore` read the benchmarks' own files, parquet or JSON lines:

    mmeb    DATA/<task>/test*     qry_text, qry_img_path, tgt_text [list], tgt_img_path [list];
                                  the first candidate is right; images lie under --images
    vidore  DATA/<task>/corpus/*  corpus-id, image     DATA/<task>/queries/*  query-id, query
            DATA/<task>/qrels/*   query-id, corpus-id, score
                                  an image: the hub's structure, or a path from DATA/<task>

Ties and NaN count as wrong: a model that maps everything to one point scores 0. (The released code
counts both as right.) Every score comes with its chance level. Vectors are cached in
<output>.vectors under a key of model, settings and content, so an interrupted evaluation resumes,
and another model never reads them.
"""

import argparse
import hashlib
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nano_moca import MARK, Moca, MocaError, Record, load
from nano_moca.builtin import NEW, BuiltinTask, builtin_tasks
from nano_moca.config import write_json
from nano_moca.data import FILE_KINDS, Pair, make_record, open_rows, record_key
from nano_moca.processor import open_image
from nano_moca.trainer import Parser, run
from nano_moca.weights import find_checkpoint

AT_ONCE = 64  # items between two ticks of the bar; `Moca.embed` packs them up to its token budget
K = 5  # of nDCG@5
# MMEB's 36 tasks by kind: in distribution (trained on by those who train on MMEB) | out of it
MMEB = {
    "classification": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 | Place365 ImageNet-A "
                      "ImageNet-R ObjectNet Country211",
    "VQA": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W | ScienceQA VizWiz GQA TextVQA",
    "retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA | "
                 "OVEN FashionIQ EDIS Wiki-SS-NQ",
    "visual grounding": "MSCOCO | RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
Embed = Callable[[list[Record]], np.ndarray]  # records -> unit vectors [N, D] float32
Scores = Iterator[tuple[str, dict[str, float]]]  # each task's, as it is done


@dataclass
class Ranking:
    """Queries and everything they could find."""

    queries: list[Record]
    candidates: list[Record]  # each once, although several pairs may have it
    right: np.ndarray  # [Q] int64: the candidate that each query should find
    similarities: np.ndarray  # [Q, C] cosines

    def ranks(self) -> np.ndarray:
        """Each query's rank of its right answer, from 1: [Q] int64. Ties and NaN count against it,
        or else a model that maps everything to one point would be perfect."""
        own = np.take_along_axis(self.similarities, self.right[:, None], 1)  # [Q, 1]
        return (~(self.similarities < own)).sum(1)  # itself among them

    def scores(self) -> dict[str, float]:
        """Recall@1 and @10, nDCG@5 with the one right answer, and what guessing would score."""
        ranks, count = self.ranks(), len(self.candidates)
        gains = np.where(ranks <= 5, 1 / np.log2(1 + ranks), 0.0)
        return {"recall@1": float((ranks <= 1).mean()), "recall@10": float((ranks <= 10).mean()),
                "ndcg@5": float(gains.mean()), "queries": len(ranks), "candidates": count,
                "chance recall@1": 1 / count, "chance recall@10": min(1.0, 10 / count)}


def rank_pairs(pairs: Sequence[Pair], embed: Embed) -> Ranking:
    """Rank the positives and hard negatives of all pairs for each query."""
    pairs, places, candidates = list(pairs), {}, []
    for record in (r for pair in pairs for r in (pair.positive, *pair.negatives)):
        if places.setdefault(record_key(record), len(candidates)) == len(candidates):
            candidates.append(record)
    right = np.array([places[record_key(pair.positive)] for pair in pairs])
    queries = [pair.query for pair in pairs]
    vectors = embed(queries + candidates)  # [Q + C, D]
    similarities = cosines(vectors[: len(queries)], vectors[len(queries):])
    return Ranking(queries, candidates, right, similarities)


def cosines(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """[Q, C] of unit vectors [Q, D] and [C, D]. Not by @: BLAS sums the last rows of a matrix in
    another order than the others, and equal vectors would no longer tie."""
    return np.einsum("qd,cd->qc", queries, candidates)


def plot_retrieval(path: Path, rankings: dict[str, Ranking]) -> None:
    """One row per task: a query, and its five best answers from left to right; the right one is
    framed, if it is among them."""
    from matplotlib.figure import Figure

    figure = Figure((12.5, 2.2 * len(rankings)), layout="tight")
    axes = figure.subplots(len(rankings), 6, squeeze=False)
    for row, (name, ranking) in zip(axes, rankings.items(), strict=True):
        query = len(ranking.queries) // 2
        best = np.argsort(-ranking.similarities[query], kind="stable")[:5].tolist()
        show_record(row[0], ranking.queries[query], f"{name}: query")
        for axis, answer in zip(row[1:], best, strict=False):
            cosine = ranking.similarities[query, answer]
            show_record(axis, ranking.candidates[answer], f"cosine {cosine:.2f}")
            if answer == ranking.right[query]:
                for spine in axis.spines.values():
                    spine.set(edgecolor="#1a9c3e", linewidth=4)
        for axis in row[1 + len(best) :]:
            axis.axis("off")
    figure.savefig(path, dpi=100)


def show_record(axis: Any, record: Record, title: str) -> None:
    """A record's first image, its words in a box, or both."""
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    if record.images:
        axis.imshow(open_image(record.images[0], record.source, decode=True))
    words = "\n".join(textwrap.wrap(re.sub(r"<\|\w+\|>", "", record.text), 26)[:7])
    axis.text(0.5, 0.5, words, ha="center", va="center", fontsize=7, parse_math=False,
              transform=axis.transAxes)


def plot_similarity(path: Path, rankings: dict[str, Ranking], size: int = 16) -> None:
    """One panel per task: cosines of the first queries (rows) and their right answers (columns)."""
    from matplotlib.figure import Figure

    figure = Figure((2.6 * len(rankings) + 0.6, 3), layout="constrained")
    axes = figure.subplots(1, len(rankings), squeeze=False)
    for axis, (name, ranking) in zip(axes[0], rankings.items(), strict=True):
        drawn = axis.imshow(ranking.similarities[:size][:, ranking.right[:size]], vmin=-0.2, vmax=1)
        axis.set(title=name, xlabel="answers", xticks=[], yticks=[])
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("queries")
    figure.colorbar(drawn, ax=axes, label="cosine", shrink=0.8)
    figure.savefig(path, dpi=120)


def embed_records(moca: Moca, records: list[Record], kept: Path | None = None,
                  identity: str = "") -> np.ndarray:
    """Unit vectors [N, D] float32, in the order of the records.

    All records are checked before the first is embedded. They go through the model by length, the
    longest first: too little memory shows at once, and items of one length share an attention call.
    kept: a folder for the vectors of each part, to be found again by identity (of the model) and
    content.
    """
    lengths = [len(moca.processor.encode(record).tokens) for record in records]
    order = sorted(range(len(records)), key=lambda i: -lengths[i])
    parts = [order[first : first + AT_ONCE] for first in range(0, len(order), AT_ONCE)]
    vectors = np.empty((len(records), moca.model.config.width), np.float32)
    for part in tqdm(parts, unit_scale=AT_ONCE, unit="item", disable=None):
        items = [records[i] for i in part]
        file = kept / f"{content_hash(items, identity)}.npy" if kept else None
        if file and file.is_file():
            vectors[part] = np.load(file)
            continue
        vectors[part] = moca.embed(items).numpy()
        if file:
            save_vectors(file, vectors[part])
    return vectors


def content_hash(records: list[Record], identity: str) -> str:
    """A name for what a model makes of these records: another for another model or content."""
    files = [hashlib.sha256(image.read_bytes()).digest() for record in records
             for image in record.images if isinstance(image, Path)]
    content = identity, files, [record_key(record) for record in records]
    return hashlib.sha256(repr(content).encode(errors="surrogatepass")).hexdigest()[:32]


def save_vectors(path: Path, vectors: np.ndarray) -> None:
    """vectors [N, D]. The file gets its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "wb") as file:
        np.save(file, vectors)
    fresh.replace(path)


def make_embedder(args: argparse.Namespace) -> Embed:
    """The model that the flags ask for, with its vectors kept beside the output."""
    folder = find_checkpoint(args.model)
    moca = load(folder, args.device, getattr(torch, args.dtype) if args.dtype else None,
                args.attention, args.pooling, args.min_pixels, args.max_pixels)
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns)
                   for place in (folder, Path(__file__).parent) for file in place.iterdir()
                   if file.suffix in (".json", ".safetensors", ".py"))  # this code is part of it
    dtype, pixels = moca.model.head.dtype, (moca.processor.min_pixels, moca.processor.max_pixels)
    identity = repr((str(folder.resolve()), files, moca.attention, moca.pooling, dtype, pixels))
    kept = Path(args.output + ".vectors") if args.command != "embed" else None
    return lambda records: embed_records(moca, records, kept, identity)


def embed(args: argparse.Namespace) -> None:
    """The command `embed`."""
    records = [make_record(*row) for row in open_rows(args.input)]
    vectors = make_embedder(args)(records)
    save_vectors(Path(args.output), vectors)
    print(f"{args.output}: {vectors.shape[0]} unit vectors of width {vectors.shape[1]}")


def builtin(embed: Embed, args: argparse.Namespace) -> Scores:
    """The built-in tasks, and scenes of symbols that the nano base never met."""
    tasks = builtin_tasks(args.split)
    for name in ("scene-to-caption", "caption-to-scene"):
        tasks[f"{name}, new symbols"] = BuiltinTask(name, args.split, 0, NEW)
    for name, task in tasks.items():
        yield name, rank_pairs(task, embed).scores()


def mmeb(embed: Embed, args: argparse.Namespace) -> Scores:
    """Precision@1: how often the first candidate comes first."""
    images = Path(args.images or args.data)
    for folder in task_folders(args.data):
        places: dict[tuple[str, str], int] = {}  # of (text, image path) in `records`
        records: list[Record] = []
        questions: list[list[int]] = []  # places of a query, its right candidate, the others
        for fields, _, where in open_rows(folder, "test*"):
            try:
                texts, paths = ([side] if isinstance(side, str) else list(side)
                                for side in (fields["tgt_text"], fields["tgt_img_path"]))
                sides = [(fields["qry_text"], fields["qry_img_path"]),
                         *zip(texts, paths, strict=True)]
                # <|image_1|> marks an image; beside an empty path it means nothing
                sides = [(text.replace("<|image_1|>", MARK if path else "").strip(), path or "")
                         for text, path in sides]
                if len(sides) < 3:
                    raise ValueError("fewer than two candidates")
                for text, path in (side for side in sides if side not in places):
                    places[text, path] = len(records)
                    fields = {"text": text, "images": [path] if path else []}
                    records.append(make_record(fields, images, where))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise MocaError(f"{where}: not an MMEB row ({error!r}): copy it again") from None
            questions.append([places[side] for side in sides])
        vectors = embed(records)
        found = [cosines(vectors[[query]], vectors[others])[0] for query, *others in questions]
        right = [(row[0] > row[1:]).all() for row in found]  # a tie or NaN is not larger
        twice = sum(answer in others for _, answer, *others in questions)  # a tie by the data
        chance = [1 / len(row) for row in found]
        yield folder.name, {"precision@1": float(np.mean(right)), "queries": len(found),
                            "chance": float(np.mean(chance)), "right candidate given twice": twice}


def vidore(embed: Embed, args: argparse.Namespace) -> Scores:
    """nDCG@5 of pages for queries. A page's gain is its relevance score, as in trec_eval."""
    for folder in task_folders(args.data):
        corpus = table(folder / "corpus", "corpus-id", "image")
        queries = table(folder / "queries", "query-id", "query")
        columns = {key: place for place, (key, _, _) in enumerate(corpus)}
        relevance = {key: np.zeros(len(corpus)) for key, _, _ in queries}
        if len(columns) < len(corpus):
            raise MocaError(f"{folder / 'corpus'} has a corpus-id twice: copy it again")
        for query, page, score, where in table(folder / "qrels", "query-id", "corpus-id", "score"):
            known = query in relevance and page in columns
            if not (known and isinstance(score, (int, float)) and score >= 0):
                raise MocaError(f"{where}: query {query} or page {page} is not among the task's, "
                                f"or {score} is not a relevance: copy its three folders again")
            relevance[query][columns[page]] = score
        judged = [(relevance[key], make_record({"text": text}, folder, where))
                  for key, text, where in queries if relevance[key].any()]
        if not judged:
            raise MocaError(f"{folder / 'qrels'} names no right page for any query: copy it again")
        pages = [make_record({"text": f"{MARK} {args.prompt}", "images": [image]}, folder, where)
                 for _, image, where in corpus]
        vectors = embed(pages + [query for _, query in judged])
        similarities = cosines(vectors[len(corpus) :], vectors[: len(corpus)])  # [Q, C]
        scores = [ndcg(row, gains) for row, (gains, _) in zip(similarities, judged, strict=True)]
        chance = [ndcg_by_chance(gains) for gains, _ in judged]
        yield folder.name, {"ndcg@5": float(np.mean(scores)), "queries": len(judged),
                            "chance": float(np.mean(chance)), "pages": len(corpus),
                            "queries without a right page": len(queries) - len(judged)}


def ndcg(similarities: np.ndarray, relevance: np.ndarray) -> float:
    """nDCG@5 of one query over [C] pages; among equals, and among NaN, the worst comes first."""
    order = np.lexsort((relevance, -similarities))  # NaN last
    return discounted(relevance[order]) / discounted(np.sort(relevance)[::-1])


def ndcg_by_chance(relevance: np.ndarray) -> float:
    """What a random order of [C] pages scores on average."""
    everywhere = np.full(len(relevance), relevance.mean())
    return discounted(everywhere) / discounted(np.sort(relevance)[::-1])


def discounted(gains: np.ndarray) -> float:
    """The sum of the first five of [C] gains, each divided by log2(1 + rank)."""
    return float((gains[:K] / np.log2(np.arange(2, len(gains[:K]) + 2))).sum())


def task_folders(data: str) -> list[Path]:
    """A benchmark's tasks: the folders in DATA that hold files of data."""
    folders = sorted(path for path in Path(data).glob("*") if path.is_dir()
                     and any(file.suffix in FILE_KINDS for file in path.rglob("*")))
    if not folders:
        raise MocaError(f"--data {data} holds no task: give a folder with one subfolder per task")
    return folders


def table(folder: Path, *columns: str) -> list[tuple]:
    """The columns of all rows in a folder, all but the last as text, and each row's place."""
    kept = []
    for fields, _, where in open_rows(folder):
        if not isinstance(fields, dict) or not fields.keys() >= {*columns}:
            raise MocaError(f"{where}: a row needs {', '.join(columns)}: copy the file again")
        *ids, value = (fields[column] for column in columns)
        kept.append((*map(str, ids), value, where))
    return kept


def averages(metric: str, tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over tasks as the benchmark reports them; how many of its tasks were there is said."""
    groups = {"overall": list(tasks)}
    if metric == "precision@1":
        halves = {kind: [half.split() for half in names.split("|")] for kind, names in MMEB.items()}
        groups = {kind: sum(parts, []) for kind, parts in halves.items()}
        groups["in distribution"] = sum((inside for inside, _ in halves.values()), [])
        groups["out of distribution"] = sum((outside for _, outside in halves.values()), [])
        groups["overall"] = groups["in distribution"] + groups["out of distribution"]
    means = {}
    for name, members in groups.items():
        scores = [tasks[task][metric] for task in members if task in tasks]
        if scores:
            means[f"{name} ({len(scores)} of {len(members)} tasks)"] = float(np.mean(scores))
    return means


SCORERS = {"builtin": builtin, "mmeb": mmeb, "vidore": vidore}


def score(args: argparse.Namespace) -> None:
    """The commands that score. What is done stands in the file after each task."""
    tasks: dict[str, dict[str, float]] = {}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    for name, scores in SCORERS[args.command](make_embedder(args), args):
        tasks[name] = scores
        metric = next(iter(scores))  # the one that the benchmark reports
        print(f"{name:32s}", *(f"{key} {value:.4g}" for key, value in scores.items()), flush=True)
        means = averages(metric, tasks)
        write_json(Path(args.output), {
            "model": args.model, "tasks": tasks, f"average {metric}": means})
    print(f"average {metric}:", "; ".join(f"{name}: {mean:.3f}" for name, mean in means.items())
          or "no task has a name that the benchmark knows")


def main(argv: list[str] | None = None) -> None:
    """Choose the command and run it."""
    parser = Parser(description="Embed and score with a trained model.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, about in (("embed", "items.jsonl to vectors.npy"),
                        ("builtin", "score on the built-in tasks"),
                        ("mmeb", "score on MMEB"), ("vidore", "score on ViDoRe")):
        command = commands.add_parser(name, allow_abbrev=False, help=about)
        command.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
        command.add_argument("--output", required=True, help="the file to write")
        command.add_argument("--attention", choices=("bidirectional", "causal"),
                             help="default: as the model was trained; bidirectional if unknown")
        command.add_argument("--pooling", choices=("mean", "last"),
                             help="default: as the model was trained; else mean, or last if causal")
        command.add_argument("--dtype", choices=("float32", "bfloat16"),
                             help="default: float32 on cpu, the checkpoint's own on cuda")
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if any")
        for limit in ("--min-pixels", "--max-pixels"):
            command.add_argument(limit, type=int, metavar="N", help="default: the checkpoint's")
        if name == "embed":
            command.add_argument("--input", required=True, help="JSON lines of text and images")
        elif name == "builtin":
            command.add_argument("--split", choices=("test", "development"), default="test")
        else:
            command.add_argument("--data", required=True, help="folder with one subfolder per task")
    commands.choices["mmeb"].add_argument("--images", help="the images' folder (default: --data)")
    commands.choices["vidore"].add_argument("--prompt", help="put beside each page",
                                            default="Represent the given document image.")
    args = parser.parse_args(argv)
    for limit in (args.min_pixels, args.max_pixels):
        if limit is not None and limit < 1:
            parser.error(f"{limit} pixels are too few for an image")
    embed(args) if args.command == "embed" else score(args)


if __name__ == "__main__":
    run(main)
