"""The pictures of notebooks 1 and 2: what a model reads, which tokens see which, what each knows.

The notebooks compute, these functions draw. Each takes the numbers that its notebook has just
made, and shows one figure; what a picture means is said below it, in the notebook.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from helpers import BLUE, GREY, RED, show
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor, arange

from nano_moca.builtin import CELL
from nano_moca.config import VisionConfig

PATCH, GROUP = 14, 28  # pixels of their sides
PALE = "#e6e6e6"  # where a number is exactly zero
AXES = {"frame": "black", "row": BLUE, "column": RED}  # of M-RoPE


# --- notebook 1 -----------------------------------------------------------------------


def by_place(values: Tensor, grid: tuple[int, int, int]) -> np.ndarray:
    """One number per patch, from the processor's order (by groups) to the image's lines."""
    _, rows, columns = grid
    blocks = values.view(rows // 2, columns // 2, 2, 2).transpose(1, 2)
    return blocks.reshape(rows, columns).numpy()


def cut_apart(image: Image.Image, small: int = 4, large: int = 12) -> tuple[np.ndarray, np.ndarray,
                                                                             np.ndarray]:
    """The image with gaps between its patches and wider ones between groups; where each line and
    each column of patches begins."""
    pixels = np.asarray(image)
    starts = [PATCH * n + small * n + (large - small) * (n // 2) for n in range(image.width)]
    tops = np.array(starts[: image.height // PATCH])
    lefts = np.array(starts[: image.width // PATCH])
    canvas = np.full((tops[-1] + PATCH, lefts[-1] + PATCH, 3), 255, np.uint8)
    for r, top in enumerate(tops):
        for c, left in enumerate(lefts):
            patch = pixels[PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)]
            canvas[top : top + PATCH, left : left + PATCH] = patch
    return canvas, tops, lefts


def patches_and_rows(image: Image.Image, rows: Tensor, grid: tuple[int, int, int]) -> None:
    """An image, its numbered patches, and the rows of numbers that they become."""
    figure = plt.figure(figsize=(13, 4.6))
    places = figure.add_gridspec(2, 2, width_ratios=(1.75, 1), height_ratios=(1, 1.3))
    title = f"the image, {image.width} x {image.height} pixels"
    show(figure.add_subplot(places[0, 0]), image, title)

    # Patches, with the number of the row that each becomes.
    canvas, tops, lefts = cut_apart(image)
    axis = figure.add_subplot(places[1, 0])
    show(axis, canvas, f"{len(rows)} patches in {len(rows) // 4} groups")
    for (r, c), number in np.ndenumerate(by_place(arange(len(rows)), grid)):
        axis.text(lefts[c] + 6.5, tops[r] + 6.5, number, color="white", fontsize=8.5,
                  ha="center", va="center")

    axis = figure.add_subplot(places[:, 1])
    axis.imshow(rows, aspect="auto", cmap="gray", interpolation="nearest")
    axis.set(title="what the model gets", ylabel=f"{len(rows)} rows",
             xlabel="1,176 numbers: channel, frame, y, x", xticks=(196, 588, 980),
             xticklabels=("red", "green", "blue"))
    for border in (392, 784):
        axis.axvline(border - 0.5, color="white", linewidth=1.5)
    plt.show()


def windows(page: Image.Image, sees: Tensor, order: Tensor) -> None:
    """The windows on a page, and which patch may look at which before and after sorting."""
    _, axes = plt.subplots(1, 3, figsize=(13, 4.3))
    show(axes[0], page, f"{len(sees)} patches in {page.width * page.height // CELL**2} windows")
    for place in range(0, page.width + 1, CELL):
        axes[0].axvline(place - 0.5, color="white", linewidth=1.5)
        axes[0].axhline(place - 0.5, color="white", linewidth=1.5)
    axes[0].set(xlim=(-1, page.width), ylim=(page.height, -1))

    axes[1].imshow(sees, cmap="Blues", vmax=1.3, interpolation="nearest")
    axes[1].set(title="rows in the image's order")
    axes[2].imshow(sees[order][:, order], cmap="Blues", vmax=1.3, interpolation="nearest")
    axes[2].set(title="rows sorted by window")
    for axis in axes[1:]:
        axis.set(xlabel="patch that is seen", ylabel="patch that looks")
    plt.show()


def news(page: Image.Image, changed: int, differences: Sequence[Tensor],
         grid: tuple[int, int, int], config: VisionConfig) -> None:
    """How much each patch's vector changes after each block when one patch is replaced."""
    figure, axes = plt.subplots(1, 1 + len(differences), figsize=(13, 2.7))
    show(axes[0], page, "one patch gets noise")
    row, column = np.argwhere(by_place(arange(len(differences[0])), grid) == changed)[0]
    axes[0].add_patch(plt.Rectangle((column * PATCH - 0.5, row * PATCH - 0.5), PATCH, PATCH,
                                    fill=False, color="white", linewidth=3))
    for block, (axis, difference) in enumerate(zip(axes[1:], differences)):
        values = by_place(difference, grid)
        sees = "whole image" if block in config.full_blocks else "windows"
        show(axis, np.full((*values.shape, 3), 0.9), f"after block {block} ({sees})")
        drawn = axis.imshow(np.where(values > 0, values, np.nan), cmap="Blues", norm="log",
                            vmin=1e-3, vmax=10)
    figure.colorbar(drawn, ax=axes, label="change", shrink=0.8)
    plt.show()


