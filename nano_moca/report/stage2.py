"""What a run of stage 2 shows at its end: which answers its queries find.

Held-out pairs of each task are ranked. `retrieval.png` shows a query of each task with
its five best answers, `similarity.png` how queries and answers compare.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from nano_moca.batch import Record
from nano_moca.convert.images import open_image
from nano_moca.data import load_tasks
from nano_moca.distributed import World
from nano_moca.evaluate.embedder import Moca
from nano_moca.files import one_line, write_json
from nano_moca.report.curves import plot_losses
from nano_moca.report.pictures import panels, picture, report_on
from nano_moca.report.ranking import Ranking, rank_pairs
from nano_moca.trainer import skip_list

REPORT_PAIRS = 200  # of each task
SHOWN = 12  # tasks in a picture, the first ones


def write_report(flags: Any, world: World, moca: Moca, lines: list[dict]) -> None:
    """Rank held-out pairs, draw the pictures and say what was learned: loss.png,
    retrieval.png, similarity.png and scores.json in --output.

    flags: train_cl.py's. lines: the log.
    """
    output = Path(flags.output)

    # The built-in data has unseen pairs of its own; other data is ranked as it is.
    held_out = flags.held_out or flags.data
    if flags.data == "builtin" and not flags.held_out:
        held_out = "builtin:development"
    unusable = [] if skip_list(flags, world) else None
    tasks, scores, rankings = {}, {}, {}
    with report_on(held_out, world):
        tasks = load_tasks(held_out, 0, unusable)

    # On all ranks, as a sharded model needs. A bad pair costs its task.
    for name, task in tasks.items():
        with report_on(name, world):
            pairs = [task[index] for index in range(min(REPORT_PAIRS, len(task)))]
            rankings[name] = rank_pairs(pairs, lambda records: moca.embed(records).numpy())
            scores[name] = rankings[name].scores()

    # The scores first: they are what counts.
    if world.main:
        write_json(output / "scores.json", {"pairs": held_out, "tasks": scores})
        note = ", learned from" if held_out == flags.data else ""
        print(f"ranked: pairs of {one_line(held_out)}{note}")
        for name, figures in scores.items():
            shown = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
            print(f"{one_line(name):>24s}  {shown}")

        # The pictures need no model. Without a usable pair there is nothing to show.
        plot_losses(output / "loss.png", lines, ["loss", "accuracy"])
        shown = list(rankings.items())[:SHOWN]
        if shown:
            plot_retrieval(output / "retrieval.png", shown)
            plot_similarity(output / "similarity.png", shown)
        print(f"{one_line(output)}: the model is in model/, beside it scores.json and the pictures")


@picture
def plot_retrieval(figure: Any, rankings: list[tuple[str, Ranking]]) -> None:
    """One row per task: a query, and its five best answers from left to right; right
    ones are framed."""
    axes = panels(figure, len(rankings), 6, 2.1, 2.2)
    for row, (name, ranking) in zip(axes, rankings, strict=True):
        # The one in the middle: nobody chose it.
        query = len(ranking.queries) // 2
        show_record(row[0], ranking.queries[query], f"{one_line(name)[:20]}: query")
        similarities = ranking.similarities[query]  # [C]
        best = np.argsort(-similarities, kind="stable")[:5].tolist()
        for axis, answer in zip(row[1:], best, strict=False):
            show_record(axis, ranking.candidates[answer], f"cosine {similarities[answer]:.2f}")
            if ranking.also_right[query, answer]:
                axis.spines[:].set(edgecolor="#1a9c3e", linewidth=4)

        # There may be fewer than five.
        for axis in row[1 + len(best) :]:
            axis.axis("off")


def show_record(axis: Any, record: Record, title: str) -> None:
    """A record's first image with its words below, or its words in a box."""
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)

    # Without special tokens, and no more than fits.
    lines = textwrap.wrap(re.sub(r"<\|\w+\|>", "", record.text), 26)
    if not record.images:
        axis.text(0.5, 0.5, "\n".join(lines[:7]), ha="center", va="center", fontsize=7,
                  transform=axis.transAxes)
        return
    image = open_image(record.images[0], record.source, decode=True)
    image.thumbnail((480, 480))
    axis.imshow(image)
    axis.set_xlabel("\n".join(lines[:3]), fontsize=6, color="#777777")


@picture
def plot_similarity(figure: Any, rankings: list[tuple[str, Ranking]]) -> None:
    """One panel per task: cosines of its first queries (down) with their right answers
    (across)."""
    axes = panels(figure, 1, len(rankings), 2.6, 3)[0]
    for axis, (name, ranking) in zip(axes, rankings, strict=True):
        # The diagonal is what each query should find.
        similarities = ranking.similarities[:16][:, ranking.right[:16]]
        drawn = axis.imshow(similarities, vmin=-0.2, vmax=1)
        axis.set(xlabel="answers", xticks=[], yticks=[])
        axis.set_title(one_line(name)[:28], fontsize=9)
    axes[0].set_ylabel("queries")
    figure.colorbar(drawn, ax=axes, label="cosine", shrink=0.8)
