"""Stage 1's masking: what is masked, how often, and that it follows from a record's key
alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nano_moca import MARK, Moca, Record
from nano_moca.batch import Batch
from nano_moca.masking import MaskedBatch, mask_batch, next_token_batch
from nano_moca.model import ReconstructionModel
from nano_moca.processor import Processor
from nano_moca.report.stage1 import other_pictures


@pytest.fixture(scope="module")
def processor(moca: Moca) -> Processor:
    return moca.processor


@pytest.fixture(scope="module")
def batch(processor: Processor, records: list[Record]) -> Batch:
    """The eight golden records."""
    return processor.batch(records)


def keys_of(batch: Batch, seed: int = 0) -> list[tuple[int, int]]:
    return [(seed, n) for n in range(len(batch.lengths))]


def groups_of(batch: Batch) -> Tensor:
    """Patches by merged group [J, 4, 1176]."""
    return batch.patches.view(len(batch.image_index), 4, -1)


def is_masked_group(masked: MaskedBatch) -> Tensor:
    """Which of all groups were masked, [J] bool."""
    return torch.isin(masked.batch.image_index, masked.group_index)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_rates(processor: Processor, rate: float) -> None:
    """Words and groups are masked at the given rate, within five standard deviations."""
    words = Record("a b c d e f g h " * 100)
    picture = Record(MARK, [Image.effect_mandelbrot((140, 140), (-2, -1, 1, 1), 20)])
    batch = processor.pack([processor.encode(words), *[processor.encode(picture)] * 40])
    masked = mask_batch(batch, processor, rate, rate, keys_of(batch))
    special = torch.isin(batch.tokens, processor.special_tokens)
    for number, count in ((len(masked.labels), int((~special).sum())),
                          (len(masked.target), len(batch.image_index))):
        assert count >= 800
        assert abs(number - rate * count) <= 5 * (count * rate * (1 - rate)) ** 0.5


def test_the_two_rates_are_apart(batch: Batch, processor: Processor) -> None:
    """One modality can be masked and the other not; one's masks do not follow the other's
    rate."""
    keys = keys_of(batch)
    both = mask_batch(batch, processor, 0.4, 0.5, keys)
    text = mask_batch(batch, processor, 0.4, 0.0, keys)
    image = mask_batch(batch, processor, 0.0, 0.5, keys)
    assert torch.equal(text.text_index, both.text_index) and not len(text.group_index)
    assert torch.equal(image.group_index, both.group_index) and not len(image.text_index)
    assert torch.equal(text.batch.patches, batch.patches)
    assert torch.equal(image.batch.tokens, batch.tokens)


def test_special_tokens_are_never_masked(batch: Batch, processor: Processor) -> None:
    """At rate 1 every ordinary token is masked, and no special or image token is."""
    special = torch.tensor([token.special for token in map(
        processor.tokenizer.get_added_tokens_decoder().get, batch.tokens.tolist()) if token])
    assert special.all() and len(special) > 20
    masked = mask_batch(batch, processor, 1.0, 0.0, keys_of(batch))
    names = [processor.tokenizer.id_to_token(token) for token in batch.tokens.tolist()]
    ordinary = [index for index, name in enumerate(names) if not name.startswith("<|")]
    assert masked.text_index.tolist() == ordinary


def test_labels_and_targets_are_the_originals(batch: Batch, processor: Processor) -> None:
    """What has to be restored is what was there; what was not masked stays; the batch that
    came in is not changed."""
    tokens = batch.tokens.clone()
    patches = batch.patches.clone()
    masked = mask_batch(batch, processor, 0.4, 0.5, keys_of(batch))
    assert torch.equal(batch.tokens, tokens) and torch.equal(batch.patches, patches)

    # Text: labels, and the mask token in their places.
    assert torch.equal(masked.labels, tokens[masked.text_index])
    assert (masked.batch.tokens[masked.text_index] == processor.mask_token).all()
    unmasked = torch.ones_like(tokens, dtype=torch.bool)
    unmasked[masked.text_index] = False
    assert torch.equal(masked.batch.tokens[unmasked], tokens[unmasked])

    # Images: pixels as targets.
    is_masked = is_masked_group(masked)
    assert 0 < is_masked.sum() < len(is_masked)
    assert torch.equal(masked.target, groups_of(batch)[is_masked].flatten(1))
    assert (tokens[masked.group_index] == processor.image_token).all()
    assert torch.equal(groups_of(masked.batch)[~is_masked], groups_of(batch)[~is_masked])


def test_some_masked_words_keep_their_word_and_some_show_another(processor: Processor) -> None:
    """The given share of each, within five standard deviations. Which words are masked, and what
    has to be restored, is as without."""
    batch = processor.pack([processor.encode(Record("a b c d e f g h " * 200))])
    plain = mask_batch(batch, processor, 0.4, 0.5, keys_of(batch))
    masked = mask_batch(batch, processor, 0.4, 0.5, keys_of(batch), unhidden=0.2)
    assert torch.equal(masked.text_index, plain.text_index)
    assert torch.equal(masked.labels, plain.labels)

    seen = masked.batch.tokens[masked.text_index]
    count = len(seen)
    hidden = seen == processor.mask_token
    kept = seen == masked.labels
    other = seen[~hidden & ~kept]
    assert count > 500
    for share, found in ((0.6, hidden.sum()), (0.2, kept.sum()), (0.2, len(other))):
        assert abs(int(found) - share * count) <= 5 * (count * share * (1 - share)) ** 0.5

    # The others are many different words, none of them special.
    assert len(other.unique()) > len(other) / 2
    assert not torch.isin(other, processor.special_tokens).any()
    unmasked = torch.ones_like(batch.tokens, dtype=torch.bool)
    unmasked[masked.text_index] = False
    assert torch.equal(masked.batch.tokens[unmasked], batch.tokens[unmasked])


def test_masked_groups_are_noise_before_the_vision_tower(batch: Batch, moca: Moca) -> None:
    """The four patches of a masked group are Gaussian noise, each its own; the vision tower
    gets that."""
    masked = mask_batch(batch, moca.processor, 0.0, 0.5, keys_of(batch))
    noise = groups_of(masked.batch)[is_masked_group(masked)]  # [G, 4, 1176]
    original = masked.target.view_as(noise)
    assert ((noise == original).float().mean(-1) < 0.01).all()
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    assert ((noise.std(-1) - 1).abs() < 0.15).all()  # every patch of every group
    assert len(noise.flatten(0, 1)[:, 0].unique()) == 4 * len(noise)  # no patch repeats another

    taken = []
    hook = moca.model.visual.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        moca.model(masked.batch, causal=False)
    hook.remove()
    assert torch.equal(taken[0], masked.batch.patches)


@pytest.mark.parametrize("order", [[7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 6], [6, 1, 4, 2, 3]])
def test_masks_follow_the_key(processor: Processor, records: list[Record], order: list[int]
                              ) -> None:
    """A record loses the same tokens and groups, to the same noise, alone and in any
    packing."""
    def mask(numbers: list[int]) -> MaskedBatch:
        batch = processor.batch([records[n] for n in numbers])
        return mask_batch(batch, processor, 0.4, 0.5, [(3, 1, n) for n in numbers], 0.2)

    packed = mask(order)
    alone = [mask([n]) for n in order]
    assert torch.equal(packed.batch.tokens, torch.cat([one.batch.tokens for one in alone]))
    assert torch.equal(packed.batch.patches, torch.cat([one.batch.patches for one in alone]))
    assert torch.equal(packed.labels, torch.cat([one.labels for one in alone]))
    assert torch.equal(packed.target, torch.cat([one.target for one in alone]))

    # An index counts from the beginning of the batch.
    starts = packed.batch.segments.offsets[:-1]
    for name in ("text_index", "group_index"):
        shifted = [getattr(one, name) + start for one, start in zip(alone, starts, strict=True)]
        assert torch.equal(getattr(packed, name), torch.cat(shifted))


def test_the_random_numbers_of_a_key(processor: Processor, records: list[Record]) -> None:
    """The key with 0 after it seeds the text's draws; with 1 the image's, then its noise.
    So a run can be resumed, and older runs repeated."""
    batch = processor.batch([records[3]])
    masked = mask_batch(batch, processor, 0.4, 0.5, [(5, 17)])

    ordinary = (~torch.isin(batch.tokens, processor.special_tokens)).nonzero().flatten()
    draws = np.random.default_rng((5, 17, 0)).random(len(ordinary), np.float32)
    expected = ordinary[torch.from_numpy(draws < np.float32(0.4))]
    assert len(expected) and torch.equal(masked.text_index, expected)

    generator = np.random.default_rng((5, 17, 1))
    draws = generator.random(len(batch.image_index), np.float32)
    chosen = torch.from_numpy(draws < np.float32(0.5))
    assert chosen.any() and torch.equal(masked.group_index, batch.image_index[chosen])
    noise = generator.standard_normal((int(chosen.sum()), 4704), np.float32)
    drawn = groups_of(masked.batch)[chosen].flatten(1)
    assert torch.equal(drawn, torch.from_numpy(noise))


def test_masks_do_not_follow_global_randomness(batch: Batch, processor: Processor) -> None:
    """Neither the global generator's state matters, nor is it moved."""
    torch.manual_seed(1)
    first = mask_batch(batch, processor, 0.4, 0.5, keys_of(batch))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = mask_batch(batch, processor, 0.4, 0.5, keys_of(batch))
    assert torch.equal(first.batch.tokens, second.batch.tokens)
    assert torch.equal(first.batch.patches, second.batch.patches)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_other_keys_mask_other_things(processor: Processor, records: list[Record]) -> None:
    """Each part of a key counts: with another seed, step or number masks and noise are
    others."""
    batch = processor.batch([records[3]])
    keys = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    results = [mask_batch(batch, processor, 0.4, 0.5, [key]) for key in keys]
    for number, one in enumerate(results):
        for other in results[:number]:
            assert not torch.equal(one.group_index, other.group_index)
            assert not torch.equal(one.batch.patches, other.batch.patches)

    batch = processor.batch([Record("word " * 60)] * 2)
    twins = mask_batch(batch, processor, 0.4, 0.5, [(0, 0), (0, 1)]).batch.tokens.chunk(2)
    assert not torch.equal(*twins)


