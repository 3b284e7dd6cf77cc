"""What a run of stage 1 shows at its end: what the modalities learned from each other.

Words could be restored from words alone, and patches from their neighbours. So the report asks:
how many hidden words come back beside the right picture, a wrong one, and none; and how well hidden
patches come back with the words in clear, and with no words. All on records drawn after the last
step's, which are unseen within the first epoch.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_moca.data import Pair, record_key
from nano_moca.masking import Corruption, corrupt
from nano_moca.model import Restorer
from nano_moca.processor import Batch, Encoded, Processor, Record, open_image
from nano_moca.trainer import World

Items = list[tuple[int, Encoded]]  # (number in the run, record)


@torch.no_grad()
def restore(model: Restorer, corruption: Corruption, world: World, causal: bool
            ) -> tuple[Tensor, Tensor]:
    """The model's answers: the likeliest tokens [R] and the pixels [G, 4704] of what was hidden."""

    def answers(hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor, _: Tensor):
        rows = hidden.split(256)  # never all logits at once
        tokens = [(part @ head.to(part.dtype).T).argmax(-1) for part in rows]
        return torch.cat([labels[:0], *tokens]).cpu(), predicted.float().cpu()

    return model(corruption.to(world.device), causal, answers)  # through forward, as FSDP needs


def cross_modal_report(model: Restorer, processor: Processor, items: Items, flags: Any,
                       world: World, causal: bool) -> dict[str, float | None]:
    """Shares of hidden words restored, and squared errors of hidden patch groups, by condition.

    items: records that hold an image and words. flags: train_cpt's. A figure is None where nothing
    was hidden.
    """
    keys = [(flags.seed, number) for number, _ in items]
    batch = processor.pack([item for _, item in items])
    wrong, special = other_pictures(batch), processor.special_tokens.numpy()
    wordless = processor.pack([only(item, special, words=False) for _, item in items])
    pictureless = processor.pack([only(item, special, words=True) for _, item in items])

    def mean(values: Tensor) -> float | None:
        return float(values.float().mean()) if len(values) else None

    def words(batch: Batch) -> float | None:
        corruption = corrupt(batch, processor, flags.text_mask, 0.0, keys)
        return mean(restore(model, corruption, world, causal)[0] == corruption.labels)

    def patches(batch: Batch, text_rate: float) -> float | None:
        corruption = corrupt(batch, processor, text_rate, flags.image_mask, keys)
        pixels = restore(model, corruption, world, causal)[1]
        return mean((pixels - corruption.target).square())

    target = corrupt(batch, processor, 0.0, flags.image_mask, keys).target  # [G, 4704]
    return {
        "words restored, right picture": words(batch),
        "words restored, wrong picture": (
            None if wrong is None else words(replace(batch, patches=wrong))),
        "words restored, no picture": words(pictureless),
        "patch error, words in clear": patches(batch, 0.0),
        "patch error, words hidden as in training": patches(batch, flags.text_mask),
        "patch error, no words": patches(wordless, 0.0),
        "patch error, best constant": mean((target - target.mean(0)).square()),
    }


def only(item: Encoded, special: np.ndarray, words: bool) -> Encoded:
    """A record's words without its images, or its images without its words. Positions stay."""
    keep = np.isin(item.tokens, special) != words  # [L]
    item = replace(item, tokens=item.tokens[keep], positions=item.positions[:, keep])
    return replace(item, images=[], grids=[]) if words else item


def other_pictures(batch: Batch) -> Tensor | None:
    """The patches [P, 1176] with each image in the place of another of its size.

    None if more than a tenth of the images keep their place or get an equal one: the score beside a
    wrong picture would be one beside the right one.
    """
    grids = [tuple(grid) for grid in batch.grids.tolist()]
    images = batch.patches.split(batch.grids.prod(1).tolist())
    swapped = list(images)
    for size in set(grids):
        same = [index for index, grid in enumerate(grids) if grid == size]
        for place, other in zip(same, same[1:] + same[:1], strict=True):
            swapped[place] = images[other]
    kept = sum(map(torch.equal, images, swapped))
    return torch.cat(swapped) if 10 * kept <= len(images) else None


def unpatchify(patches: np.ndarray, grid: tuple[int, int, int], processor: Processor) -> np.ndarray:
    """Rows of patches [P, 1176] back to an image [height, width, 3] in 0..1 (its first frame)."""
    _, rows, columns = grid
    m, p, frames = processor.config.vision.merge, processor.config.vision.patch, -1
    cut = patches.reshape(rows // m, columns // m, m, m, 3, frames, p, p)[:, :, :, :, :, 0]
    pixels = cut.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * p, columns * p, 3)
    return np.clip(pixels * processor.std + processor.mean, 0, 1)


