"""Pictures of notebooks 5 and 6: pairs, matrices of cosines, the temperature, shelves and twins.

Blue is what is right, red a near miss or what is wanted less, grey the rest.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from helpers import BLUE, GREY, RED, show
from matplotlib.axes import Axes
from torch import Tensor

from nano_moca.batch import Pair
from nano_moca.report.stage2 import show_record

TASK_COLOURS = (BLUE, RED, GREY)


def show_matrix(axis: Axes, matrix: np.ndarray, lowest: float = -0.2, highest: float = 1.0,
                colours: str = "viridis") -> object:
    """A matrix without ticks or frame; what imshow returns, for a colour bar."""
    shown = axis.imshow(matrix, vmin=lowest, vmax=highest, cmap=colours)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return shown


def draw_pairs(pairs: dict[str, Pair], kinds: dict[str, str]) -> None:
    """A row for each task: query, right answer, hard negative."""
    titles = "query", "right answer", "hard negative"
    _, axes = plt.subplots(len(pairs), 3, figsize=(9.5, 1.75 * len(pairs)))
    for row, (name, pair) in zip(axes, pairs.items()):
        for axis, record in zip(row, (pair.query, pair.positive, *pair.negatives)):
            show_record(axis, record, "")
            axis.spines[:].set(visible=True, color="#cccccc")
            for words in axis.texts:
                words.set_fontsize(10)
                if record.images:  # its instruction stands below the picture
                    words.set_position((0.5, -0.03))
                    words.set_verticalalignment("top")
        for axis in row[2 + len(pair.negatives):]:
            axis.axis("off")
        row[0].set_ylabel(f"{name}\n({kinds[name]})", fontsize=10)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    plt.show()


def draw_one_step(cosines: Tensor, probabilities: Tensor, gradient: Tensor) -> None:
    """Three matrices of one batch, with the numbers in their cells."""
    _, axes = plt.subplots(1, 3, figsize=(13, 4.7))
    limit = float(gradient.abs().max())
    drawn = ((axes[0], cosines, "1. cosines", 0, 0.5, "viridis"),
             (axes[1], probabilities, "2. softmax of each row at 0.03", 0, 1, "viridis"),
             (axes[2], gradient, "3. gradient at the cosines", -limit, limit, "RdBu_r"))
    for axis, matrix, title, lowest, highest, colours in drawn:
        show_matrix(axis, matrix, lowest, highest, colours)
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            middle = (value - lowest) / (highest - lowest)
            dark = middle < 0.6 if colours == "viridis" else not 0.2 < middle < 0.8
            axis.text(column, row, f"{value:.2f}".replace("0.", "."), ha="center", va="center",
                      fontsize=9, color="white" if dark else "black")
        for number in range(len(matrix)):
            axis.add_patch(plt.Rectangle((number - 0.5, number - 0.5), 1, 1, fill=False,
                                         edgecolor="black", linewidth=2))
        axis.set(title=title, xlabel=f"{matrix.shape[1]} answers (scenes)")
    axes[0].set_ylabel(f"{len(cosines)} queries (captions)")
    plt.show()


def draw_history(history: Sequence[dict], guess_loss: float, guess_accuracy: float) -> None:
    """Loss and accuracy of each step, and their mean over ten steps."""
    _, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    guesses = ((axes[0], "loss", guess_loss), (axes[1], "accuracy", guess_accuracy))
    tasks = sorted({step["task"] for step in history})
    for axis, what, guess in guesses:
        for task, colour in zip(tasks, TASK_COLOURS):
            steps = [(n, step[what]) for n, step in enumerate(history, 1) if step["task"] == task]
            axis.plot(*zip(*steps), "o", color=colour, markersize=4.5, label=task)
        mean = np.convolve([step[what] for step in history], np.ones(10) / 10, "valid")
        axis.plot(range(10, len(history) + 1), mean, color="black", linewidth=2.5,
                  label="mean of the last ten")
        axis.axhline(guess, color="black", linestyle=":", label="guessing")
        axis.set(xlabel="step", title=f"{what} in the batch", ylim=(0, None))
    axes[0].legend(fontsize=10, frameon=False, loc="center right")
    plt.show()


def draw_diagonal(matrices: dict[int, np.ndarray], groups: Sequence[str]) -> None:
    """Cosines of held-out captions and scenes after so many steps.

    groups: the block that each belongs to; those of one block stand side by side.
    """
    figure, axes = plt.subplots(1, len(matrices), figsize=(13, 3.9))
    names = list(dict.fromkeys(groups))
    starts = np.array([list(groups).index(name) for name in names] + [len(groups)])
    for axis, (step, matrix) in zip(axes, matrices.items()):
        shown = show_matrix(axis, matrix)
        right = (matrix.argmax(1) == np.arange(len(matrix))).sum()
        axis.set(title=f"after {step} steps\nfound: {right} of {len(matrix)}",
                 xlabel=f"{len(matrix)} scenes")
        for edge in starts[1:-1]:
            axis.axvline(edge - 0.5, color="white", linewidth=1)
            axis.axhline(edge - 0.5, color="white", linewidth=1)
    axes[0].set_ylabel(f"{len(matrix)} captions")
    axes[0].set_yticks((starts[:-1] + starts[1:] - 1) / 2, names, fontsize=10)
    axes[0].tick_params(length=0)
    figure.colorbar(shown, ax=axes, label="cosine", shrink=0.75)
    plt.show()


def draw_temperatures(cosines: Tensor, own: int, temperatures: Sequence[float],
                      count: int = 20) -> None:
    """One query's nearest candidates: cosines, and the softmax at several temperatures."""
    order = cosines.argsort(descending=True)[:count].tolist()
    colours = [BLUE if j == own else GREY for j in order]
    _, axes = plt.subplots(1, 1 + len(temperatures), figsize=(13, 3.5))
    highest = 1.1 * float((cosines / min(temperatures)).softmax(0).max())
    axes[0].bar(range(count), cosines[order], color=colours)
    axes[0].set(title="cosines", xlabel=f"the {count} nearest", xticks=[])
    for axis, temperature in zip(axes[1:], temperatures):
        p = (cosines / temperature).softmax(0)
        axis.bar(range(count), p[order], color=colours)
        axis.set(title=f"temperature {temperature:g}", xlabel="the same", xticks=[],
                 ylim=(0, highest))
    axes[1].set_ylabel("softmax")
    for axis in axes[2:]:
        axis.set_yticklabels([])
    for colour, name in ((BLUE, "right answer"), (GREY, "other scenes")):
        axes[1].bar(0, 0, color=colour, label=name)
    axes[1].legend(fontsize=10, frameon=False)
    plt.show()


