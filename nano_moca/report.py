"""What a run of stage 1 shows at its end: what the modalities learned from each other.

Tokens could be restored from other tokens alone, and patches from their neighbours. So the report
asks: how many masked tokens are restored with the right picture, a wrong one, and none; and how
well masked patches are restored with all words visible, and with no words. All on records drawn
after the last step's, which are unseen within the first epoch.
"""

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_moca.masking import Corruption, corrupt
from nano_moca.model import Restorer
from nano_moca.processor import Batch, Encoded, Processor
from nano_moca.trainer import World

Items = list[tuple[int, Encoded]]  # (number in the run, record)


@torch.no_grad()
def restore(model: Restorer, corruption: Corruption, world: World, causal: bool
            ) -> tuple[Tensor, Tensor]:
    """The model's answers: the likeliest tokens [R] and the pixels [G, 4704] of what was masked."""

    def answers(hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor, _: Tensor):
        rows = hidden.split(256)  # never all logits at once
        tokens = [(part @ head.to(part.dtype).T).argmax(-1) for part in rows]
        return torch.cat([labels[:0], *tokens]).cpu(), predicted.float().cpu()

    return model(corruption.to(world.device), causal, answers)  # through forward, as FSDP needs


def cross_modal_report(model: Restorer, processor: Processor, items: Items, flags: Any,
                       world: World, causal: bool) -> dict[str, float | None]:
    """Shares of masked tokens restored, squared errors of masked patch groups, by condition.

    items: records that hold an image and words. flags: train_cpt's. A figure is None where nothing
    was masked.
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
        "patch error, words visible": patches(batch, 0.0),
        "patch error, words masked as in training": patches(batch, flags.text_mask),
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

    None if over a tenth of the images keep their place or get an identical one: the "wrong picture"
    score would then partly measure the right picture.
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
    """One column per record: masked, restored, original; below each picture, the words.

    Takes records with one image. A masked group is grey (the model sees noise there), a masked
    token is _; in the second row, [words] and masked groups are the model's. flags: train_cpt's.
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
    for axis, name in zip(axes[:, 0], ("masked", "restored", "original"), strict=True):
        axis.set_ylabel(name)
    if world.main:
        figure.savefig(path, dpi=110)
