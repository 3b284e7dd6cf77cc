"""The pictures of notebooks 8 and 9: what a finished embedder finds, and what the ablations say.

Every function draws what it is given and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import helpers
import matplotlib.pyplot as plt
import numpy as np
from helpers import BLUE, GREY, RED
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

PALE_BLUE, PALE_RED, PALE_GREY = "#a9c4e6", "#e6b0a4", "#dddddd"
SHADES = (GREY, PALE_BLUE, BLUE)  # of models, from the one that knows least
DOT = {"marker": "o", "color": "#222222", "markersize": 6, "markeredgecolor": "white",
       "linestyle": "none"}


def frame(axis: Axes, colour: str) -> None:
    """A frame around a picture that `helpers.show` has drawn."""
    axis.spines[:].set(visible=True, edgecolor=colour, linewidth=5)


def percent(axis: Axes) -> None:
    """An x axis of shares."""
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def draw_family(scenes: Sequence, titles: Sequence[str]) -> Figure:
    """Scenes side by side with their captions below, one cell a line; what differs from the first
    scene is red, and framed in the picture."""
    figure, axes = plt.subplots(1, len(scenes), figsize=(12, 2.2))
    for axis, scene, title in zip(axes, scenes, titles, strict=True):
        helpers.show(axis, scene.image(), title)
        side = scene.image().height
        lines = scene.caption().split(", ")
        for place, (line, cell) in enumerate(zip(lines, scene.cells, strict=True)):
            changed = cell != scenes[0].cells[place]
            axis.text(0.5, -0.2 - 0.27 * place, line, ha="center", va="center", fontsize=12,
                      transform=axis.transAxes, color=RED if changed else "black")
            if changed:
                corner = side * place + 1, 1
                axis.add_patch(plt.Rectangle(corner, side - 3, side - 3, fill=False, color=RED,
                                             linewidth=3))
    return figure


def draw_search(rows: Sequence[tuple[str, str, Sequence[tuple[Image.Image, str, str]]]]) -> Figure:
    """One row per search: what it is headed by, the query, and the nearest pictures, each with a
    title and the colour of its frame ("" for none)."""
    width = max(len(found) for *_, found in rows)
    figure, axes = plt.subplots(len(rows), width + 1, figsize=(13, 1.25 * len(rows)),
                                width_ratios=[1.25, *[1] * width], squeeze=False)
    for line, (heading, query, found) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        line[0].text(0, 1.14, heading, transform=line[0].transAxes, fontweight="bold")
        line[0].text(0, 0.9, query.replace(", ", "\n"), transform=line[0].transAxes, va="top")
        for axis, (image, title, colour) in zip(line[1:], found, strict=False):
            axis.axis("on")
            helpers.show(axis, image)
            axis.set_title(title, fontsize=10)
            if colour:
                frame(axis, colour)
    return figure


def draw_quarters(images: Mapping[str, Image.Image],
                  panels: Mapping[str, Sequence[float]]) -> Figure:
    """Above, a scene as it is and with each quarter covered; below, one panel per model with a bar
    for each of them."""
    figure = plt.figure(figsize=(13, 5))
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 2.7))
    top = grid[0].subgridspec(1, len(images))
    for number, (name, image) in enumerate(images.items()):
        helpers.show(figure.add_subplot(top[number]), image, name)

    below = grid[1].subgridspec(1, len(panels), wspace=0.1)
    for number, (title, values) in enumerate(panels.items()):
        axis = figure.add_subplot(below[number])
        colours = [GREY, *[SHADES[number] if number else PALE_RED] * (len(values) - 1)]
        bars = axis.barh(range(len(values)), values, 0.7, color=colours)
        axis.bar_label(bars, [f"{value:.0%}" for value in values], padding=3)
        axis.set(title=title, xlim=(0, 1.15), yticks=range(len(values)), yticklabels=[])
        if number == 0:
            axis.set_yticklabels(images)
        axis.invert_yaxis()
        percent(axis)
    return figure


def grouped_bars(axis: Axes, groups: Sequence[str], values: Mapping[str, Sequence[float]],
                 colours: Sequence[str], chance: float | None = None,
                 says: str = "{:.0%}") -> None:
    """Horizontal bars: a group per line, in it a bar for each name of `values`; a dotted line at
    what guessing reaches."""
    height = 0.8 / len(values)
    for number, ((name, shares), colour) in enumerate(zip(values.items(), colours, strict=False)):
        places = np.arange(len(groups)) + (number - (len(values) - 1) / 2) * height
        bars = axis.barh(places, shares, height * 0.92, color=colour, label=name)
        axis.bar_label(bars, [says.format(share) for share in shares], padding=3, fontsize=10)
    if chance is not None:
        axis.axvline(chance, color="black", linestyle=":", label="guessing")
    axis.set(yticks=range(len(groups)), yticklabels=groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)


def draw_factors(factors: Sequence[str], beaten: Mapping[str, Sequence[float]],
                 firsts: Mapping[str, float]) -> Figure:
    """Left: how often the right answer beats a twin that differs in one factor. Right: what comes
    first."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(1.2, 1))
    grouped_bars(left, factors, beaten, SHADES[1:], chance=0.5)
    left.set(xlim=(0, 1.12), title="Right answer nearer than a twin that differs in ...")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    bars = right.barh(range(len(firsts)), firsts.values(), 0.7,
                      color=[BLUE, *[RED] * (len(firsts) - 2), PALE_GREY])
    right.bar_label(bars, [f"{share:.0%}" for share in firsts.values()], padding=3)
    right.set(yticks=range(len(firsts)), yticklabels=firsts, xlim=(0, 1.12),
              title="What comes first (both stages)")
    right.invert_yaxis()
    for axis in (left, right):
        percent(axis)
    return figure