def plot_restorations(path: Path, model: Restorer, processor: Processor, items: Items,
                      flags: Any, world: World, causal: bool) -> None:
    """A column a record: hidden, restored, original; below each picture, the words.

    Takes records with one image. A hidden group is grey (the model sees noise there), a hidden word
    is _; in the second row [words] and groups that were hidden are the model's. flags: train_cpt's.
    Call on all ranks.
    """
    from matplotlib.figure import Figure

    figure, decode = Figure((2.1 * len(items), 8), layout="tight"), processor.tokenizer.decode
    axes = figure.subplots(3, len(items), squeeze=False)
    for column, (number, item) in enumerate(items):
        batch = processor.pack([item])
        rates = flags.text_mask, flags.image_mask
        corruption = corrupt(batch, processor, *rates, [(flags.seed, number)])
        tokens, pixels = restore(model, corruption, world, causal)
        hidden = torch.isin(batch.image_rows, corruption.group_rows).numpy()  # [G_all]
        original = batch.patches.numpy().reshape(len(hidden), -1)  # [G_all, 4704]
        grey, restored = original.copy(), original.copy()
        grey[hidden], restored[hidden] = 0.0, pixels.numpy()
        words = [decode([token]) for token in item.tokens.tolist()]  # "" for a special token
        blanks, answers = list(words), list(words)
        for row, token in zip(corruption.text_rows.tolist(), tokens.tolist(), strict=True):
            blanks[row], answers[row] = " _", f" [{decode([token]).strip()}]"
        rows = (grey, blanks), (restored, answers), (original, words)
        for axis, (groups, parts) in zip(axes[:, column], rows, strict=True):
            axis.imshow(unpatchify(groups, item.grids[0], processor))
            text = "\n".join(textwrap.wrap("".join(parts), 28)[:4])
            axis.set_xlabel(text, fontsize=7, parse_math=False)  # a $ in a text is a dollar
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("hidden", "restored", "original"), strict=True):
        axis.set_ylabel(name)
    if world.main:
        figure.savefig(path, dpi=110)


# --- stage 2 -------------------------------------------------------------------------------------

@dataclass
class Ranking:
    """Queries and everything they could find."""

    queries: list[Record]
    candidates: list[Record]  # each once, although several pairs may have it
    right: np.ndarray  # [Q] int64: the candidate that each query should find
    similarities: np.ndarray  # [Q, C] cosines

    def ranks(self) -> np.ndarray:
        """The rank of each query's right answer, from 1. A tie counts against, and so does NaN:
        else a model that maps all to one point would be perfect."""
        own = np.take_along_axis(self.similarities, self.right[:, None], 1)  # [Q, 1]
        return (~(self.similarities < own)).sum(1)  # itself among them

    def scores(self) -> dict[str, float]:
        """Recall@1 and @10, nDCG@5 with the one right answer, and what guessing would score."""
        ranks, count = self.ranks(), len(self.candidates)
        gains = np.where(ranks <= 5, 1 / np.log2(1 + ranks), 0.0)
        return {"recall@1": float((ranks <= 1).mean()), "recall@10": float((ranks <= 10).mean()),
                "ndcg@5": float(gains.mean()), "queries": len(ranks), "candidates": count,
                "chance recall@1": 1 / count, "chance recall@10": min(1.0, 10 / count)}


def rank_pairs(pairs: Sequence[Pair], embed: Callable[[list[Record]], np.ndarray]) -> Ranking:
    """Rank the positives and hard negatives of all pairs for each query.

    embed: records -> unit vectors [N, D].
    """
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


def plot_retrieval(path: Path, rankings: dict[str, Ranking], shown: int = 1) -> None:
    """A row a query, `shown` of each task: the query, and its five best answers from left to right;
    the right one is framed, if it is among them."""
    from matplotlib.figure import Figure

    picked = [(name, ranking, query) for name, ranking in rankings.items()
              for query in np.linspace(0, len(ranking.queries) - 1, shown + 2, dtype=int)[1:-1]]
    figure = Figure((12.5, 2.2 * len(picked)), layout="tight")
    axes = figure.subplots(len(picked), 6, squeeze=False)
    for row, (name, ranking, query) in zip(axes, picked, strict=True):
        best = np.argsort(-ranking.similarities[query], kind="stable")[:5]
        show_record(row[0], ranking.queries[query])
        row[0].set_title(f"{name}: query", fontsize=8)
        for axis in row[1:]:
            axis.axis("off")
        for place, (axis, answer) in enumerate(zip(row[1:], best, strict=False), 1):
            axis.axis("on")
            show_record(axis, ranking.candidates[answer])
            axis.set_title(f"{place}: {ranking.similarities[query, answer]:.2f}", fontsize=8)
            if answer == ranking.right[query]:
                for spine in axis.spines.values():
                    spine.set(edgecolor="#1a9c3e", linewidth=4)
    figure.savefig(path, dpi=100)


def show_record(axis: Any, record: Record) -> None:
    """A record's first image, or its words in a box."""
    axis.set(xticks=[], yticks=[])
    if record.images:
        axis.imshow(open_image(record.images[0], record.source, decode=True))
    words = re.sub(r"<\|\w+\|>", "", record.text).strip()
    if words:
        text = "\n".join(textwrap.wrap(words, 26)[:7])
        axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=7, parse_math=False,
                  transform=axis.transAxes)


def plot_similarity(path: Path, rankings: dict[str, Ranking], size: int = 16) -> None:
    """A panel a task: cosines of the first queries (rows) and their right answers (columns)."""
    from matplotlib.figure import Figure

    figure = Figure((2.6 * len(rankings) + 0.6, 3), layout="constrained")
    axes = figure.subplots(1, len(rankings), squeeze=False)
    for axis, (name, ranking) in zip(axes[0], rankings.items(), strict=True):
        cosines = ranking.similarities[:size][:, ranking.right[:size]]
        drawn = axis.imshow(cosines, vmin=-0.2, vmax=1, cmap="viridis")
        axis.set(title=name, xlabel="answers", xticks=[], yticks=[])
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("queries")
    figure.colorbar(drawn, ax=axes, label="cosine", shrink=0.8)
    figure.savefig(path, dpi=120)
