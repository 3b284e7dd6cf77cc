"""Draw how the two stages work: `python notebooks/stages.py`, from the repository's root.

The parts are real: a record, what masking.py masks of it, the patterns of attention.py, a batch of
batches.py and what its queries are compared with. Only the circle of unit vectors is a sketch.
"""

from __future__ import annotations

import io
import sys
import textwrap
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from helpers import BLUE, GREY, RED, token_names, with_palette
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.textpath import TextPath
from PIL import Image
from torch import eye, zeros

import train_cl
import train_cpt
from nano_moca.attention import Segments, reference_attention
from nano_moca.batch import KINDS
from nano_moca.batches import PairBatches
from nano_moca.builtin import BuiltinRecords, builtin_tasks
from nano_moca.config import BASE
from nano_moca.families import load_config
from nano_moca.masking import mask_batch
from nano_moca.processor import Processor

FILE = Path(__file__).resolve().parent / "figures" / "stages.png"
WIDTH, HEIGHT, LEFT, RIGHT = 1200, 1228, 40, 1160  # hundredths of an inch
INK, PALE, PINK, MIST, LINE = "#222222", "#e4edf7", "#fbe8e4", "#eff0f2", "#c4c8ce"
MASK = "_"  # what the mask token looks like here
SOFT = "#666666"  # of what is said beside: subtitles, files
RECORD, TASK, DRAW, PAIRS = 1137, "caption-to-scene", 132, 4  # what is shown of the built-in data


class Sheet:
    """A page whose y runs downwards, and the few things that are drawn on it."""

    def __init__(self) -> None:
        self.figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 11.5, color: str = INK,
             ha: str = "left", **more: str) -> None:
        """Words beside a point, or around it; names of files are small and grey."""
        if text.endswith(".py"):
            size, color, more = 10, SOFT, {"family": "monospace"}
        self.axes.text(x, y, text, size=size, color=color, ha=ha, va="center", zorder=4, **more)

    def box(self, x: float, y: float, width: float, height: float, fill: str = PALE,
            edge: str = "none", radius: float = 5) -> None:
        """A rectangle with round corners."""
        style = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, fc=fill, ec=edge, lw=1.4,
                                           zorder=3))

    def part(self, x: float, y: float, end: float, title: str, more: str, file: str) -> None:
        """A part of the model: its name, a few words, its file."""
        self.box(x, y, end - x, 36)
        self.text(x + 12, y + 18, title, weight="bold")
        self.text(x + 24 + width_of(title, "bold"), y + 18, more)
        self.text(end - 12, y + 18, file, ha="right")

    def arrow(self, x: float, y: float, to_x: float, to_y: float, color: str = GREY) -> None:
        """From one point to another."""
        self.axes.add_patch(FancyArrowPatch(
            (x, y), (to_x, to_y), arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0,
            color=color, lw=1.4, zorder=3))

    def picture(self, pixels: np.ndarray | Image.Image, x: float, y: float, width: float,
                edge: str = "none") -> None:
        """A picture, framed or not."""
        rows, columns = np.asarray(pixels).shape[:2]
        height = width * rows / columns
        self.axes.imshow(pixels, extent=(x, x + width, y + height, y), zorder=2)
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="auto")
        self.box(x, y, width, height, "none", edge, 0)

    def head(self, y: float, number: int, title: str, file: str, text: str) -> None:
        """A stage's title, the script that runs it, and what it does."""
        self.axes.add_patch(Circle((LEFT + 17, y), 17, fc=BLUE))
        self.text(LEFT + 17, y, str(number), 15, "white", "center", weight="bold")
        self.text(LEFT + 48, y, title, 17, weight="bold")
        self.text(RIGHT, y, file, ha="right")
        self.text(LEFT + 48, y + 30, text, 12, SOFT)

    def formula(self, x: float, y: float, end: float, text: str, files: str) -> None:
        """A stage's loss, and where it is computed."""
        self.box(x, y - 20, end - x, 40, radius=20)
        self.text((x + end) / 2, y, text, 13, ha="center", weight="bold")
        self.text((x + end) / 2, y + 35, files, ha="center")


