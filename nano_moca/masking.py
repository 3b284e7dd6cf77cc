"""Stage 1's masking: hide tokens and patches of a packed batch, and keep them as targets.

MoCa, section 3.1. Each text token is replaced by a mask token with probability 0.4,
and the pixels of each 2x2 group of patches by Gaussian noise with probability 0.5.
This happens *before* the vision tower, so that no feature of a masked group leaks.
The model then has to restore both: the tokens (masked language modelling, MLM) and
the pixels (masked autoencoding, MAE).

The random numbers come from a key per record (seed, number in the run), never from a
global generator. The same key masks the same tokens whatever the record is packed with,
on whichever rank, and after a resume. (The released code, src/dataloader.py:247-296,
draws from the global generator, and draws one noise vector of 1176 values per batch for
all masked patches; here each patch has its own.)

`next_token_batch` makes targets for the causal loss in the same form, with nothing
masked. It trains the nano base, and it is the control that tells the effect of
reconstruction from that of more data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nano_moca.batch import Batch, Sendable
from nano_moca.processor import Processor


@dataclass
class MaskedBatch(Sendable):
    """A batch as the model sees it, and the R tokens and G groups it has to restore."""

    batch: Batch
    text_index: Tensor  # [R] int64: which of the T hidden states predict a token
    labels: Tensor  # [R] int64: which token each predicts
    group_index: Tensor  # [G] int64: the image tokens, among T, of the masked groups

    @property
    def target(self) -> Tensor:
        """[G, 4704] float32: their pixels, normalised as all images are (CLIP's mean, std)."""
        pixels = self.batch.pixels[self.batch.noised]  # [G, 4, 588]
        return self.batch.normalise(pixels).flatten(1)


def mask_batch(batch: Batch, processor: Processor, text_rate: float, image_rate: float,
               keys: Sequence[tuple[int, ...]], unhidden: float = 0.0) -> MaskedBatch:
    """Mask each text token with probability `text_rate`, each group with `image_rate`.

    keys: N tuples of integers, the seeds of each record's random numbers. Special
    tokens and image tokens are never masked as text. A record may lose nothing: a
    loss over nothing is zero.

    unhidden: u. Of the masked tokens a share u keeps its word, another u shows a
    random word, and the other 1 - 2u show the mask token. All are restored, so the
    model must ask of every word that it sees whether it belongs there. MoCa: 0.
    BERT (arXiv 1810.04805): 0.1.
    """
    # Group number j belongs to the token image_index[j]. Image tokens are special tokens.
    maskable = ~torch.isin(batch.tokens, processor.special_tokens)  # [T]

    # Filled record by record: the tokens as the model sees them, what is masked, in
    # ascending order, and the noise.
    shown = batch.tokens.clone()  # [T]
    masked_tokens: list[Tensor] = []  # in the end [R]
    masked_groups: list[Tensor] = []  # in the end [G]
    noise: list[np.ndarray] = []  # in the end [G, 4, 1176]
    vision = processor.config.vision
    group_shape = (vision.merge**2, vision.patch_values)  # 4 patches, 1176 values

    offsets = batch.segments.offsets.tolist()  # [N+1]
    for start, end, key in zip(offsets[:-1], offsets[1:], keys, strict=True):
        # Two generators: which tokens are masked does not depend on the size of the
        # image, nor which groups on the length of the text.
        text_rng = np.random.default_rng((*key, 0))
        image_rng = np.random.default_rng((*key, 1))

        # Text: one uniform number per token; where it is below the rate, the
        # token is masked.
        own_tokens = start + maskable[start:end].nonzero().flatten()  # their places in T
        uniform = torch.from_numpy(text_rng.random(len(own_tokens), np.float32))
        chosen_tokens = own_tokens[uniform < text_rate]
        masked_tokens.append(chosen_tokens)

        # What is seen there: below u the word itself, below 2u a random one, else
        # the mask token.
        fate = torch.from_numpy(text_rng.random(len(chosen_tokens), np.float32))
        drawn = text_rng.integers(len(processor.ordinary_tokens), size=len(chosen_tokens))
        random_words = processor.ordinary_tokens[drawn]
        shown[chosen_tokens] = torch.where(fate < unhidden, shown[chosen_tokens], random_words)
        shown[chosen_tokens[fate >= 2 * unhidden]] = processor.mask_token

        # Image: one uniform number per group of this record ...
        inside = (batch.image_index >= start) & (batch.image_index < end)  # [J]
        own_groups = inside.nonzero().flatten()  # their places in J
        uniform = torch.from_numpy(image_rng.random(len(own_groups), np.float32))
        chosen_groups = own_groups[uniform < image_rate]
        masked_groups.append(chosen_groups)

        # ... and standard normal noise in place of the pixels of each masked one.
        noise.append(image_rng.standard_normal((len(chosen_groups), *group_shape), np.float32))

    text_index = torch.cat(masked_tokens)  # [R]
    noised = torch.cat(masked_groups)  # [G], in the order of their noise
    return MaskedBatch(
        batch=replace(batch, noised=noised, noise=torch.from_numpy(np.concatenate(noise)),
                      tokens=shown),
        text_index=text_index,
        labels=batch.tokens[text_index],
        group_index=batch.image_index[noised])


def next_token_batch(batch: Batch, processor: Processor) -> MaskedBatch:
    """Targets for the next-token loss, image tokens excepted. Nothing is masked."""
    # Image tokens are not predicted; and a record's last token has no next one: `roll`
    # puts the next record's first there.
    following = batch.tokens.roll(-1)  # [T]
    predicts = following != processor.image_token  # [T] bool
    predicts[batch.segments.offsets[1:].long() - 1] = False

    text_index = predicts.nonzero().flatten()  # [R]
    nothing = batch.image_index[:0]  # [G] with G = 0
    return MaskedBatch(
        replace(batch, noised=nothing), text_index, following[text_index], nothing)