def draw_push(temperatures: np.ndarray, curves: dict[str, list[float]], alike: float) -> None:
    """Which negatives get the gradient, over the temperature."""
    _, axis = plt.subplots(figsize=(8, 3.9))
    for (name, values), colour in zip(curves.items(), (RED, GREY)):
        axis.plot(temperatures, values, color=colour, linewidth=2.5, label=name)
    axis.axhline(alike, color="black", linestyle=":", label="3 of 63, if all were pushed equally")
    axis.axvline(0.03, color="black", linestyle="--", linewidth=1.5)
    axis.text(0.031, 1.07, "MoCa: 0.03")
    axis.set(xscale="log", xlabel="temperature", ylim=(0, 1.15),
             ylabel="share of the push\non all negatives")
    axis.set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(fontsize=10, frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.93))
    plt.show()


# --- notebook 6 -----------------------------------------------------------------------


def draw_shelf_matrices(matrices: dict[str, np.ndarray], queries: Sequence[str],
                        answers: Sequence[str]) -> None:
    """Cosines of queries and answers of several tasks, a block for each pair of tasks."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(13, 5.2))
    for axis, (title, matrix) in zip(axes, matrices.items()):
        shown = show_matrix(axis, matrix)
        each = len(matrix) // len(queries)
        for edge in range(each, len(matrix), each):
            axis.axvline(edge - 0.5, color="white", linewidth=1.5)
            axis.axhline(edge - 0.5, color="white", linewidth=1.5)
        middles = range(each // 2, len(matrix), each)
        axis.set(title=title, xlabel="answers")
        axis.set_xticks(middles, answers, fontsize=10)
        axis.tick_params(length=0)
    axes[0].set_yticks(middles, queries, fontsize=10)
    axes[0].set_ylabel("queries")
    figure.colorbar(shown, ax=axes, label="cosine", shrink=0.6)
    plt.show()


def draw_shelves(figures: dict[str, dict[str, Sequence[float]]]) -> None:
    """Recall@1 (above) and recall@10 by run and task: on a task's own shelf, and on the shelf
    of all kinds. A task's figures: own recall@1 and @10, then those of all kinds."""
    _, axes = plt.subplots(2, len(figures), figsize=(13, 6.4), sharey=True, sharex=True)
    for column, (run, tasks) in zip(axes.T, figures.items()):
        rows = np.array(list(tasks.values()))  # [tasks, 5]
        places = np.arange(len(tasks))
        for axis, own, mixed in ((column[0], rows[:, 0], rows[:, 2]),
                                 (column[1], rows[:, 1], rows[:, 3])):
            bars = [axis.bar(places - 0.2, own, 0.38, color=BLUE, label="its own shelf"),
                    axis.bar(places + 0.2, mixed, 0.38, color=RED, label="shelf of all kinds")]
            for drawn in bars:
                axis.bar_label(drawn, fmt="%.2f", fontsize=9, padding=2)
            axis.set(ylim=(0, 1.15))
        column[0].set_title(run)
        column[1].set_xticks(places, [name.replace("-to-", "\nto ").replace("-", "\n")
                                      for name in tasks], fontsize=10)
    axes[0, 0].set_ylabel("recall@1")
    axes[1, 0].set_ylabel("recall@10")
    axes[0, 0].legend(fontsize=10, frameon=False, loc="upper left")
    plt.show()


