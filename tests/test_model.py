"""The complete model: equal to the reference on the golden cases, and the same however
records are packed.

`golden/` was written by transformers (eager attention, float32, one record at a time):
token ids, positions, pixels, and for each of the models what its parts compute on eight
records.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import nano_moca
from nano_moca import Moca, Record
from nano_moca.evaluate import embedder
from nano_moca import model as model_module
from nano_moca.batch import Batch
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import MaskedBatch, mask_batch, next_token_batch
from nano_moca.model import ReconstructionModel, likeliest_tokens

CASES = ("qwen2.5-vl", "qwen2.5-vl-newer-layout", "qwen2.5-vl-untied", "qwen2-vl")
every_record = pytest.mark.parametrize("number", range(8))
close = partial(torch.testing.assert_close, rtol=0)


@dataclass
class Case:
    """A loaded checkpoint, and what the reference computed with it: {"<record>.<what>":
    tensor}."""

    moca: Moca
    records: list[Record]
    expected: dict[str, Tensor]

    def batch(self, number: int) -> Batch:
        return self.moca.processor.batch([self.records[number]])


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, golden: Path, newer_layout: Path,
         records: list[Record]) -> Case:
    name = request.param.removesuffix("-newer-layout")
    folder = golden / name if name == request.param else newer_layout
    expected = load_file(golden / "inputs.golden.safetensors")
    expected |= load_file(golden / f"{name}.golden.safetensors")
    return Case(nano_moca.load(folder, "cpu"), records, expected)


@every_record
def test_inputs(case: Case, number: int) -> None:
    """Ids, positions and grids are the reference's, pixels to 1e-6."""
    batch = case.batch(number)
    assert torch.equal(batch.tokens, case.expected[f"{number}.input_ids"])
    assert torch.equal(batch.positions, case.expected[f"{number}.positions"])
    if case.records[number].images:
        assert torch.equal(batch.grids, case.expected[f"{number}.grid"])
        close(batch.patches, case.expected[f"{number}.pixel_values"], atol=1e-6)


@every_record
@torch.no_grad()
def test_vision(case: Case, number: int) -> None:
    """The image tokens that the vision tower makes are the reference's to 1e-3."""
    if not case.records[number].images:
        pytest.skip("no image in this record")
    batch = case.batch(number)
    image_tokens = case.moca.model.visual(batch.patches, batch.layout)
    close(image_tokens, case.expected[f"{number}.vision"], atol=1e-3)


@every_record
@torch.no_grad()
def test_hidden_states(case: Case, number: int) -> None:
    """Every layer's input and the last hidden states are the reference's to 1e-3, both
    bidirectional and causal."""
    model = case.moca.model
    batch = case.batch(number)
    caught = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
             for layer in model.language.layers]
    bidirectional = model(batch, causal=False)
    for hook in hooks:
        hook.remove()
    close(torch.stack(caught), case.expected[f"{number}.layers"], atol=1e-3)
    close(bidirectional, case.expected[f"{number}.bidirectional"], atol=1e-3)

    causal = model(batch, causal=True)
    close(causal, case.expected[f"{number}.causal"], atol=1e-3)
    close(causal @ model.head.T, case.expected[f"{number}.logits"], atol=1e-3)


@pytest.mark.parametrize("attention, pooling", [("bidirectional", "mean"), ("causal", "last")])
def test_embeddings(case: Case, attention: str, pooling: str) -> None:
    """`embed` gives the reference's unit vectors to 1e-5, all records in one call."""
    moca = replace(case.moca, attention=attention, pooling=pooling)
    expected = torch.stack([case.expected[f"{number}.{pooling}"] for number in range(8)])
    close(moca.embed(case.records), expected, atol=1e-5)


@every_record
def test_greedy(case: Case, number: int) -> None:
    """Eight greedy tokens are the reference's."""
    tokens = embedder.greedy(case.moca.model, case.batch(number), 8, end=-1)
    assert tokens == [case.expected[f"{number}.greedy"].tolist()]


def test_greedy_packed_and_ended(case: Case) -> None:
    """Records packed together get the tokens they get alone, cut before the end token."""
    model = case.moca.model
    batch = case.moca.processor.batch(case.records)
    expected = [case.expected[f"{number}.greedy"].tolist() for number in range(8)]
    assert embedder.greedy(model, batch, 8, end=-1) == expected

    end = expected[0][3]
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected]
    assert embedder.greedy(model, batch, 8, end) == cut


# --- packing changes nothing ----------------------------------------------------------


def orders(count: int) -> list[list[int]]:
    """A few random orders of `count` records."""
    return [torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
            for seed in range(3)]


