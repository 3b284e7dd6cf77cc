"""What a run of stage 1 shows at its end: what the modalities learned from each other, in figures and a picture.

Restoring words could be done from words alone, and patches from their neighbours. So the report asks twice: how many
hidden words come back beside the right picture, a wrong one, and none; and how well hidden patches come back with the
words in clear, and with no words. All on records drawn after the last step's (unseen within the first epoch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nano_moca.masking import Corruption, corrupt
from nano_moca.model import Restorer
from nano_moca.processor import Batch, Encoded, Processor
from nano_moca.trainer import World


@dataclass
class Restored:
    """What the model answers: the likeliest token at each hidden one, the pixels of each hidden group."""

    tokens: Tensor  # [R] int64
    pixels: Tensor  # [G, 4704] float32


@torch.no_grad()
def restore(model: Restorer, corruption: Corruption, world: World, causal: bool = False) -> Restored:
    """Run the model on a corrupted batch and read off its answers (through its forward, as FSDP needs)."""
    def answers(hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor, target: Tensor) -> tuple:
        tokens = [(rows @ head.T).argmax(-1).cpu() for rows in hidden.split(256)]  # [R] in pieces: no [R, V]
        return (torch.cat(tokens) if tokens else labels.cpu()), predicted.float().cpu()

    return Restored(*model(corruption.to(world.device), causal, answers))


def cross_modal_report(model: Restorer, processor: Processor, items: list[tuple[int, Encoded]],
                       rates: tuple[float, float], seed: int, world: World) -> dict:
    """Shares of hidden words restored, and mean squared errors of hidden patch groups, under each condition.

    items: encoded records that hold an image and words, with their keys.
    rates: text and image mask rates. A figure is None where nothing was hidden.
    """
    model.eval()
    keys = [(seed, 1 << 40, key) for key, _ in items]
    batch = processor.pack([item for _, item in items])
    text_rate, image_rate = rates

    def words(batch: Batch) -> float | None:
        corruption = corrupt(batch, processor, text_rate, 0.0, keys)
        right = restore(model, corruption, world).tokens == corruption.labels
        return float(right.float().mean()) if len(right) else None

    def groups(batch: Batch, text_rate: float) -> float | None:
        corruption = corrupt(batch, processor, text_rate, image_rate, keys)
        error = (restore(model, corruption, world).pixels - corruption.target).square().mean(1)
        return float(error.mean()) if len(error) else None

    special = processor.special_tokens.numpy()
    wordless = processor.pack([only(item, special, words=False) for _, item in items])
    pictureless = processor.pack([only(item, special, words=True) for _, item in items])
    target = corrupt(batch, processor, 0.0, image_rate, keys).target
    report = {
        "words, right picture": words(batch),
        "words, wrong picture": words(replace(batch, patches=other_pictures(batch))),
        "words, no picture": words(pictureless),
        "patches, words in clear": groups(batch, 0.0),
        "patches, words hidden as in training": groups(batch, text_rate),
        "patches, no words": groups(wordless, 0.0),
        "patches, best constant": float((target - target.mean(0)).square().mean()) if len(target) else None,
    }
    model.train()
    return report


def only(item: Encoded, special: np.ndarray, words: bool) -> Encoded:
    """A record's words without its images, or its images without its words. Positions stay as they were."""
    keep = np.isin(item.tokens, special) != words  # [L]
    item = replace(item, tokens=item.tokens[keep], positions=item.positions[:, keep])
    return replace(item, patches=item.patches[:0], grids=[]) if words else item


def other_pictures(batch: Batch) -> Tensor:
    """The patches [P, 1176] with each image in the place of another of the same size, where there is one."""
    sizes = batch.grids.prod(1)
    images = list(batch.patches.split(sizes.tolist()))
    swapped = list(images)
    for grid in {tuple(grid) for grid in batch.grids.tolist()}:
        same = [i for i, other in enumerate(batch.grids.tolist()) if tuple(other) == grid]
        for to, source in zip(same, same[1:] + same[:1], strict=True):
            swapped[to] = images[source]
    return torch.cat(swapped)


def unpatchify(patches: np.ndarray, grid: tuple[int, int, int], processor: Processor) -> np.ndarray:
    """Rows of patches [P, 1176] back to an image [height, width, 3] in 0..1: the second frame is dropped."""
    vision = processor.config.vision
    _, rows, columns = grid
    m, p = vision.merge, vision.patch
    cut = patches[: rows * columns].reshape(rows // m, columns // m, m, m, 3, vision.frames, p, p)[..., 0, :, :]
    pixels = cut.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * p, columns * p, 3)
    return np.clip(pixels * processor.std + processor.mean, 0, 1)


def plot_restorations(path: Path, model: Restorer, processor: Processor, items: list[tuple[int, Encoded]],
                      rates: tuple[float, float], seed: int, world: World) -> None:
    """Records with one image as columns: hidden, restored, original; below, the words. Call on all ranks.

    A hidden group is drawn grey (the model sees noise there); a restored picture keeps the groups that were seen.
    Hidden words are _ in the first row, [restored] in the second.
    """
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model.eval()
    columns = len(items)
    figure, axes = plt.subplots(3, columns, figsize=(2.3 * columns, 8.6), squeeze=False)
    for column, (key, item) in enumerate(items):
        batch = processor.pack([item])
        corruption = corrupt(batch, processor, *rates, [(seed, 1 << 40, key)])
        answer = restore(model, corruption, world)
        hidden = torch.isin(batch.image_rows, corruption.group_rows).numpy()  # [G_all]
        original = item.patches.reshape(len(hidden), -1)  # [G_all, 4704]
        masked, restored = original.copy(), original.copy()
        masked[hidden] = 0.0  # CLIP's mean colour: grey
        restored[hidden] = answer.pixels.numpy()
        answered = batch.tokens.clone()
        answered[corruption.text_rows] = answer.tokens
        hides = {int(row) for row in corruption.text_rows}
        rows = [row for row, token in enumerate(batch.tokens.tolist()) if token not in processor.special_tokens]
        words = [[processor.tokenizer.decode([int(tokens[row])]) for row in rows] for tokens in
                 (batch.tokens, answered, batch.tokens)]
        words[0] = [" _" if row in hides else word for row, word in zip(rows, words[0], strict=True)]
        words[1] = [f" [{word.strip()}]" if row in hides else word for row, word in zip(rows, words[1], strict=True)]
        for axis, patches, text in zip(axes[:, column], (masked, restored, original), words, strict=True):
            axis.imshow(unpatchify(patches.reshape(-1, item.patches.shape[1]), item.grids[0], processor))
            axis.set_xlabel(textwrap.fill("".join(text).strip(), 30), fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("hidden", "restored", "original"), strict=True):
        axis.set_ylabel(name)
    figure.tight_layout()
    if world.main:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    model.train()