def test_a_key_for_each_record(batch: Batch, processor: Processor) -> None:
    """Too few keys are an error, not a record of which nothing is masked."""
    with pytest.raises(ValueError):
        mask_batch(batch, processor, 0.4, 0.5, keys_of(batch)[:-1])


def test_next_token_batch(processor: Processor) -> None:
    """Each state predicts its record's next token, images excepted; nothing is masked."""
    picture = Record(f"a{MARK}b", [Image.new("RGB", (56, 56))])
    batch = processor.batch([Record("a "), picture, Record("a")])
    a, space, b = (processor.tokenizer.token_to_id(token) for token in ("a", "\u0120", "b"))
    start, end = map(processor.tokenizer.token_to_id, ("<|vision_start|>", "<|vision_end|>"))
    image = processor.image_token
    assert batch.tokens.tolist() == [a, space] + [a, start, *[image] * 4, end, b] + [a]

    # a -> space; a -> start; last image -> end; end -> b
    masked = next_token_batch(batch, processor)
    assert masked.text_index.tolist() == [0, 2, 7, 8]
    assert masked.labels.tolist() == [space, start, end, b]
    assert not len(masked.group_index) and masked.target.shape == (0, 4704)
    assert torch.equal(masked.batch.tokens, batch.tokens)
    assert torch.equal(masked.batch.patches, batch.patches)


