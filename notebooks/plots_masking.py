"""The pictures of notebook 3: records masked and restored, losses, and what each loss moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from helpers import BLUE, GREY, RED
from matplotlib.axes import Axes
from torch import Tensor

from nano_moca.batch import EncodedRecord
from nano_moca.masking import MaskedBatch
from nano_moca.processor import Processor

Word = tuple[str, str, str]  # what is written, the true word, the colour
View = tuple[np.ndarray, list[Word]]  # a record's picture [height, width, 3], and its words


def views(processor: Processor, record: EncodedRecord, masked: MaskedBatch,
          answers: Sequence[int], pixels: Tensor) -> tuple[View, View, View]:
    """One record as it was, as the model sees it, and as the model restores it.

    masked: a batch of this record alone. answers [R], pixels [G, 4704]: the model's.
    """
    decode = processor.tokenizer.decode
    batch = masked.batch
    original = batch.normalise(batch.pixels).flatten(1)  # [J, 4704]
    was_masked = torch.isin(batch.image_index, masked.group_index)  # [J]
    noisy = original.clone()
    noisy[was_masked] = batch.noise.flatten(1)
    painted = original.clone()
    painted[was_masked] = pixels

    # Words by tokens: what is read, what is seen, what is answered.
    given = dict(zip(masked.text_index.tolist(), answers, strict=True))
    special = set(processor.special_tokens.tolist())
    true_words: list[Word] = []
    seen_words: list[Word] = []
    told_words: list[Word] = []
    for row, token in enumerate(record.tokens.tolist()):
        if token in special:
            continue
        word = decode([token]).strip()
        true_words.append((word, word, "black"))
        if row not in given:
            seen_words.append((word, word, GREY))
            told_words.append((word, word, GREY))
            continue
        shown = int(batch.tokens[row])
        text = "_" * len(word) if shown == processor.mask_token else decode([shown]).strip()
        seen_words.append((text, word, RED))
        answer = decode([given[row]]).strip() or "·"
        told_words.append((answer, word, BLUE if answer == word else RED))

    def as_picture(groups: Tensor) -> np.ndarray:
        patches = groups.reshape(-1, processor.config.vision.patch_values).numpy()
        pixels = processor.unpatchify(patches, record.grids[0])
        return np.round(15 * pixels) / 15  # 16 shades keep the file small

    return ((as_picture(original), true_words), (as_picture(noisy), seen_words),
            (as_picture(painted), told_words))


def draw_words(axis: Axes, words: list[Word], size: float = 12) -> None:
    """The words below a picture, a line for each cell."""
    line = column = 0
    for word, true_word, colour in words:
        if word != ",":
            column += bool(column)  # a space before it
        axis.annotate(word, (0, 0), (0.61 * size * column, -1.3 * size * (line + 1)), color=colour,
                      xycoords="axes fraction", textcoords="offset points", family="monospace",
                      fontsize=size)
        column += len(word)
        if true_word == ",":
            line, column = line + 1, 0


def draw_records(names: Sequence[str], rows: Sequence[Sequence[View]]) -> None:
    """A row of pictures with their words for each of `names`."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), squeeze=False, layout="none",
                                figsize=(3.1 * len(rows[0]), 2.0 * len(rows)))
    for line, name, row in zip(axes, names, rows, strict=True):
        for axis, (picture, words) in zip(line, row, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            draw_words(axis, words)
        line[0].set_ylabel(name)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.99, bottom=0.5 / len(rows),
                           hspace=0.85, wspace=0.1)
    plt.show()


def draw_losses(history: Sequence[tuple[float, float]], uniform: float, constant: float) -> None:
    """Both losses of a run by step, beside what guessing costs."""
    _, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    titles = "MLM: masked words", "MAE: masked patch groups"
    guesses = (uniform, "uniform guess"), (constant, "the best constant")
    for axis, values, title, (level, name) in zip(axes, np.array(history).T, titles, guesses):
        axis.plot(values, color="#c9d3e6", linewidth=1)
        means = np.convolve(values, np.ones(20) / 20, "valid")
        axis.plot(range(19, len(values)), means, color=BLUE, linewidth=2.5,
                  label="mean of the last 20 steps")
        axis.axhline(level, color=RED, linestyle="--", linewidth=2, label=name)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend(frameon=False)
    axes[0].set_ylabel("cross entropy")
    axes[1].set_ylabel("mean squared error")
    plt.show()


def draw_shares(kinds: Sequence[str], counts: Sequence[int], shares: dict[str, Sequence[float]],
                ylabel: str) -> None:
    """Groups of bars: for each kind of word, a share per condition."""
    _, axis = plt.subplots(figsize=(11, 4))
    width = 0.8 / len(shares)
    colours = (BLUE, RED, "#c9c9c9") if len(shares) > 2 else (BLUE, "#c9c9c9")
    for number, ((name, values), colour) in enumerate(zip(shares.items(), colours)):
        places = np.arange(len(kinds)) + (number - (len(shares) - 1) / 2) * width
        bars = axis.bar(places, values, 0.93 * width, color=colour, label=name)
        axis.bar_label(bars, [f"{value:.0%}" for value in values], fontsize=10, padding=2)
    axis.set_xticks(range(len(kinds)), [f"{k}\n({n})" for k, n in zip(kinds, counts)])
    axis.set(ylabel=ylabel, ylim=(0, 1.15), yticks=(0, 0.5, 1))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(frameon=False, loc="upper right", ncols=len(shares))
    plt.show()


def draw_reach(norms: dict[str, Sequence[float]], moves: dict[str, Sequence[float]],
               parts: Sequence[str]) -> None:
    """Left the gradient's norm in each part by loss, right the way that AdamW moves it."""
    _, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    titles = "Norm of the gradient", "Distance moved in ten steps of AdamW"
    for axis, values, title in zip(axes, (norms, moves), titles):
        for shift, (name, numbers), colour in zip((-0.2, 0.2), values.items(), (BLUE, RED)):
            bars = axis.barh(np.arange(len(parts)) + shift, numbers, 0.38, color=colour, label=name)
            axis.bar_label(bars, ["none" if x < 1e-3 else f"{x:.2f}" for x in numbers],
                           fontsize=10, padding=3)
        axis.set_title(title)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(parts)), parts)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, loc="lower right")
    plt.show()


def report_table(rows: dict[str, Any], heads: Sequence[str]) -> None:
    """Print rows of figures below their heads."""
    print(f"{'':44s}" + "".join(f"{head:>16s}" for head in heads))
    for name, values in rows.items():
        print(f"{name:44s}" + "".join(f"{value:16.3f}" for value in values))