def draw_maps(maps: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """One panel per model: scenes (dots) and captions (triangles) on two directions, each pair
    joined; the shares of variance along the directions are at the axes."""
    figure, axes = plt.subplots(1, len(maps), figsize=(12, 4.6))
    for axis, (name, (scenes, captions, shares)) in zip(axes, maps.items(), strict=True):
        axis.plot(*np.stack([scenes, captions]).transpose(2, 0, 1), color="#bbbbbb", linewidth=0.8)
        axis.plot(*scenes.T, "o", color=BLUE, label="scenes", markersize=6)
        axis.plot(*captions.T, "^", color=RED, label="captions", markersize=6)
        axis.set(title=name, xlabel=f"first direction: {shares[0]:.0%} of the variance",
                 ylabel=f"second: {shares[1]:.0%}", aspect="equal", adjustable="datalim")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  frameon=False)
    return figure


def draw_shelves(shelves: Sequence[str], recalls: Mapping[str, Mapping[str, Sequence[float]]]
                 ) -> Figure:
    """One panel per figure, such as recall@1; a group per shelf, a bar per form of query."""
    figure, axes = plt.subplots(1, len(recalls), figsize=(13, 3.6), sharey=True)
    for axis, (title, by_form) in zip(axes, recalls.items(), strict=True):
        grouped_bars(axis, shelves, by_form, (BLUE, PALE_BLUE))
        axis.set(title=title, xlim=(0, 1.15))
        percent(axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  frameon=False)
    return figure


def draw_arms(panels: Mapping[str, tuple[Mapping[str, np.ndarray], float]], full: str) -> Figure:
    """One panel per figure, an arm a line, the same arms in all panels: the mean of its runs as a
    bar, each run as a dot. Dashed: the arm named `full`; dotted: guessing."""
    lines = max(len(arms) for arms, _ in panels.values())
    size = 13 if len(panels) > 1 else 8, 1.5 + 0.45 * lines
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (title, (arms, chance)) in zip(axes[0], panels.items(), strict=True):
        for line, (name, values) in enumerate(arms.items()):
            axis.barh(line, values.mean(), 0.7, color=BLUE if name == full else PALE_BLUE)
            axis.plot(values, [line] * len(values), **DOT)
        if full in arms:
            axis.axvline(arms[full].mean(), color=BLUE, linestyle="--")
        axis.axvline(chance, color=RED, linestyle=":")
        most = max(values.max() for values in arms.values())
        axis.set(title=title, xlim=(0, min(1.03, 1.15 * most)), xlabel="recall@10",
                 yticks=range(len(arms)), yticklabels=arms)
        axis.set_ylim(len(arms) - 0.4, -0.6)

    # All panels have the same arms: their names stand once.
    for axis in axes[0][1:]:
        axis.set_yticklabels([])
    return figure


