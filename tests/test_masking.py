"""Stage 1's exercise: what is hidden, how often, and that it follows from a record's key alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nano_moca import MARK, Moca, Record
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import Corruption, corrupt, next_token
from nano_moca.model import Restorer
from nano_moca.processor import Batch, Processor
from nano_moca.report import other_pictures


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
    """Patches by merged group [G_all, 4, 1176]."""
    return batch.patches.view(len(batch.image_rows), 4, -1)


def is_hidden_group(corruption: Corruption) -> Tensor:
    """Which of all groups were hidden, [G_all] bool."""
    return torch.isin(corruption.batch.image_rows, corruption.group_rows)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_rates(processor: Processor, rate: float) -> None:
    """Words and patch groups are hidden at the given rate, within five standard deviations."""
    words = Record("a b c d e f g h " * 100)
    picture = Record(MARK, [Image.effect_mandelbrot((140, 140), (-2, -1, 1, 1), 20)])
    batch = processor.pack([processor.encode(words), *[processor.encode(picture)] * 40])
    corruption = corrupt(batch, processor, rate, rate, keys_of(batch))
    special = torch.isin(batch.tokens, processor.special_tokens)
    for hidden, count in ((len(corruption.labels), int((~special).sum())),
                          (len(corruption.target), len(batch.image_rows))):
        assert count >= 800
        assert abs(hidden - rate * count) <= 5 * (count * rate * (1 - rate)) ** 0.5


def test_the_two_rates_are_apart(batch: Batch, processor: Processor) -> None:
    """One modality can be hidden and the other not; one's masks do not follow the other's rate."""
    keys = keys_of(batch)
    both = corrupt(batch, processor, 0.4, 0.5, keys)
    text = corrupt(batch, processor, 0.4, 0.0, keys)
    image = corrupt(batch, processor, 0.0, 0.5, keys)
    assert torch.equal(text.text_rows, both.text_rows) and not len(text.group_rows)
    assert torch.equal(image.group_rows, both.group_rows) and not len(image.text_rows)
    assert torch.equal(text.batch.patches, batch.patches)
    assert torch.equal(image.batch.tokens, batch.tokens)


def test_special_tokens_are_never_hidden(batch: Batch, processor: Processor) -> None:
    """At rate 1 every ordinary token is hidden, and no special or image token is."""
    special = torch.tensor([token.special for token in map(
        processor.tokenizer.get_added_tokens_decoder().get, batch.tokens.tolist()) if token])
    assert special.all() and len(special) > 20
    corruption = corrupt(batch, processor, 1.0, 0.0, keys_of(batch))
    names = [processor.tokenizer.id_to_token(token) for token in batch.tokens.tolist()]
    ordinary = [row for row, name in enumerate(names) if not name.startswith("<|")]
    assert corruption.text_rows.tolist() == ordinary


def test_labels_and_targets_are_the_originals(batch: Batch, processor: Processor) -> None:
    """What has to be restored is what was there; what was not hidden stays; the batch is kept."""
    tokens, patches = batch.tokens.clone(), batch.patches.clone()
    corruption = corrupt(batch, processor, 0.4, 0.5, keys_of(batch))
    assert torch.equal(batch.tokens, tokens) and torch.equal(batch.patches, patches)
    assert torch.equal(corruption.labels, tokens[corruption.text_rows])
    assert (corruption.batch.tokens[corruption.text_rows] == processor.mask_token).all()
    hidden = is_hidden_group(corruption)
    assert 0 < hidden.sum() < len(hidden)
    assert torch.equal(corruption.target, groups_of(batch)[hidden].flatten(1))
    assert (tokens[corruption.group_rows] == processor.image_token).all()
    seen = torch.ones_like(tokens, dtype=torch.bool)
    seen[corruption.text_rows] = False
    assert torch.equal(corruption.batch.tokens[seen], tokens[seen])
    assert torch.equal(groups_of(corruption.batch)[~hidden], groups_of(batch)[~hidden])


def test_hidden_groups_are_noise_before_the_vision_tower(batch: Batch, moca: Moca) -> None:
    """The four patches of a hidden group are Gaussian noise, each its own; the ViT sees that."""
    corruption = corrupt(batch, moca.processor, 0.0, 0.5, keys_of(batch))
    noise = groups_of(corruption.batch)[is_hidden_group(corruption)]  # [G, 4, 1176]
    original = corruption.target.view_as(noise)
    assert ((noise == original).float().mean(-1) < 0.01).all()
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    assert ((noise.std(-1) - 1).abs() < 0.15).all()  # every patch of every group
    assert len(noise.flatten(0, 1)[:, 0].unique()) == 4 * len(noise)  # no patch repeats another
    taken = []
    hook = moca.model.visual.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        moca.model(corruption.batch, causal=False)
    hook.remove()
    assert torch.equal(taken[0], corruption.batch.patches)


@pytest.mark.parametrize("order", [[7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 6], [6, 1, 4, 2, 3]])
def test_masks_follow_the_key(processor: Processor, records: list[Record], order: list[int]
                              ) -> None:
    """A record loses the same tokens and groups, to the same noise, alone and in any packing."""
    def hide(numbers: list[int]) -> Corruption:
        batch = processor.batch([records[n] for n in numbers])
        return corrupt(batch, processor, 0.4, 0.5, [(3, 1, n) for n in numbers])

    packed, alone = hide(order), [hide([n]) for n in order]
    assert torch.equal(packed.batch.tokens, torch.cat([one.batch.tokens for one in alone]))
    assert torch.equal(packed.batch.patches, torch.cat([one.batch.patches for one in alone]))
    assert torch.equal(packed.labels, torch.cat([one.labels for one in alone]))
    assert torch.equal(packed.target, torch.cat([one.target for one in alone]))
    begins = packed.batch.cu_seqlens[:-1]
    for name in ("text_rows", "group_rows"):
        rows = [getattr(one, name) + begin for one, begin in zip(alone, begins, strict=True)]
        assert torch.equal(getattr(packed, name), torch.cat(rows))


def test_masks_do_not_follow_global_randomness(batch: Batch, processor: Processor) -> None:
    """Neither the global generator's state matters, nor is it moved."""
    torch.manual_seed(1)
    first, state = corrupt(batch, processor, 0.4, 0.5, keys_of(batch)), torch.get_rng_state()
    torch.manual_seed(2)
    second = corrupt(batch, processor, 0.4, 0.5, keys_of(batch))
    assert torch.equal(first.batch.tokens, second.batch.tokens)
    assert torch.equal(first.batch.patches, second.batch.patches)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_other_keys_hide_other_things(processor: Processor, records: list[Record]) -> None:
    """Each part of a key counts: another seed, step or index gives other masks and other noise."""
    batch = processor.batch([records[3]])
    results = [corrupt(batch, processor, 0.4, 0.5, [key])
               for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert not torch.equal(one.group_rows, other.group_rows)
            assert not torch.equal(one.batch.patches, other.batch.patches)
    batch = processor.batch([Record("word " * 60)] * 2)
    twins = corrupt(batch, processor, 0.4, 0.5, [(0, 0), (0, 1)]).batch.tokens.chunk(2)
    assert not torch.equal(*twins)


def test_a_key_for_each_record(batch: Batch, processor: Processor) -> None:
    """Too few keys are an error, not a record left whole."""
    with pytest.raises(ValueError):
        corrupt(batch, processor, 0.4, 0.5, keys_of(batch)[:-1])


def test_next_token(processor: Processor) -> None:
    """Each state tells its record's next token, images excepted; nothing is hidden."""
    picture = Record(f"a{MARK}b", [Image.new("RGB", (56, 56))])
    batch = processor.batch([Record("abc"[:1] + " "), picture, Record("a")])
    a, space, b = (processor.tokenizer.token_to_id(token) for token in ("a", "\u0120", "b"))
    start, end = map(processor.tokenizer.token_to_id, ("<|vision_start|>", "<|vision_end|>"))
    image = processor.image_token
    assert batch.tokens.tolist() == [a, space] + [a, start, *[image] * 4, end, b] + [a]
    exercise = next_token(batch, processor)
    #                       a -> space; a -> start; last image -> end; end -> b
    assert exercise.text_rows.tolist() == [0, 2, 7, 8]
    assert exercise.labels.tolist() == [space, start, end, b]
    assert not len(exercise.group_rows) and exercise.target.shape == (0, 4704)
    assert torch.equal(exercise.batch.tokens, batch.tokens)
    assert torch.equal(exercise.batch.patches, batch.patches)


@pytest.mark.parametrize("numbers", [[0], [3], [7, 1]], ids=["text", "images", "both"])
def test_loss_over_nothing(moca: Moca, records: list[Record], numbers: list[int]) -> None:
    """Where nothing is hidden both losses are zero, and so is every gradient."""
    restorer = Restorer(moca.model)
    restorer.patch_decoder.to_empty(device="cpu").start_from(moca.model.language, seed=0)
    batch = moca.processor.batch([records[n] for n in numbers])
    corruption = corrupt(batch, moca.processor, 0.0, 0.0, keys_of(batch))
    mlm, mae = restorer(corruption, False, masked_reconstruction_loss)
    assert mlm.item() == mae.item() == 0.0
    gradients = torch.autograd.grad(mlm + mae, list(restorer.parameters()), allow_unused=True)
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients)


def test_other_pictures_are_other_pictures(moca: Moca) -> None:
    """Each image takes the place of another of its size; None where most are alone or alike."""
    random = np.random.default_rng(0)

    def pictures(*sizes: int) -> list[Record]:
        return [Record(MARK, [Image.fromarray(random.integers(0, 255, (size, size, 3), np.uint8))])
                for size in sizes]

    batch = moca.processor.batch(pictures(56, 84, 56, 84, 56))
    swapped = other_pictures(batch)
    sizes = batch.grids.prod(1).tolist()
    pairs = list(zip(batch.patches.split(sizes), swapped.split(sizes), strict=True))
    assert not any(torch.equal(mine, its) for mine, its in pairs)
    assert swapped.sum().item() == pytest.approx(batch.patches.sum().item(), rel=1e-4)
    assert other_pictures(moca.processor.batch(pictures(56, 84))) is None
    assert other_pictures(moca.processor.batch(pictures(56) * 3)) is None