@pytest.mark.parametrize("attention, pooling", [("bidirectional", "mean"), ("causal", "last")])
def test_packed_embeddings(case: Case, attention: str, pooling: str) -> None:
    """Embeddings are the same alone and packed in any order, to 2e-6."""
    moca = replace(case.moca, attention=attention, pooling=pooling)
    records = case.records
    alone = torch.cat([moca.embed([record]) for record in records])
    for order in orders(len(records)):
        close(moca.embed([records[n] for n in order]), alone[order], atol=2e-6)


def test_embed_in_several_passes(moca: Moca, records: list[Record],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The token budget of a forward pass changes neither vectors nor their order."""
    expected = moca.embed(records)
    monkeypatch.setattr(embedder, "TOKENS_AT_ONCE", 30)
    close(moca.embed(records), expected, atol=2e-6)


def reconstruction_model(moca: Moca) -> ReconstructionModel:
    """Stage 1's model around a loaded one, whose weights it shares."""
    model = ReconstructionModel(moca.model)
    model.patch_decoder.to_empty(device="cpu").init_from(moca.model.language, seed=0)
    return model


def losses_by_record(model: ReconstructionModel, masked: MaskedBatch, causal: bool
                     ) -> tuple[Tensor, list[Tensor]]:
    """Each record's (sum of token losses, sum of group losses) [N, 2], and the gradients of
    the sum of all."""
    ends = masked.batch.segments.offsets[1:]
    token_owner = torch.bucketize(masked.text_index, ends, right=True)  # [R]
    group_owner = torch.bucketize(masked.group_index, ends, right=True)  # [G]

    def by_record(hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor,
                  target: Tensor, **counts) -> Tensor:
        losses = []
        for n in range(len(ends)):
            tokens = token_owner == n
            groups = group_owner == n
            mlm, mae = masked_reconstruction_loss(
                hidden[tokens], head, labels[tokens], predicted[groups], target[groups],
                mlm_count=1, mae_count=1)
            losses.append(torch.stack([mlm, mae]))
        return torch.stack(losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "masked_reconstruction_loss", by_record)
        losses = model(masked, causal)
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True,
                                    materialize_grads=True)
    return losses.detach(), gradients


@pytest.mark.parametrize("objective", ["restore", "next token"])
def test_packed_stage_one(case: Case, objective: str) -> None:
    """Stage 1's losses and gradients are the same alone, summed, and packed in another order.

    Losses: to 2e-6 of their size. Gradients: the norm of the difference over all parameters
    is at most 5e-6 of the gradient's norm (float32 rounding: 3e-6 was measured), and no
    single parameter's is above 5e-5 of its own.
    """
    processor = case.moca.processor
    records = case.records
    model = reconstruction_model(case.moca)

    def run(order: list[int]) -> tuple[Tensor, list[Tensor]]:
        batch = processor.batch([records[n] for n in order])
        if objective == "next token":
            return losses_by_record(model, next_token_batch(batch, processor), causal=True)
        masked = mask_batch(batch, processor, 0.4, 0.5, [(0, n) for n in order])
        return losses_by_record(model, masked, causal=False)

    alone = [run([n]) for n in range(len(records))]
    losses = torch.cat([loss for loss, _ in alone])
    by_parameter = zip(*[gradients for _, gradients in alone], strict=True)
    gradients = [sum(parts) for parts in by_parameter]
    assert losses[:, 0].sum() > 0 and (losses[:, 1].sum() > 0) == (objective == "restore")

    order = [5, 3, 0, 6, 7, 2, 1, 4]
    packed_losses, packed = run(order)
    torch.testing.assert_close(packed_losses, losses[order], atol=2e-6, rtol=2e-6)

    off = torch.stack([(a - b).norm() for a, b in zip(packed, gradients, strict=True)])
    size = torch.stack([gradient.norm() for gradient in gradients])
    assert off.norm() <= 5e-6 * size.norm()
    floor = 1e-6 * size.norm()  # a key's bias has no gradient but for rounding
    assert (off <= 5e-5 * size + floor).all()


# --- stage 1's model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked(moca: Moca, records: list[Record]) -> MaskedBatch:
    """The eight golden records, masked."""
    batch = moca.processor.batch(records)
    return mask_batch(batch, moca.processor, 0.4, 0.5, [(0, n) for n in range(8)])


@torch.no_grad()
def test_losses_are_those_of_the_answers(moca: Moca, masked: MaskedBatch) -> None:
    """With `predict` the model gives the likeliest tokens and the pixels that its losses
    judge; the hidden state at a masked token predicts this token itself."""
    model = reconstruction_model(moca)
    for causal in (False, True):
        mlm, mae = model(masked, causal)
        tokens, pixels = model(masked, causal, predict=True)
        assert tokens.shape == masked.labels.shape and tokens.dtype == torch.int64
        assert pixels.shape == masked.target.shape and pixels.dtype == torch.float32

        logits = moca.model(masked.batch, causal)[masked.text_index] @ moca.model.head.T
        assert torch.equal(tokens, logits.argmax(-1))
        close(mlm, torch.nn.functional.cross_entropy(logits, masked.labels), atol=1e-5)
        close(mae, (pixels - masked.target).square().mean(), atol=1e-5)