def width_of(text: str, weight: str = "normal") -> float:
    """How wide a text is on the sheet."""
    path = TextPath((0, 0), text, size=11.5, prop=FontProperties(weight=weight))
    return path.get_extents().width * 100 / 72


def pattern(length: int, causal: bool) -> np.ndarray:
    """Which tokens (columns) each token sees: the weights of attention.py where all are alike."""
    alike, own = zeros(length, 1, 1), eye(length)[:, None]
    segments = Segments.of((length,))
    return reference_attention(alike, alike, own, segments, causal)[:, 0].numpy() > 0


def draw_stage_1(sheet: Sheet, processor: Processor) -> None:
    """Down the page: a record, what is masked of it, the decoder, and what has to be restored."""
    flags, batch = train_cpt.Flags, processor.batch([BuiltinRecords()[RECORD]])
    masked = mask_batch(batch, processor, flags.text_mask, flags.image_mask, [(0, RECORD)],
                        flags.unhidden)
    masked_tokens = {*masked.text_index.tolist(), *masked.group_index.tolist()}
    names, images = token_names(processor, batch.tokens.tolist()), batch.image_index.tolist()
    shown = token_names(processor, masked.batch.tokens.tolist())  # "_" where the mask token is
    shown = [MASK if token == processor.mask_token else name
             for name, token in zip(shown, masked.batch.tokens.tolist(), strict=True)]
    words, grid = range(images[-1] + 2, len(names) - 1), batch.grids[0].tolist()
    clear, seen = (processor.unpatchify(part.patches.numpy(), grid)
                   for part in (batch, masked.batch))
    step = processor.config.vision.patch * processor.config.vision.merge  # pixels of a group
    groups = [(slice(y, y + step), slice(x, x + step)) for y in range(0, len(clear), step)
              for x in range(0, clear.shape[1], step)]
    for row, group in zip(images, groups, strict=True):
        if row in masked_tokens:  # noise has colours, which would draw all eyes
            seen[group] = seen[group].mean(-1, keepdims=True)

    size, side = 25, 168  # of a token and of a picture
    high = side * len(clear) / clear.shape[1]
    widths = np.array([size if row in images else max(width_of(name), width_of(shown[row])) + 12
                       for row, name in enumerate(names)])
    gap = (RIGHT - LEFT - widths.sum()) / (len(names) - 1)
    lefts = LEFT + np.cumsum(widths + gap) - widths - gap
    middles, rights = lefts + widths / 2, lefts + widths
    first, last = lefts[images[0]], rights[images[-1]]  # of the picture's tokens
    start, end = lefts[words[0]], rights[words[-1]]

    sheet.head(44, 1, "Continual pre-training", "train_cpt.py",
               "Hide parts of pictures and of the words beside them, and restore each from all "
               "that is left, before it and after it.")
    x = start
    for fill, edge, label in ((MIST, "none", "seen"), (PINK, RED, "masked"),
                              ("white", BLUE, "to be restored")):
        sheet.box(x, 106, 28, 18, fill, edge)
        sheet.text(x + 38, 115, label)
        x += 66 + width_of(label)
    shares = [f"{100 * rate:.0f} %" for rate in (flags.image_mask, flags.text_mask)]
    sheet.text(first, 115, f"{shares[0]} of the 2x2 groups of patches become noise")
    kept = f"{100 * flags.unhidden:.0f} %"
    sheet.text(start, 162, f"{shares[1]} of the words are masked: most of them become {MASK},")
    sheet.text(start, 182, f"{kept} of them become a random one, {kept} stay as they are")
    sheet.text((first + last) / 2, 222, "masking.py", ha="center")
    sheet.text(end, 222, "masking.py", ha="right")
    sheet.picture(clear, first, 142, side)
    sheet.picture(seen, last - side, 142, side)
    sheet.arrow(first + side + 10, 142 + high / 2, last - side - 10, 142 + high / 2)
    sheet.arrow(last - side / 2, 142 + high + 2, last - side / 2, 281)
    sheet.part(first, 282, last, "ViT", "", "model.py")

    for row, name in enumerate(names):
        x, width, middle, gone = lefts[row], widths[row], middles[row], row in masked_tokens
        color, ink = (RED, RED) if gone else (LINE, INK)
        sheet.arrow(middle, 373, middle, 397, color)
        if gone:
            sheet.arrow(middle, 510, middle, 539, RED)
            sheet.arrow(middle, 576, middle, 603, BLUE)
        if row in images:
            group, edge = groups[row - images[0]], RED if gone else "none"
            sheet.arrow(middle, 318, middle, 345, color)
            sheet.picture(seen[group], x, 346, size, edge)
            if gone:
                zoom = side / clear.shape[1]
                sheet.box(last - side + zoom * group[1].start, 142 + zoom * group[0].start,
                          zoom * step, zoom * step, "none", RED, 0)
                sheet.picture(clear[group], x, 604, size, BLUE)
            continue
        sheet.box(x, 346, width, size, PINK if gone else MIST, RED if gone else "none")
        sheet.text(middle, 358, shown[row], color=ink, ha="center")
        if row in words:
            sheet.text(middle, 258, name, color=ink, ha="center")
            sheet.arrow(middle, 272, middle, 345, color)
        if gone:
            sheet.box(x, 604, width, size, "white", BLUE)
            sheet.text(middle, 616, name, color=BLUE, ha="center")

    sheet.box(LEFT, 398, RIGHT - LEFT, 112)
    sheet.text(first + 12, 444, "Decoder", weight="bold")
    sheet.text(first + 12, 466, "model.py")
    sheet.text(end - 12, 454, "attention.py", ha="right")
    for x, causal, told in ((320, True, "before: a token sees\nnothing that follows it"),
                            (716, False, "now: every token\nsees every token")):
        for (i, j), sees in np.ndenumerate(pattern(9, causal)):
            sheet.box(x + 9 * j, 414 + 9 * i, 8, 8, BLUE if sees else "white", radius=0)
        sheet.text(x + 98, 454, told)
    sheet.arrow(630, 454, 694, 454)
    sheet.part(LEFT, 540, last, "Patch decoder", "thrown away after stage 1", "model.py")
    sheet.part(start, 540, end, "Output head", "", "model.py")
    left, right = "MAE: squared error of pixels", "MLM: cross entropy of words"
    sheet.text(first, 664, left)
    sheet.text(end, 664, right, ha="right")
    sheet.arrow(first + width_of(left) + 14, 664, 467, 664)
    sheet.arrow(end - width_of(right) - 14, 664, 733, 664)
    sheet.formula(468, 664, 732, f"loss = MLM + {flags.mae_weight} MAE", "losses.py, kernels.py")


