"""Draw the journey of one batch: `python notebooks/journey.py`, from the repository's root.

A real batch goes through the real model, and each box shows a tensor that was met on the way: its
letters, as the glossary in nano_moca/__init__.py explains them, and the shape that it had. No
number in the picture is typed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from helpers import BLUE, GREY
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import nano_moca
import train_cl
import train_cpt
from nano_moca.batches import PairBatches
from nano_moca.builtin import BuiltinRecords, builtin_tasks
from nano_moca.config import BASE
from nano_moca.losses import info_nce, masked_reconstruction_loss
from nano_moca.masking import mask_batch
from nano_moca.model import ReconstructionModel, pool

WIDTH, HEIGHT = 1100, 1110  # hundredths of an inch
INK, SOFT, PALE, MIST, PINK = "#222222", "#666666", "#e4edf7", "#eff0f2", "#fbe8e4"
RECORDS, PAIRS = 8, 8  # what is packed into a batch of either stage


@dataclass
class Met:
    """A tensor on the way: what it is called, its letters, and the shape that it had."""

    name: str
    letters: str  # such as "T, D"; empty for a scalar
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        count = len(self.letters.split(", ")) if self.letters else 0
        assert count == len(self.shape), f"{self.name} [{self.letters}] has shape {self.shape}"


def met(name: str, letters: str, tensor: torch.Tensor) -> Met:
    """What was met, of a tensor."""
    return Met(name, letters, tuple(tensor.shape))


def stage_1() -> dict[str, Met]:
    """A step of train_cpt.py, line by line, up to its loss."""
    moca = nano_moca.load(BASE, "cpu")
    processor, flags = moca.processor, train_cpt.Flags
    model = ReconstructionModel(moca.model)
    model.patch_decoder.init_from(moca.model.language, 0)

    # The records, packed and masked.
    records = [processor.encode(BuiltinRecords()[number]) for number in range(RECORDS)]
    batch = processor.pack(records)
    keys = [(0, number) for number in range(RECORDS)]
    masked = mask_batch(batch, processor, flags.text_mask, flags.image_mask, keys, flags.unhidden)

    # What ReconstructionModel.forward does with them.
    image_tokens = moca.model.visual(masked.batch.patches, batch.layout)
    inputs = moca.model.embed_inputs(masked.batch)
    hidden = moca.model(masked.batch, causal=False)
    text_hidden = hidden[masked.text_index]
    logits = text_hidden @ moca.model.head.T
    pixels = model.patch_decoder(hidden, masked.batch, masked.group_index)
    losses = masked_reconstruction_loss(text_hidden, moca.model.head, masked.labels, pixels,
                                        masked.target)
    torch.testing.assert_close(losses, model(masked, causal=False))
    return {
        "tokens": met("token ids", "T", masked.batch.tokens),
        "embedded": met("embeddings", "T, D", moca.model.language.embed_tokens(batch.tokens)),
        "patches": met("patches", "P, 1176", masked.batch.patches),
        "image tokens": met("image tokens", "J, D", image_tokens),
        "inputs": met("inputs", "T, D", inputs), "hidden": met("hidden states", "T, D", hidden),
        "at masked": met("at masked tokens", "R, D", text_hidden),
        "logits": met("logits", "R, V", logits),
        "pixels": met("pixels", "G, 4704", pixels),
        "mlm": met("MLM", "", losses[0]), "mae": met("MAE", "", losses[1])}


def stage_2() -> dict[str, Met]:
    """A step of train_cl.py, up to its loss."""
    moca = nano_moca.load(BASE, "cpu")
    flags = train_cl.Flags
    tasks = {"caption-to-scene": builtin_tasks()["caption-to-scene"]}
    drawn = next(PairBatches(tasks, moca.processor, PAIRS, flags.max_tokens,
                             flags.hard_negatives, 0))
    batch = moca.processor.pack(drawn.records)

    # What VLM.embed does with them, and the loss.
    hidden = moca.model(batch, causal=False)
    means = pool(hidden, batch, "mean")
    vectors = moca.model.embed(batch, causal=False, pooling="mean")
    n = len(drawn.local_index)
    queries, positives, negatives = vectors.split([n, n, len(vectors) - 2 * n])
    candidates = torch.cat([positives, negatives])
    loss, _ = info_nce(queries, positives, negatives, drawn.local_index, drawn.excluded,
                       flags.temperature)
    return {
        "hidden": met("hidden states", "T, D", hidden), "means": met("means", "N, D", means),
        "vectors": met("unit vectors", "N, D", vectors), "queries": met("queries", "B, D", queries),
        "candidates": met("candidates", "B + M, D", candidates),
        "cosines": met("cosines", "B, B + M", queries @ candidates.T),
        "loss": met("InfoNCE", "", loss)}


def glossary(letters: str) -> dict[str, str]:
    """What nano_moca/__init__.py says of these letters, up to the first stop."""
    meanings = {}
    for letter in letters:
        (line,) = re.findall(rf"^    {letter}    (.+)$", nano_moca.__doc__, re.MULTILINE)
        meanings[letter] = re.split(r"[;:]|, so", line)[0]
    return meanings


class Sheet:
    """A page whose y runs downwards: boxes of tensors, arrows with what happens between them."""

    def __init__(self) -> None:
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 12.5, color: str = INK,
             ha: str = "left", **more: str) -> None:
        """Words at a point."""
        self.axes.text(x, y, text, size=size, color=color, ha=ha, va="center", zorder=4, **more)

    def tensor(self, x: float, y: float, what: Met, fill: str = PALE, width: float = 172) -> None:
        """A box around a point: the name, the letters, and the shape of this batch."""
        style = "round,pad=0,rounding_size=6"
        self.axes.add_patch(FancyBboxPatch((x - width / 2, y - 36), width, 72, style, fc=fill,
                                           ec="none", zorder=3))
        letters = f"[{what.letters}]" if what.letters else "one number"
        shape = " x ".join(f"{size:,}" for size in what.shape)
        self.text(x, y - 20, what.name, 12, ha="center")
        self.text(x, y + 2, letters, 14, BLUE, "center", weight="bold", family="monospace")
        self.text(x, y + 24, shape, 11, SOFT, "center")

    def arrow(self, start: tuple[float, float], end: tuple[float, float], told: str = "",
              ha: str = "center", aside: float = 0) -> None:
        """From one point to another, with what happens on the way beside it."""
        self.axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14,
                                            shrinkA=0, shrinkB=0, color=GREY, lw=1.6, zorder=2))
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        self.text(x + aside, y, told, 11, INK, ha)


def draw_journey() -> Figure:
    """Stage 1 above, stage 2 below it, the letters beneath."""
    sheet = Sheet()
    with torch.no_grad():
        first, second = stage_1(), stage_2()
    left, middle, right, last = 120, 390, 660, 960
    rows = 150, 290, 430
    sheet.text(34, 40, f"1  Stage 1: {RECORDS} records packed into one batch", 18, weight="bold")
    sheet.text(34, 72, "No padding: the tokens of all records stand end to end, and so do the "
               "patches of all images.", 12.5, SOFT)

    # Two ways in, which meet.
    sheet.tensor(left, rows[0], first["patches"], MIST)
    sheet.tensor(middle, rows[0], first["image tokens"])
    sheet.tensor(left, rows[1], first["tokens"], MIST)
    sheet.tensor(middle, rows[1], first["embedded"])
    sheet.tensor(right, rows[0] + 70, first["inputs"])
    sheet.tensor(last, rows[0] + 70, first["hidden"])
    across = 86
    sheet.arrow((left + across, rows[0]), (middle - across, rows[0]), "vision\ntower\n\n")
    sheet.arrow((left + across, rows[1]), (middle - across, rows[1]), "look up\n\n")
    sheet.arrow((middle + across, rows[0]), (right - across, rows[0] + 58))
    sheet.arrow((middle + across, rows[1]), (right - across, rows[0] + 82))
    sheet.text(middle + 100, rows[0] - 14, "image tokens go\nto their places", 11)
    sheet.arrow((right + across, rows[0] + 70), (last - across, rows[0] + 70),
                "decoder,\nboth ways\n\n")

    # Two ways out, and back from right to left.
    sheet.tensor(right, rows[2], first["at masked"])
    sheet.tensor(middle, rows[2], first["logits"])
    sheet.tensor(left, rows[2], first["mlm"], PINK)
    sheet.tensor(right, rows[2] + 120, first["pixels"])
    sheet.tensor(left, rows[2] + 120, first["mae"], PINK)
    sheet.arrow((last, rows[0] + 107), (right + across, rows[2]))
    sheet.text(last - 122, rows[2] - 122, "the rows of\nmasked tokens", 11, ha="right")
    sheet.arrow((last + 40, rows[0] + 107), (right + across, rows[2] + 120))
    sheet.text(last - 52, rows[2] + 12, "patch decoder,\nat masked groups", 11)
    sheet.arrow((right - across, rows[2]), (middle + across, rows[2]), "output\nhead\n\n")
    sheet.arrow((middle - across, rows[2]), (left + across, rows[2]), "cross\nentropy\n\n")
    sheet.arrow((right - across, rows[2] + 120), (left + across, rows[2] + 120),
                "squared error against the pixels\nthat were masked, [G, 4704] too\n\n")
    sheet.text(middle, rows[2] + 52, "(never all at once: losses.py)", 11, SOFT, "center")
    sheet.text(right, rows[2] + 172, "(the patch decoder is thrown away after stage 1)", 11, SOFT,
               "center")

    # Stage 2 ends in vectors instead.
    top = 664
    sheet.axes.plot([34, WIDTH - 34], [top - 20] * 2, color="#c4c8ce", lw=1)
    pairs, negatives = second["queries"].shape[0], second["candidates"].shape[0]
    sheet.text(34, top + 14, f"2  Stage 2: {pairs} pairs with {negatives - pairs} hard negatives",
               18, weight="bold")
    sheet.text(34, top + 46, "The same way up to the hidden states; then one vector per record.",
               12.5, SOFT)
    y = top + 120
    sheet.tensor(left, y, second["hidden"])
    sheet.tensor(middle, y, second["means"])
    sheet.tensor(right, y, second["vectors"])
    sheet.arrow((left + across, y), (middle - across, y), "mean of\na record\n\n")
    sheet.arrow((middle + across, y), (right - across, y), "to length\n1\n\n")
    sheet.tensor(last, y - 42, second["queries"])
    sheet.tensor(last, y + 42, second["candidates"])
    sheet.arrow((right + across, y), (last - across, y - 42))
    sheet.arrow((right + across, y), (last - across, y + 42))
    sheet.tensor(right, y + 132, second["cosines"])
    sheet.tensor(left, y + 132, second["loss"], PINK)
    sheet.arrow((last, y + 79), (right + across, y + 132), "")
    sheet.text(last - 72, y + 138, "each query by\neach candidate", 11)
    sheet.arrow((right - across, y + 132), (left + across, y + 132),
                "divided by the temperature; cross\nentropy of finding the own answer\n\n")

    # The letters, in three columns.
    meanings = glossary("NTPJRGVDBM")
    for number, (letter, meaning) in enumerate(meanings.items()):
        x, line = 40 + 540 * (number // 5), 998 + 22 * (number % 5)
        sheet.text(x, line, letter, 13, BLUE, weight="bold", family="monospace")
        sheet.text(x + 26, line, meaning, 12)
    return sheet.figure


if __name__ == "__main__":
    draw_journey().savefig(Path(__file__).resolve().parent / "figures" / "journey.png", dpi=100)