def frequencies(turns: Tensor, axes_of: Sequence[int]) -> None:
    """How fast each pair of a query's numbers turns, coloured by the position that turns it.

    turns: radians per position, from the fastest; axes_of: 0, 1 or 2 for each.
    """
    _, axis = plt.subplots(figsize=(10, 2.9))
    for number, (name, colour) in enumerate(AXES.items()):
        own = [pair for pair, turned_by in enumerate(axes_of) if turned_by == number]
        axis.bar(own, turns[own], color=colour, label=f"turned by the {name}")
    axis.set(xlabel="pair of numbers of a query or key", ylabel="radians per position",
             xticks=range(len(turns)))
    axis.legend(frameon=False)
    plt.show()


def three_positions(positions: np.ndarray, image_index: Tensor, page: Image.Image) -> None:
    """The three positions of each token of a sentence, and those of the page's image tokens."""
    first, last = int(image_index[0]), int(image_index[-1])
    _, axes = plt.subplots(1, 2, figsize=(13, 4.4), width_ratios=(1.2, 1))
    axes[0].axvspan(first - 0.5, last + 0.5, color="#eef3fa")
    axes[0].text((first + last) / 2, positions.max() + 0.6, "image tokens", ha="center", color=BLUE)
    for values, (name, colour), marker in zip(positions, AXES.items(), "sov"):
        axes[0].plot(values, marker, color=colour, markersize=5 - 0.6 * "sov".index(marker),
                     linestyle="-", linewidth=0.8, label=name)
    axes[0].set(xlabel="token", ylabel="position", title="three positions for every token",
                ylim=(-0.5, positions.max() + 1.6), yticks=range(0, positions.max() + 1, 3))
    axes[0].legend(loc="upper left", frameon=False)

    show(axes[1], page, "row, column of each image token")
    for token in image_index.tolist():
        _, r, c = positions[:, token] - positions[:, first]
        axes[1].text(GROUP * c + 14, GROUP * r + 14, f"{positions[1, token]},{positions[2, token]}",
                     color="white", ha="center", va="center", fontsize=10,
                     bbox={"facecolor": "black", "alpha": 0.45, "linewidth": 0, "pad": 1.5})
    for place in range(GROUP, page.width, GROUP):
        axes[1].axvline(place - 0.5, color="white", linewidth=0.4)
        axes[1].axhline(place - 0.5, color="white", linewidth=0.4)
    axes[1].set(xlim=(-0.5, page.width - 0.5), ylim=(page.height - 0.5, -0.5))
    plt.show()


Step = tuple[Sequence[str], Sequence[float]]  # the likeliest tokens and their probabilities


def captions(images: Sequence[Image.Image], titles: Sequence[str],
             told: Sequence[Sequence[Step]]) -> None:
    """Each image beside what a model says of it, token by token, with the runners-up."""
    _, axes = plt.subplots(len(images), 2, figsize=(14, 2.7 * len(images)),
                                width_ratios=(1, 3.6))
    for (picture, table), image, title, steps in zip(axes, images, titles, told):
        show(picture, image, title)
        shares = np.array([values for _, values in steps]).T  # [4, steps]
        table.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=2, aspect="auto")
        for column, (words, values) in enumerate(steps):
            for row, (word, share) in enumerate(zip(words, values)):
                weight = "bold" if row == 0 else "normal"
                number = f"{share:.0%}" if share >= 0.005 else "<1%"
                table.text(column, row - 0.14, word, ha="center", va="center", fontsize=10,
                           fontweight=weight)
                table.text(column, row + 0.25, number, ha="center", va="center", fontsize=9)
        table.set(yticks=range(4), yticklabels=("says", "2nd", "3rd", "4th"),
                  xticks=range(len(steps)), xticklabels=range(1, len(steps) + 1))
        table.spines[:].set_visible(False)
        table.tick_params(length=0)
    axes[-1, 1].set_xlabel("step")
    plt.show()


def lost_words(lost: Tensor) -> None:
    """How much less likely each word becomes when a group of patches is covered.

    lost: [2, 3, 12], colours and names, of the three cells, by covered group.
    """
    _, axes = plt.subplots(2, 3, figsize=(13, 4.2))
    for (row, column), axis in np.ndenumerate(axes):
        fall = lost[row, column].view(2, 6)
        kind, place = ("colour", "name")[row], ("left", "middle", "right")[column]
        show(axis, fall, f"the {kind}, {place}")
        axis.images[0].set(cmap="Blues", clim=(0, 1.3 * float(lost.max())))
        for (r, c), value in np.ndenumerate(fall.numpy()):
            axis.text(c, r, f"{abs(value):.1f}", ha="center", va="center", fontsize=11)
        for border in (1.5, 3.5):
            axis.axvline(border, color="black", linewidth=1)
    plt.show()