def draw_signs(rows: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Differences from the full recipe, in points: (name, the paper's, ours, half the width of our
    interval). Ours is blue where the interval leaves zero out."""
    figure, (paper, ours) = plt.subplots(1, 2, figsize=(13, 1.6 + 0.45 * len(rows)), sharey=True)
    for line, (_, theirs, gap, half) in enumerate(rows):
        paper.barh(line, theirs, 0.6, color=GREY)
        clear = abs(gap) > half
        width = 0 if np.isnan(half) else half
        ours.errorbar(gap, line, xerr=width, fmt="o", capsize=5, linewidth=2.5, markersize=8,
                      color=BLUE if clear else GREY)
    for axis, title in ((paper, "the paper"), (ours, "here, with 95 % intervals")):
        axis.axvline(0, color="black", linewidth=1)
        axis.set(title=title, xlabel="points, against the full recipe")
    paper.set(yticks=range(len(rows)), yticklabels=[name for name, *_ in rows])
    paper.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def draw_widths(widths: Mapping[int, float], gaps: Mapping[str, float], have: int) -> Figure:
    """Half the width of an interval by the number of seeds of each arm, in points (log axis), and
    the sizes of some differences: what lies above the curve would be clear of zero."""
    figure, axis = plt.subplots(figsize=(10, 4.2))
    axis.plot(widths.keys(), widths.values(), "o-", color=BLUE, linewidth=2.5)
    axis.fill_between(list(widths), list(widths.values()), 0.1, color=PALE_GREY, alpha=0.5)
    last = max(widths)
    for gap in gaps.values():
        axis.axhline(gap, color=RED, linewidth=1)

    # Names of lines that lie close together move up, so that they can be read.
    lowest = 0.0
    for name, gap in sorted(gaps.items(), key=lambda item: item[1]):
        lowest = max(gap, 1.35 * lowest)
        axis.text(last + 0.1, lowest, name, color=RED, va="center", fontsize=10)
    axis.axvline(have, color=GREY, linestyle="--")
    axis.text(have + 0.05, 0.35, "this table", color=GREY)
    axis.set(yscale="log", xlim=(1.8, last), ylim=(0.3, 100), xlabel="seeds of each arm",
             ylabel="points of recall@10", title="Which differences n seeds can show")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def draw_lengths(steps: Sequence[int], runs: Sequence[np.ndarray], without: np.ndarray,
                 paper: Mapping[int, float], paper_without: float) -> Figure:
    """Scores by the steps of stage 1 on log axes, ours and the paper's; dashed: no stage 1."""
    figure, (ours, theirs) = plt.subplots(1, 2, figsize=(13, 4))
    for step, values in zip(steps, runs, strict=True):
        ours.plot([step] * len(values), values, **DOT)
    ours.plot(steps, [values.mean() for values in runs], "o-", color=BLUE, zorder=0)
    ours.axhline(without.mean(), color=RED, linestyle="--")
    ours.set(ylim=(0, None), title="here: unlabelled symbols", ylabel="recall@10")
    theirs.plot(paper.keys(), paper.values(), "o-", color=GREY)
    theirs.axhline(paper_without, color=RED, linestyle="--")
    theirs.set(title="the paper, 3B: MMEB", ylabel="score")
    for axis, ticks in ((ours, steps), (theirs, paper)):
        axis.set(xscale="log", xlabel="steps of stage 1 (dashed: none)")
        axis.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    return figure
