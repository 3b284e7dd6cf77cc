"""Stage 1's corruption: mask tokens and patches of a packed batch, and keep them as targets.

MoCa, section 3.1: each text token is replaced by a mask token with probability 0.4, the pixels of
each merged 2x2 group of patches by Gaussian noise with probability 0.5. That happens *before* the
vision tower, so no feature of a masked group leaks. The random numbers come from a key per record
(seed, number in the run), never from a global generator: the same key masks the same tokens,
whatever the record is packed with, on whichever rank, and after a resume. (The released code draws
from the global generator, and one noise vector of 1176 values per batch for all masked patches;
here each patch has its own.)

`next_token` makes targets for the causal loss in the same form, with nothing masked. It trains the
nano base, and it is the control that separates the effect of reconstruction from that of more data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nano_moca.processor import Batch, Processor


@dataclass
class Corruption:
    """A batch as the model sees it, and what it has to restore: R tokens and G patch groups."""

    batch: Batch
    text_rows: Tensor  # [R] int64: rows of the T tokens whose hidden state predicts a token
    labels: Tensor  # [R] int64: which token
    group_rows: Tensor  # [G] int64: rows of the T tokens whose patches were masked
    target: Tensor  # [G, 4704]: their normalised pixels

    def to(self, device: torch.device | str) -> "Corruption":
        """Everything the model computes with, on the device."""
        names = ("text_rows", "labels", "group_rows", "target")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, batch=self.batch.to(device), **moved)


def corrupt(batch: Batch, processor: Processor, text_rate: float, image_rate: float,
            keys: Sequence[tuple[int, ...]]) -> Corruption:
    """Mask each text token with probability `text_rate`, each patch group with `image_rate`.

    keys: one tuple of integers per record, the seed of its draws. Special tokens and image tokens
    are never masked as text. A record may lose nothing: a loss over nothing is zero.
    """
    groups = batch.patches.view(-1, processor.config.vision.group_values)  # [G_all, 4704]
    owners = torch.bucketize(batch.image_rows, batch.cu_seqlens[1:], right=True)  # [G_all] whose
    counts = torch.bincount(owners, minlength=len(keys)).tolist()
    ordinary = ~torch.isin(batch.tokens, processor.special_tokens)  # [T]
    words = [int(part.sum()) for part in ordinary.split(batch.lengths)]
    text_rolls, group_rolls, noise = [], [], []  # masked where the roll is below the rate
    for key, word_count, group_count in zip(keys, words, counts, strict=True):
        # two streams: which tokens are masked does not depend on the image's size, nor vice versa
        text, image = (np.random.default_rng((*key, stream)) for stream in (0, 1))
        text_rolls.append(text.random(word_count, np.float32))
        group_rolls.append(image.random(group_count, np.float32))
        hidden = int((group_rolls[-1] < image_rate).sum())
        noise.append(image.standard_normal((hidden, groups.shape[1]), np.float32))
    hide_text = torch.zeros_like(ordinary)  # [T]
    hide_text[ordinary] = torch.from_numpy(np.concatenate(text_rolls) < text_rate)
    hide_group = torch.from_numpy(np.concatenate(group_rolls) < image_rate)  # [G_all]
    seen = groups.clone()
    seen[hide_group] = torch.from_numpy(np.concatenate(noise))
    tokens = batch.tokens.masked_fill(hide_text, processor.mask_token)
    return Corruption(
        batch=replace(batch, tokens=tokens, patches=seen.view_as(batch.patches)),
        text_rows=hide_text.nonzero().flatten(),
        labels=batch.tokens[hide_text],
        group_rows=batch.image_rows[hide_group],
        target=groups[hide_group],  # [G, 4704]
    )


def next_token(batch: Batch, processor: Processor) -> Corruption:
    """Targets for the next-token loss, image tokens excepted. Nothing is masked."""
    following = batch.tokens.roll(-1)  # [T]
    counts = following != processor.image_token
    counts[batch.cu_seqlens[1:] - 1] = False  # a record's last token has no next one
    rows = counts.nonzero().flatten()
    target = batch.patches.new_empty(0, processor.config.vision.group_values)
    return Corruption(batch, rows, following[rows], rows[:0], target)
