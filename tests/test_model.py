"""The whole model: equal to the reference on the golden cases, and indifferent to packing.

`golden/` was written by transformers (eager attention, float32, one record at a time): token ids,
positions, pixels, and for each of the models what every stage computes on eight records.
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
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import Corruption, corrupt, next_token
from nano_moca.model import Restorer
from nano_moca.processor import Batch

CASES = ("qwen2.5-vl", "qwen2.5-vl-newer-layout", "qwen2.5-vl-untied", "qwen2-vl")
every_record = pytest.mark.parametrize("number", range(8))
close = partial(torch.testing.assert_close, rtol=0)


@dataclass
class Case:
    """A loaded checkpoint and what the reference computed with it: {"<record>.<what>": tensor}."""

    moca: Moca
    records: list[Record]
    expected: dict[str, Tensor]

    def batch(self, number: int) -> Batch:
        return self.moca.processor.batch([self.records[number]])


@pytest.fixture(scope="module", params=CASES)
def case(request, golden: Path, newer_layout: Path, records: list[Record]) -> Case:
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
    image_tokens = case.moca.model.visual(batch.patches, batch.grids)
    close(image_tokens, case.expected[f"{number}.vision"], atol=1e-3)


@every_record
@torch.no_grad()
def test_hidden_states(case: Case, number: int) -> None:
    """Every layer's input and the last hidden states are the reference's to 1e-3, both ways."""
    model, batch, caught = case.moca.model, case.batch(number), []
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
    tokens = case.moca.model.greedy(case.batch(number), 8, end=-1)
    assert tokens == [case.expected[f"{number}.greedy"].tolist()]


def test_greedy_packed_and_ended(case: Case) -> None:
    """Records packed together get the tokens they get alone, cut before the end token."""
    batch, model = case.moca.processor.batch(case.records), case.moca.model
    expected = [case.expected[f"{number}.greedy"].tolist() for number in range(8)]
    assert model.greedy(batch, 8, end=-1) == expected
    end = expected[0][3]
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected]
    assert model.greedy(batch, 8, end) == cut


# ---- packing changes nothing


def orders(count: int) -> list[list[int]]:
    """A few random orders of `count` records."""
    return [torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
            for seed in range(3)]


@pytest.mark.parametrize("attention, pooling", [("bidirectional", "mean"), ("causal", "last")])
def test_packed_embeddings(case: Case, attention: str, pooling: str) -> None:
    """Embeddings are the same alone and packed in any order, to 2e-6."""
    moca, records = replace(case.moca, attention=attention, pooling=pooling), case.records
    alone = torch.cat([moca.embed([record]) for record in records])
    for order in orders(len(records)):
        close(moca.embed([records[n] for n in order]), alone[order], atol=2e-6)


def test_embed_in_several_passes(moca: Moca, records: list[Record], monkeypatch) -> None:
    """The token budget of a forward pass changes neither vectors nor their order."""
    expected = moca.embed(records)
    monkeypatch.setattr(nano_moca, "TOKENS_AT_ONCE", 30)
    close(moca.embed(records), expected, atol=2e-6)


def stage_one(restorer: Restorer, corruption: Corruption, causal: bool) -> tuple[Tensor, list]:
    """Each record's (sum of word losses, sum of patch losses) [N, 2], and the sums' gradients."""
    ends = corruption.batch.cu_seqlens[1:]
    whose_word = torch.bucketize(corruption.text_rows, ends, right=True)
    whose_group = torch.bucketize(corruption.group_rows, ends, right=True)

    def by_record(hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor, target: Tensor
                  ) -> Tensor:
        losses = []
        for n in range(len(ends)):
            words, groups = whose_word == n, whose_group == n
            losses.append(torch.stack(masked_reconstruction_loss(
                hidden[words], head, labels[words], predicted[groups], target[groups],
                mlm_count=1, mae_count=1)))
        return torch.stack(losses)

    losses = restorer(corruption, causal, by_record)
    gradients = torch.autograd.grad(losses.sum(), list(restorer.parameters()), allow_unused=True,
                                    materialize_grads=True)
    return losses.detach(), gradients


@pytest.mark.parametrize("objective", ["restore", "next token"])
def test_packed_stage_one(case: Case, objective: str) -> None:
    """Stage 1's losses and gradients are the same alone, summed, and packed in another order.

    Losses: to 2e-6 of their size. Gradients: the norm of the difference over all parameters is at
    most 5e-6 of the gradient's norm (float32 rounding: 3e-6 was measured), and no single
    parameter's is above 5e-5 of its own.
    """
    processor, records = case.moca.processor, case.records
    restorer = Restorer(case.moca.model)
    restorer.patch_decoder.to_empty(device="cpu").start_from(case.moca.model.language, seed=0)

    def exercise(order: list[int]) -> tuple[Tensor, list]:
        batch = processor.batch([records[n] for n in order])
        if objective == "next token":
            return stage_one(restorer, next_token(batch, processor), causal=True)
        keys = [(0, n) for n in order]
        return stage_one(restorer, corrupt(batch, processor, 0.4, 0.5, keys), causal=False)

    alone = [exercise([n]) for n in range(len(records))]
    losses = torch.cat([loss for loss, _ in alone])
    gradients = [sum(parts) for parts in zip(*(gradient for _, gradient in alone), strict=True)]
    assert losses[:, 0].sum() > 0 and (losses[:, 1].sum() > 0) == (objective == "restore")
    order = [5, 3, 0, 6, 7, 2, 1, 4]
    packed_losses, packed = exercise(order)
    torch.testing.assert_close(packed_losses, losses[order], atol=2e-6, rtol=2e-6)
    off = [(a - b).norm() for a, b in zip(packed, gradients, strict=True)]
    size = [gradient.norm() for gradient in gradients]
    assert torch.stack(off).norm() <= 5e-6 * torch.stack(size).norm()
    floor = 1e-6 * torch.stack(size).norm()  # a key's bias has no gradient but for rounding
    assert all(d <= 5e-5 * s + floor for d, s in zip(off, size, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_last_token_reaches_the_first_iff_bidirectional(case: Case, packed: bool) -> None:
    """Another last token changes the first hidden state when bidirectional, never when causal."""
    numbers = [0, 3, 4] if packed else [3]
    batch = case.moca.processor.batch([case.records[n] for n in numbers])
    begin, end = (batch.cu_seqlens[numbers.index(3) + i] for i in (0, 1))
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
    changed = replace(batch, patches=-batch.patches)
    first = int(batch.image_rows[0])
    for causal in (False, True):
        change = case.moca.model(changed, causal) - case.moca.model(batch, causal)
        assert (change[:first].abs().max() > 1e-4) == (not causal)
        assert change[first:].abs().max() > 1e-2


@torch.no_grad()
def test_blank_image_changes_nothing(moca: Moca, records: list[Record]) -> None:
    """Running the vision tower for the sake of other ranks leaves a batch of text as it is."""
    batch = moca.processor.batch([records[0]])
    expected = moca.model(batch, causal=False)
    moca.model.always_see = True
    try:
        assert torch.equal(moca.model(batch, causal=False), expected)
    finally:
        moca.model.always_see = False


def test_checkpointing_changes_no_gradient(moca: Moca, records: list[Record]) -> None:
    """Recomputing a layer in backward gives the gradients of keeping it."""
    batch, decoder = moca.processor.batch(records), moca.model.language
    gradients = []
    for decoder.checkpointing in (False, True):
        loss = moca.model(batch, causal=False).square().sum()
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
    decoder.checkpointing = False
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