@torch.no_grad()
def test_counts_reach_the_loss(moca: Moca, masked: MaskedBatch) -> None:
    """The counts of a step divide the sums: the first the tokens', the second the groups'."""
    model = reconstruction_model(moca)
    R = len(masked.labels)
    G = len(masked.target)
    mlm, mae = model(masked, False)
    shared_mlm, shared_mae = model(masked, False, 2 * R, 5 * G)
    close(shared_mlm, mlm / 2, atol=1e-6)
    close(shared_mae, mae / 5, atol=1e-6)


@torch.no_grad()
def test_the_patch_decoder_is_bidirectional(moca: Moca, masked: MaskedBatch) -> None:
    """It sees what stands after a group, even on top of a causal decoder."""
    model = reconstruction_model(moca)
    tokens = masked.batch.tokens.clone()
    tokens[masked.batch.segments.offsets[1:] - 1] = 5  # each record's last token
    changed = replace(masked, batch=replace(masked.batch, tokens=tokens))

    # The decoder's hidden states at the groups are the same; the predicted pixels are not.
    before = moca.model(masked.batch, causal=True)[masked.group_index]
    after = moca.model(changed.batch, causal=True)[masked.group_index]
    close(before, after, atol=0)
    _, pixels = model(masked, True, predict=True)
    _, changed_pixels = model(changed, True, predict=True)
    assert (pixels - changed_pixels).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("R", [0, 1, 256, 257, 700])
def test_likeliest_tokens_are_the_largest_logits(R: int, dtype: torch.dtype) -> None:
    """In chunks of 256 tokens, what all logits at once would give. (Of small whole numbers,
    which both dtypes add up without rounding.)"""
    generator = torch.Generator().manual_seed(R)
    hidden = torch.randint(-3, 4, (R, 16), generator=generator).to(dtype)
    head = torch.randint(-3, 4, (501, 16), generator=generator).float()
    tokens = likeliest_tokens(hidden, head)
    logits = hidden.float() @ head.T  # [R, 501]
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, logits.argmax(-1))


# --- causal or not --------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_last_token_reaches_the_first_iff_bidirectional(case: Case, packed: bool) -> None:
    """Another last token changes the first hidden state when bidirectional, never when
    causal."""
    numbers = [0, 3, 4] if packed else [3]
    batch = case.moca.processor.batch([case.records[n] for n in numbers])
    place = numbers.index(3)
    begin, end = batch.segments.offsets[place : place + 2]
    tokens = batch.tokens.clone()
    tokens[end - 1] = 5
    changed = replace(batch, tokens=tokens)
    for causal in (False, True):
        change = case.moca.model(changed, causal) - case.moca.model(batch, causal)
        assert (change[begin].abs().max() > 1e-4) == (not causal)
        assert change[end - 1].abs().max() > 1e-2
        assert (change[:begin] == 0).all() and (change[end:] == 0).all()


@torch.no_grad()
def test_an_image_reaches_the_words_before_it_iff_bidirectional(case: Case) -> None:
    """Another picture changes what precedes it when bidirectional, never when causal."""
    batch = case.batch(3)
    changed = replace(batch, pixels=255 - batch.pixels)
    first = int(batch.image_index[0])
    for causal in (False, True):
        change = case.moca.model(changed, causal) - case.moca.model(batch, causal)
        assert (change[:first].abs().max() > 1e-4) == (not causal)
        assert change[first:].abs().max() > 1e-2


def test_blank_image_changes_nothing(moca: Moca, records: list[Record]) -> None:
    """Running the vision tower for the sake of other ranks leaves a batch of text as it is,
    and gives every weight of the tower a gradient of zero."""
    batch = moca.processor.batch([records[0]])
    expected = moca.model(batch, causal=False)
    moca.model.run_vision_always = True
    try:
        hidden = moca.model(batch, causal=False)
    finally:
        moca.model.run_vision_always = False
    assert torch.equal(hidden, expected)
    gradients = torch.autograd.grad(hidden.sum(), list(moca.model.visual.parameters()))
    assert not any(gradient.any() for gradient in gradients)


def test_checkpointing_changes_no_gradient(moca: Moca, records: list[Record]) -> None:
    """Computing a layer again in backward gives the gradients of keeping it, in both
    towers."""
    batch = moca.processor.batch(records)
    gradients = []
    try:
        for on in (False, True):
            moca.model.set_checkpointing(on)
            assert moca.model.language.checkpointing == moca.model.visual.checkpointing == on
            loss = moca.model(batch, causal=False).square().sum()
            gradients.append(torch.autograd.grad(loss, list(moca.model.parameters())))
    finally:
        moca.model.set_checkpointing(False)
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