def covered(images: Sequence[Image.Image], titles: Sequence[str], below: Sequence[str]) -> None:
    """Images with a title above and a finding below each."""
    _, axes = plt.subplots(1, len(images), figsize=(14, 1.9))
    for axis, image, title, words in zip(axes, images, titles, below):
        show(axis, image, title)
        axis.set_xlabel(words, fontsize=12)
    plt.show()


# --- notebook 2 -----------------------------------------------------------------------


def _name_ticks(axis: Axes, names: Sequence[str], size: float) -> None:
    """Tokens as labels of both axes of a matrix."""
    axis.set(xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=90, fontsize=size)
    axis.set_yticklabels(names, fontsize=size)
    axis.tick_params(length=0)


def who_sees_whom(weights: dict[str, Tensor], names: Sequence[str], border: int) -> None:
    """Attention weights of two packed records, mean over heads, under each pattern.

    weights: [H, T, T] by the pattern's name; border: the first token of the second record.
    """
    _, axes = plt.subplots(1, 2, figsize=(14, 7))
    for axis, (name, weight) in zip(axes, weights.items()):
        axis.imshow(weight.mean(0).sqrt(), cmap="Blues", vmin=0, vmax=0.8)
        axis.set(title=name, xlabel="token that is seen")
        _name_ticks(axis, names, 9)
        axis.axvline(border - 0.5, color=RED, linewidth=1)
        axis.axhline(border - 0.5, color=RED, linewidth=1)
    axes[0].set_ylabel("token that looks")
    plt.show()


def influence(changes: dict[str, Tensor], names: Sequence[str]) -> None:
    """How much each hidden state changes with each token, [T, T] by the pattern's name."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.9))
    for axis, (name, change) in zip(axes, changes.items()):
        drawn = axis.imshow(np.where(change > 0, change, np.nan), cmap="Blues", norm="log",
                            vmin=3e-3, vmax=1)
        axis.set(title=name, xlabel="token that is changed", facecolor=PALE)
        _name_ticks(axis, names, 10)
    axes[0].set_ylabel("token whose hidden state changes")
    figure.colorbar(drawn, ax=axes, label="change of the hidden state, relative", shrink=0.8)
    plt.show()


def staircase(tables: dict[str, np.ndarray], words: Sequence[str]) -> None:
    """What a probe reads of each of three symbols [3, T] from each token, by the model's name."""
    _, axes = plt.subplots(len(tables), 1, figsize=(11.5, 0.35 + 2.35 * len(tables)),
                                squeeze=False)
    for axis, (name, scores) in zip(axes[:, 0], tables.items()):
        axis.imshow(scores, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
        for (place, token), score in np.ndenumerate(scores):
            axis.text(token, place, f"{score:.0%}", ha="center", va="center", fontsize=11.5)
        axis.set(title=name, yticks=range(3), yticklabels=("first", "second", "third"),
                 ylabel="symbol asked for", xticks=range(len(words)), xticklabels=words)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[-1, 0].set_xlabel("hidden state of this token")
    plt.show()


def growing_mean(scores: dict[str, np.ndarray], guessing: float) -> None:
    """What a probe reads from the mean of the first k hidden states, [T] by the model's name."""
    _, axis = plt.subplots(figsize=(9, 4))
    for (name, values), colour in zip(scores.items(), (RED, BLUE)):
        axis.plot(range(1, len(values) + 1), values, "o-", color=colour, label=name)
    axis.axhline(guessing, color=GREY, linestyle=":", label="guessing")
    axis.set(xlabel="k: the mean of the first k hidden states",
             ylabel="symbols read (mean of three)",
             ylim=(0, 1), xticks=range(1, len(values) + 1))
    axis.legend(frameon=False, loc="upper left", ncol=3)
    plt.show()


def padded_and_packed(lengths: Sequence[int], is_image: Sequence[bool]) -> None:
    """The same tokens as a padded rectangle, and end to end as one strip.

    lengths: of the records; is_image: for each token of all records, whether an image's.
    """
    longest = max(lengths)
    rectangle = np.full((len(lengths), longest, 3), 0.85)
    strip = np.empty((1, sum(lengths), 3))
    at = 0
    for number, length in enumerate(lengths):
        for token in range(length):
            colour = np.array(to_rgb(BLUE if is_image[at] else RED))
            shade = colour if number % 2 else 1 - (1 - colour) * 0.7  # neighbours differ
            rectangle[number, token] = strip[0, at] = shade
            at += 1

    _, axes = plt.subplots(2, 1, figsize=(13, 5), height_ratios=(5, 1))
    axes[0].imshow(rectangle, aspect="auto", interpolation="nearest")
    axes[0].set(title=f"padded: {len(lengths)} x {longest} = {len(lengths) * longest:,} places",
                ylabel=f"{len(lengths)} records", xlabel="token of the record", yticks=[])
    axes[1].imshow(strip, aspect="auto", interpolation="nearest")
    axes[1].set(title=f"packed: one strip of {sum(lengths):,} tokens", yticks=[],
                xlabel="token of the batch")
    plt.show()
