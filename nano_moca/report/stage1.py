"""What a run of stage 1 shows at its end: what the modalities learned from each other.

Tokens could be restored from other tokens alone, and patches from their neighbours.
So the report asks: how many masked tokens are restored with the right picture, a wrong
one, and none; and how well are masked patches restored with all words visible, and
with no words. All on records drawn after those of the last step, which are unseen
within the first epoch; the report says so. `reconstruction.png` shows some of them
masked, restored and as they were.

Whatever runs the model is called on all ranks, as a sharded model needs.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_moca.batch import Batch, EncodedRecord
from nano_moca.batches import TokenBatches
from nano_moca.distributed import World
from nano_moca.files import one_line, write_json
from nano_moca.masking import MaskedBatch, mask_batch
from nano_moca.model import ReconstructionModel
from nano_moca.processor import Processor
from nano_moca.report.curves import plot_losses
from nano_moca.report.pictures import panels, picture, report_on

REPORT_TOKENS = 8192  # of unseen records
Items = list[tuple[int, EncodedRecord]]  # (number in the run, record)
Words = list[tuple[str, str]]  # each with its colour
View = tuple[np.ndarray, Words]  # a record's picture [height, width, 3], and its words
SEEN, RIGHT, WRONG = "#222222", "#2f6db5", "#c8452c"  # colours of words: given, or restored


def write_report(flags: Any, world: World, model: ReconstructionModel, processor: Processor,
                 unseen: TokenBatches, lines: list[dict], causal: bool) -> None:
    """Draw the pictures and say what was learned: loss.png, reconstruction.png and
    scores.json in --output.

    flags: train_cpt.py's. unseen: gives every rank the same REPORT_TOKENS tokens of the
    records that would have come next. lines: the log. causal: how the decoder attends.
    """
    output = Path(flags.output)
    scores = mean_losses(lines)
    columns: list[list[View]] = []
    with report_on("unseen records", world):
        items = [item for item in next(unseen).micro_batches[0] if item[1].grids]
        if items and flags.objective == "restore":
            masking = flags.text_mask, flags.image_mask, flags.seed
            scores |= cross_modal_report(model, processor, items, *masking, world, causal)

            # A column of the picture has room for one image.
            shown = [item for item in items if len(item[1].grids) == 1][:4]
            columns = restorations(model, processor, shown, *masking, world, causal)

    # The scores first: they are what counts.
    if world.main:
        write_json(output / "scores.json", scores)
        seen = "seen before" if unseen.state["epoch"] else "unseen"
        print(f"judged by: the records that would have come next, {seen}")
        for name, value in scores.items():
            figure = "not measured" if value is None else f"{value:.3f}"
            print(f"{name:>42s}  {figure}")

        # The pictures need no model.
        plot_losses(output / "loss.png", lines, ["loss", "mlm_loss", "mae_loss"])
        if columns:
            plot_restorations(output / "reconstruction.png", columns)
        print(f"{one_line(output)}: scores.json and the pictures are of step {lines[-1]['step']}")


def mean_losses(lines: list[dict]) -> dict[str, float]:
    """Both losses in the first and in the last tenth of the run."""
    tenth = max(1, len(lines) // 10)
    means = {}
    for name in ("mlm_loss", "mae_loss"):
        values = [line[name] for line in lines]
        means[f"{name}, first tenth"] = sum(values[:tenth]) / tenth
        means[f"{name}, last tenth"] = sum(values[-tenth:]) / tenth
    return means


@torch.no_grad()
def restore(model: ReconstructionModel, masked: MaskedBatch, device: torch.device, causal: bool
            ) -> tuple[Tensor, Tensor]:
    """The model's answers, on the CPU: the likeliest tokens [R] and the pixels
    [G, 4704] float32 of what was masked."""
    # Through the root's forward: only there does FSDP gather its weights.
    return model(masked.to(device), causal, predict=True)


def cross_modal_report(
        model: ReconstructionModel, processor: Processor, items: Items, text_mask: float,
        image_mask: float, seed: int, world: World, causal: bool) -> dict[str, float | None]:
    """Shares of masked tokens restored, squared errors of masked patch groups, by
    condition. A figure is None where nothing was masked.

    items: records that hold an image and words. text_mask, image_mask, seed: as in
    training; a record's number in the run then says what of it is masked.
    """
    keys = [(seed, number) for number, _ in items]
    special = processor.special_tokens.numpy()

    def words_restored(batch: Batch | None) -> float | None:
        if batch is None:
            return None
        masked = mask_batch(batch, processor, text_mask, 0.0, keys)
        tokens, _ = restore(model, masked, world.device, causal)
        return mean(tokens == masked.labels)

    def patch_error(batch: Batch, text_rate: float) -> float | None:
        masked = mask_batch(batch, processor, text_rate, image_mask, keys)
        _, pixels = restore(model, masked, world.device, causal)
        return mean((pixels - masked.target).square())

    # Every record in four forms, masked by the same random numbers in each.
    records = [record for _, record in items]
    batch = processor.pack(records)
    wrong = other_pictures(batch)
    swapped = None if wrong is None else replace(batch, pixels=wrong)
    wordless = processor.pack([only(record, special, words=False) for record in records])
    pictureless = processor.pack([only(record, special, words=True) for record in records])

    # The mean of the very groups it is judged on: no other constant does better.
    target = mask_batch(batch, processor, 0.0, image_mask, keys).target  # [G, 4704]
    constant = mean((target - target.mean(0)).square())

    # Words, by the picture beside them; patches, by the words.
    return {
        "words restored, right picture": words_restored(batch),
        "words restored, wrong picture": words_restored(swapped),
        "words restored, no picture": words_restored(pictureless),
        "patch error, words visible": patch_error(batch, 0.0),
        "patch error, words masked as in training": patch_error(batch, text_mask),
        "patch error, no words": patch_error(wordless, 0.0),
        "patch error, best constant": constant}


def mean(values: Tensor) -> float | None:
    """The mean of all values; None if there are none, or if it is not finite."""
    value = float(values.float().mean())  # NaN if there are none
    return value if math.isfinite(value) else None


def only(record: EncodedRecord, special: np.ndarray, words: bool) -> EncodedRecord:
    """A record's words without its images, or its images without its words. Positions
    stay."""
    # Image tokens are special ones too, and stay with their images.
    keep = np.isin(record.tokens, special) != words  # [L]
    kept = replace(record, tokens=record.tokens[keep], positions=record.positions[:, keep])
    return replace(kept, images=[], grids=[]) if words else kept


def other_pictures(batch: Batch) -> Tensor | None:
    """The pixels [J, 4, 588] with each image in the place of another of its size.

    None if over a tenth of the images keep their place or get an identical one: the
    "wrong picture" score would then partly measure the right picture.
    """
    by_size: dict[tuple[int, ...], list[int]] = {}
    for number, grid in enumerate(batch.grids.tolist()):
        by_size.setdefault(tuple(grid), []).append(number)

    # Images of one size move on by one, the last to the first one's place.
    groups = batch.grids.prod(1) // batch.pixels.shape[1]  # [I]: of each image
    images = batch.pixels.split(groups.tolist())
    swapped = list(images)
    for same in by_size.values():
        for number, other in zip(same, same[1:] + same[:1], strict=True):
            swapped[number] = images[other]
    kept = sum(map(torch.equal, images, swapped))
    return torch.cat(swapped) if 10 * kept <= len(images) else None


def restorations(
        model: ReconstructionModel, processor: Processor, items: Items, text_mask: float,
        image_mask: float, seed: int, world: World, causal: bool) -> list[list[View]]:
    """Each record masked, restored and as it was.

    items: records with one image each. A masked group is grey (the model gets noise
    there), a masked token is _; of what is restored, masked groups and coloured words are
    the model's.
    """
    decode = processor.tokenizer.decode
    columns = []
    for number, record in items:
        batch = processor.pack([record])
        masked = mask_batch(batch, processor, text_mask, image_mask, [(seed, number)])
        tokens, pixels = restore(model, masked, world.device, causal)

        # Pixels by groups; 0 is the mean colour, a grey.
        is_masked = torch.isin(batch.image_index, masked.group_index).numpy()  # [J]
        original = batch.patches.numpy().reshape(len(is_masked), -1)  # [J, 4704]
        grey = original.copy()
        grey[is_masked] = 0.0
        restored = original.copy()
        restored[is_masked] = pixels.numpy()

        # Words by tokens; a special token is "".
        words = [(decode([token]), SEEN) for token in record.tokens.tolist()]
        blanks = list(words)
        answers = list(words)
        right = tokens == masked.labels  # [R]
        for index, token, is_right in zip(masked.text_index.tolist(), tokens, right, strict=True):
            blanks[index] = (" _", SEEN)
            answers[index] = (decode([int(token)]), RIGHT if is_right else WRONG)

        # As pictures, with the words beside them.
        column = []
        for groups, parts in (grey, blanks), (restored, answers), (original, words):
            patches = groups.reshape(-1, processor.config.vision.patch_values)  # [P, 1176]
            column.append((processor.unpatchify(patches, record.grids[0]), parts))
        columns.append(column)
    return columns


@picture
def plot_restorations(figure: Any, columns: list[list[View]]) -> None:
    """One column per record, as `restorations` gives them: masked, restored, original;
    below each picture, the words."""
    axes = panels(figure, 3, len(columns), 2.6, 1.7)
    for column, views in zip(axes.T, columns, strict=True):
        for axis, (pixels, words) in zip(column, views, strict=True):
            axis.imshow(pixels)
            axis.set(xticks=[], yticks=[], anchor="NW")
            show_words(axis, words)
    for axis, name in zip(axes[:, 0], ("masked", "restored", "original"), strict=True):
        axis.set_ylabel(name)


def show_words(axis: Any, words: Words) -> None:
    """Words below a picture, each in its colour, in at most 4 lines of 30 characters."""
    column, line = 0, 1
    for word, colour in words:
        if column + len(word.rstrip(",")) > 30:
            column, line = 0, line + 1
        if line > 4:
            break

        # Letters of one width, 5.72 points at this size, so that a word's place follows from
        # the letters before it. A line end in a text is no line end of the picture.
        text = re.sub(r"\s", " ", word if column else word.lstrip())[:30]
        axis.annotate(text, (0, 0), (5.72 * column, -12 * line), "axes fraction", "offset points",
                      color=colour, fontsize=9.5, family="monospace",
                      weight="normal" if colour == SEEN else "bold")
        column += len(text)