def draw_parts(parts: np.ndarray) -> None:
    """The two parts of a mixed batch's loss, [steps, 3]: task, answer, guessing the answer."""
    smooth = np.stack([np.convolve(column, np.ones(3) / 3, "valid") for column in parts.T], 1)
    steps = np.arange(2, len(parts))
    _, axis = plt.subplots(figsize=(8, 3.8))
    axis.stackplot(steps, smooth[:, 1], smooth[:, 0], colors=(BLUE, RED), alpha=0.8,
                   labels=("which answer of the right task", "which task"))
    axis.plot(steps, smooth[:, 2], "k:", linewidth=2, label="guessing among its task's answers")
    axis.set(title="The loss in mixed batches, taken apart", xlabel="step", ylabel="loss",
             ylim=(0, 7))
    axis.legend(fontsize=10, frameon=False)
    plt.show()


def draw_family(images: Sequence, titles: Sequence[str]) -> None:
    """A scene and its twins."""
    _, axes = plt.subplots(1, len(images), figsize=(13, 2.2))
    for axis, image, title in zip(axes, images, titles):
        show(axis, image, title)
    plt.show()


def draw_twins(beaten: dict[str, dict[str, float]]) -> None:
    """How often twins of each family are beaten, by model."""
    _, axis = plt.subplots(figsize=(11, 4))
    names = list(next(iter(beaten.values())))
    places = np.arange(len(names))
    width = 0.8 / len(beaten)
    for number, ((model, values), colour) in enumerate(zip(beaten.items(), (GREY, RED, BLUE))):
        shift = (number - (len(beaten) - 1) / 2) * width
        bars = axis.bar(places + shift, [values[name] for name in names], width * 0.95,
                        color=colour, label=model)
        axis.bar_label(bars, fmt="%.2f", fontsize=10, padding=2)
    axis.axhline(0.5, color="black", linestyle=":", label="guessing", zorder=0)
    axis.set(ylim=(0, 1.25), ylabel="twins beaten")
    axis.set_xticks(places, names)
    axis.legend(fontsize=10, frameon=False, ncols=4, loc="upper left")
    plt.show()


def share_of_push(cosines: Tensor, own: Tensor, temperature: float) -> Tensor:
    """[Q, C]: how a query's push is divided among its negatives; `own` is its right answer."""
    p = (cosines / temperature).softmax(1).masked_fill(own, 0)
    return p / p.sum(1, keepdim=True)