def draw_stage_2(sheet: Sheet, processor: Processor) -> None:
    """Across the page: pairs of one task, their unit vectors, and who is compared with whom."""
    flags, task = train_cl.Flags, builtin_tasks()[TASK]
    drawn = next(PairBatches({TASK: task}, processor, PAIRS, flags.max_tokens,
                             flags.hard_negatives, DRAW))
    answers = [item.images[0] for item in drawn.records[PAIRS:]]  # and their twins
    twins = len(answers) // PAIRS - 1  # of each query
    sheet.box(LEFT, 730, RIGHT - LEFT, 1, LINE, radius=0)
    sheet.head(776, 2, "Contrastive fine-tuning", "train_cl.py",
               "Pull each query towards its answer, and away from all other answers of the batch "
               "and from near twins (hard negatives).")
    x = LEFT
    for kind in KINDS:
        chosen, width = kind == task.kind, width_of(kind) + 28
        sheet.box(x, 836, width, 28, BLUE if chosen else MIST, radius=14)
        sheet.text(x + width / 2, 850, kind, color="white" if chosen else INK, ha="center")
        x += width + 8
    sheet.text(x + 10, 850, "three kinds of pairs; every step is of one task")
    sheet.text(RIGHT, 850, "batches.py", ha="right")

    top, step, size, cell, grid = 922, 62, 42, 31, 782
    wide, bottom, gap = 3 * size, top + step * (PAIRS - 1) + size, 6
    across = (RIGHT - grid - gap) / len(answers)  # of a column of the matrix
    for x, label in ((LEFT + 20, "query"), (242, "answer"), (250 + wide, "near twin"),
                     (grid, "answers"), (grid + across * PAIRS + gap, "near twins of each")):
        sheet.text(x, top - 18, label, color=SOFT)
    for i, query in enumerate(drawn.records[:PAIRS]):
        y, told = top + step * i, processor.tokenizer.decode(query.tokens.tolist())
        wanted, named = told.split(": ")
        told = f"{wanted}:\n{textwrap.fill(named, 24)}"
        sheet.text(LEFT, y + size / 2, str(i + 1), color=GREY)
        sheet.text(grid - 18, top + cell * (i + 1.5), str(i + 1), color=GREY)
        sheet.text(LEFT + 20, y + size / 2, told, 10)
        sheet.picture(answers[i], 242, y, wide, BLUE)
        for k in range(twins):
            sheet.picture(answers[PAIRS + twins * i + k], 250 + (wide + 8) * (k + 1) - 8, y, wide,
                          RED)

    x, y, radius = 690, (top + bottom) / 2, 44
    sheet.box(526, top, 88, bottom - top)
    sheet.text(570, y - 12, "the same\nmodel", ha="center", weight="bold")
    sheet.text(570, y + 24, "model.py", ha="center")
    sheet.text(x, top + 26, "mean of the\nhidden states,\nat unit length", ha="center")
    sheet.axes.add_patch(Circle((x, y), radius, fc="none", ec=LINE, lw=1.4))
    for angle, color in ((150, LINE), (215, LINE), (280, LINE), (-15, RED), (95, RED), (25, BLUE),
                         (50, INK)):
        turn = np.radians(angle)
        sheet.arrow(x, y, x + radius * np.cos(turn), y - radius * np.sin(turn), color)
    sheet.text(x + 26, y - 46, "query", 10)
    for begin, end in ((506, 525), (615, 641), (738, 757)):
        sheet.arrow(begin, y, end, y)

    colors = {"its answer": BLUE, "its near twin": RED, "the others' answers": LINE,
              "not compared": "white"}
    for j, picture in enumerate(answers):
        x = grid + across * j + gap * (j >= PAIRS)
        sheet.picture(picture, x + 1, top + 10, across - 2)
        for i, pair in enumerate(drawn.local_index.tolist()):
            kind = ("not compared" if drawn.excluded[i, j] else "its near twin" if j >= PAIRS
                    else "its answer" if j == pair else "the others' answers")
            sheet.box(x + 1, top + cell * (i + 1) + 1, across - 2, cell - 2, colors[kind],
                      LINE if drawn.excluded[i, j] else "none", 3)
    for index, (kind, color) in enumerate(colors.items()):
        x, y = grid + 190 * (index % 2), top + 170 + 23 * (index // 2)
        sheet.box(x + 1, y, 14, 14, color, LINE if color == "white" else "none", 3)
        sheet.text(x + 24, y + 7, kind)
    sheet.formula(grid, top + 248, RIGHT,
                  f"InfoNCE = \u2212log softmax(cos / {flags.temperature})", "losses.py")


def both_stages() -> Figure:
    """On one sheet."""
    processor, sheet = Processor.load(BASE, load_config(BASE)), Sheet()
    draw_stage_1(sheet, processor)
    draw_stage_2(sheet, processor)
    return sheet.figure


def draw_stages(path: Path = FILE) -> None:
    """Both stages as a file, in 256 colours."""
    figure, file = both_stages(), io.BytesIO()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    with_palette(Image.open(file).convert("RGB")).save(path, "png", optimize=True)


if __name__ == "__main__":
    draw_stages()