@pytest.mark.parametrize("numbers", [[0], [3], [7, 1]], ids=["text", "images", "both"])
def test_loss_over_nothing(moca: Moca, records: list[Record], numbers: list[int]) -> None:
    """Where nothing is masked both losses are zero, and so is every gradient."""
    model = ReconstructionModel(moca.model)
    model.patch_decoder.to_empty(device="cpu").init_from(moca.model.language, seed=0)
    batch = moca.processor.batch([records[n] for n in numbers])
    masked = mask_batch(batch, moca.processor, 0.0, 0.0, keys_of(batch))
    mlm, mae = model(masked, causal=False)
    assert mlm.item() == mae.item() == 0.0
    gradients = torch.autograd.grad(mlm + mae, list(model.parameters()), allow_unused=True)
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients)


def test_moved_batches_are_complete(batch: Batch, processor: Processor) -> None:
    """`to` moves all that the model computes with; what loops read stays on the host."""
    masked = mask_batch(batch, processor, 0.4, 0.5, keys_of(batch))
    moved = masked.to("meta")
    for name in ("text_index", "labels", "group_index", "target"):
        tensor = getattr(moved, name)
        assert tensor.is_meta and tensor.shape == getattr(masked, name).shape
    layout = moved.batch.layout
    for item in (moved.batch, moved.batch.segments, layout, layout.whole, layout.windows):
        tensors = [value for value in vars(item).values() if isinstance(value, Tensor)]
        assert tensors and all(tensor.is_meta for tensor in tensors)
    assert moved.batch.patches.is_meta and moved.batch.patches.shape == batch.patches.shape
    assert moved.batch.lengths == batch.lengths and torch.equal(moved.batch.grids, batch.grids)
    assert moved.batch.sources == batch.sources
    assert not masked.batch.tokens.is_meta  # the one that was moved stays as it is


def test_other_pictures_are_other_pictures(moca: Moca) -> None:
    """Each image takes the place of another of its size; None where most are alone or
    alike."""
    random = np.random.default_rng(0)

    def pictures(*sizes: int) -> list[Record]:
        records = []
        for size in sizes:
            pixels = random.integers(0, 255, (size, size, 3), np.uint8)
            records.append(Record(MARK, [Image.fromarray(pixels)]))
        return records

    batch = moca.processor.batch(pictures(56, 84, 56, 84, 56))
    swapped = other_pictures(batch)
    sizes = (batch.grids.prod(1) // 4).tolist()  # groups
    pairs = list(zip(batch.pixels.split(sizes), swapped.split(sizes), strict=True))
    assert not any(torch.equal(own, other) for own, other in pairs)
    assert swapped.sum() == batch.pixels.sum()
    assert other_pictures(moca.processor.batch(pictures(56, 84))) is None
    assert other_pictures(moca.processor.batch(pictures(56) * 3)) is None
