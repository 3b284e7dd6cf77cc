"""Stage 2's loss: InfoNCE, embeddings gathered across ranks with their gradient, and the
gradient cache in the loop of train_cl.py."""

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import train_cl
from nano_moca import MARK, Moca, losses
from nano_moca.batch import Batch
from nano_moca.batches import PairBatch, PairBatches
from nano_moca.flags import parse_flags
from nano_moca.losses import gather, info_nce
from nano_moca.model import VLM

B = 7  # pairs
D = 16
PER_QUERY = 2  # hard negatives


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit queries and positives [B, D], hard negatives [B, 2, D], equal positives [B, B]."""
    generator = torch.Generator().manual_seed(0)
    vectors = []
    for shape in ((B, D), (B, D), (B, PER_QUERY, D)):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        vectors.append(F.normalize(drawn, dim=-1))
    vectors[1][4] = vectors[1][2]
    equal = torch.zeros(B, B, dtype=torch.bool)
    equal[2, 4] = True
    equal[4, 2] = True
    return *(v.to(dtype) for v in vectors), equal


def excluded_candidates(equal: Tensor, local_index: Tensor) -> Tensor:
    """[n, B + M] as PairBatches makes it: equal positives, and other queries' hard
    negatives."""
    own = torch.eye(len(local_index), dtype=torch.bool).repeat_interleave(PER_QUERY, 1)
    return torch.cat([equal[local_index], ~own], 1)


def plain_loss(queries: Tensor, positives: Tensor, negatives: Tensor, equal: Tensor,
               temperature: float) -> Tensor:
    """The definition, pair by pair."""
    terms = []
    for i in range(B):
        candidates = [positives[i]]
        candidates += [positives[j] for j in range(B) if j != i and not equal[i, j]]
        candidates += list(negatives[i])
        cosines = torch.stack([queries[i] @ candidate for candidate in candidates])
        logits = cosines / temperature
        terms.append(logits.logsumexp(0) - logits[0])
    return torch.stack(terms).mean()


def share_of_loss(queries: Tensor, positives: Tensor, negatives: Tensor, equal: Tensor,
                  local_index: Tensor, temperature: float = 0.03) -> tuple[Tensor, Tensor]:
    """What a rank that has these pairs of the batch computes."""
    own_negatives = negatives[local_index].flatten(0, 1)  # [M, D]
    return info_nce(queries[local_index], positives[local_index], own_negatives, local_index,
                    excluded_candidates(equal, local_index), temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 1.0])
def test_info_nce_is_its_definition(temperature: float) -> None:
    """Loss and all gradients equal the plain loop in float64."""
    *vectors, equal = batch()
    truth = [v.double().requires_grad_() for v in vectors]
    expected = plain_loss(*truth, equal, temperature)
    expected.backward()
    ours = [v.requires_grad_() for v in vectors]
    loss, _ = share_of_loss(*ours, equal, torch.arange(B), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for our, true in zip(ours, truth, strict=True):
        assert our.grad.double().allclose(true.grad, atol=1e-5 * true.grad.abs().max())


def test_bfloat16_embeddings_are_compared_in_float32() -> None:
    """The loss of bfloat16 vectors is that of the same vectors in float32."""
    *vectors, equal = batch(torch.bfloat16)
    low, _ = share_of_loss(*vectors, equal, torch.arange(B))
    high, _ = share_of_loss(*(v.float() for v in vectors), equal, torch.arange(B))
    assert low.dtype == torch.float32 and low.item() == high.item()


def test_right_answers_are_counted_strictly() -> None:
    """All right where queries are their positives; none where everything is one point, or
    NaN."""
    *_, negatives, _ = batch()
    no_equals = torch.zeros(B, B, dtype=torch.bool)
    all_pairs = torch.arange(B)
    apart = torch.eye(B, D)
    zeros = torch.zeros(B, 2, D)
    assert share_of_loss(apart, apart, zeros, no_equals, all_pairs)[1] == B

    point = torch.ones(B, D) / 4
    same_negatives = point[:, None].expand(B, 2, D)
    assert share_of_loss(point, point, same_negatives, no_equals, all_pairs)[1] == 0

    broken = torch.full((B, D), float("nan"))
    assert share_of_loss(broken, broken, negatives, no_equals, all_pairs)[1] == 0


def test_a_rank_without_pairs() -> None:
    """Nothing: a loss of zero that still has a gradient."""
    empty = torch.zeros(0, D, requires_grad=True)
    local_index = torch.zeros(0, dtype=torch.int64)
    excluded = torch.zeros(0, B, dtype=torch.bool)
    loss, right = info_nce(empty, empty, empty, local_index, excluded, 0.03)
    loss.backward()
    assert loss.item() == right.item() == 0 and empty.grad.shape == (0, D)


# --- across ranks ---------------------------------------------------------------------


def without_gradient(local: Tensor, local_index: Tensor, total: int) -> Tensor:
    """What a plain all-gather does: other ranks' losses do not reach this rank's
    embeddings."""
    gathered = gather(local.detach(), local_index, total)
    return gathered.index_copy(0, local_index, local)


SHARES = {  # of the pairs, to two ranks
    "even": ([0, 2, 4, 6], [1, 3, 5]),
    "uneven": ([3], [0, 1, 2, 4, 5, 6]),
    "nothing for one": ([], [0, 1, 2, 3, 4, 5, 6]),
    "without gradient": ([0, 2, 4, 6], [1, 3, 5]),
}
Result = tuple[float, int, list[Tensor]]  # loss, right answers, gradients


def rank_gradients(rank: int, port: int, folder: str) -> None:
    """One of two ranks: its part of each case, forward and backward; what it got goes to a
    file."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for case, shares in SHARES.items():
        losses.gather = without_gradient if case == "without gradient" else gather
        results[case] = gradients(torch.tensor(shares[rank], dtype=torch.int64))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def gradients(local_index: Tensor) -> Result:
    """Loss, right answers and gradients of a rank with these pairs."""
    *vectors, equal = batch()
    vectors = [v.requires_grad_() for v in vectors]
    loss, right = share_of_loss(*vectors, equal, local_index)
    loss.backward()
    return loss.item(), int(right), [v.grad for v in vectors]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What two gloo processes computed, added up, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.spawn(rank_gradients, (port, str(folder)), nprocs=2)

    one = torch.load(folder / "0.pt", weights_only=True)
    two = torch.load(folder / "1.pt", weights_only=True)
    sums = {}
    for case in SHARES:
        added = [a + b for a, b in zip(one[case][2], two[case][2], strict=True)]
        sums[case] = (one[case][0] + two[case][0], one[case][1] + two[case][1], added)
    return sums


@pytest.mark.parametrize("case", ["even", "uneven", "nothing for one"])
def test_two_ranks_are_one(two_ranks: dict[str, Result], case: str) -> None:
    """However the pairs are divided, the sums over ranks are those of one process."""
    loss, right, grads = two_ranks[case]
    one_loss, one_right, one_grads = gradients(torch.arange(B))
    assert loss == pytest.approx(one_loss, rel=1e-6) and right == one_right
    for ours, theirs in zip(grads, one_grads, strict=True):
        assert ours.allclose(theirs, atol=1e-6)


def test_a_gather_without_gradient_would_fail(two_ranks: dict[str, Result]) -> None:
    """The same loss, and yet the positives' gradient is wrong: what the test above looks
    for."""
    loss, _, grads = two_ranks["without gradient"]
    one_loss, _, one_grads = gradients(torch.arange(B))
    assert loss == pytest.approx(one_loss, rel=1e-6)
    assert not grads[1].allclose(one_grads[1], atol=1e-2 * one_grads[1].abs().max())


# --- gradient cache: steps 2 to 4 of the loop in train_cl.py ---------------------------


@dataclass
class Step:
    """What one step of train_cl.py did, up to where it would move the weights."""

    pairs: PairBatch | None = None
    model: VLM | None = None  # with the gradients of the step
    loss: float = 0.0
    embedded: list[tuple[int, bool]] = field(default_factory=list)  # see `spied_embed`
    compared: list[int] = field(default_factory=list)  # vectors of each call of info_nce


class Stopped(Exception):
    """Ends a run where its first step would move the weights."""


def all_gradients(model: VLM) -> Tensor:
    """Of all weights, one after the other."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """B pairs with a hard negative each, 3 * B records: pictures, and captions of several
    lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    lines = []
    for i in range(B):
        height, width = ((56, 56), (84, 56), (56, 112))[i % 3]
        pixels = random.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        query = {"text": f"{MARK} picture {i}", "images": [f"{i}.png"]}
        positive = {"text": f"noise number {i} " + "and more " * (i % 4)}
        lines.append({"task": "noise", "kind": "image-text", "query": query,
                      "positive": positive, "negatives": [{"text": f"nothing like {i}"}]})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def one_step(golden: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
             ) -> Callable[[list[int]], Step]:
    """The loop itself, run once over all pairs in chunks of the sizes that are asked for."""
    step = Step()
    embed = VLM.embed

    def spied_embed(model: VLM, batch: Batch, *others) -> Tensor:
        """Notes of each forward pass how many records it has, and whether with a graph."""
        step.embedded.append((len(batch.lengths), torch.is_grad_enabled()))
        return embed(model, batch, *others)

    def spied_info_nce(queries, positives, negatives, *others) -> tuple[Tensor, Tensor]:
        step.compared.append(len(queries) + len(positives) + len(negatives))
        return info_nce(queries, positives, negatives, *others)

    def stop(number, losses, flags, model, *others) -> None:
        step.model = model
        step.loss = losses[0].item()
        raise Stopped

    def run(sizes: list[int]) -> Step:
        def packed_steps(batches: PairBatches, *others: object) -> Iterator:
            step.pairs = next(batches)
            ends = np.cumsum(sizes)
            step.pairs.chunks = [step.pairs.records[end - size : end]
                                 for size, end in zip(sizes, ends)]
            return real(iter([step.pairs]), *others)

        real = train_cl.packed_steps
        monkeypatch.setattr(train_cl, "packed_steps", packed_steps)
        with pytest.raises(Stopped):
            train_cl.train(parse_flags(train_cl.Flags, words, ""))
        return step

    monkeypatch.setattr(VLM, "embed", spied_embed)
    monkeypatch.setattr(train_cl, "info_nce", spied_info_nce)
    monkeypatch.setattr(train_cl, "update", stop)
    words = ["--model", str(golden / "qwen2.5-vl"), "--data", str(pairs), "--output",
             str(tmp_path / "run"), "--device", "cpu", "--steps", "1", "--batch", str(B),
             "--hard-negatives", "1", "--temperature", "0.05"]
    return run


@pytest.mark.parametrize("sizes", [[21], [7, 7, 7], [1] * 21, [20, 1], [0, 21]], ids=str)
def test_gradient_cache_changes_nothing(one_step: Callable[[list[int]], Step], moca: Moca,
                                        sizes: list[int]) -> None:
    """Weights get the gradient of all records at once, whatever the chunks, and the loss is
    taken once, over all vectors."""
    step = one_step(sizes)
    cached = all_gradients(step.model)
    assert step.compared == [3 * B]

    # A single chunk needs no cache. Of several, all are embedded without a graph, and then
    # each once more with one. In place of an empty one, a filler takes part.
    records = [max(size, 1) for size in sizes]
    once = [(count, len(sizes) == 1) for count in records]
    again = [(count, True) for count in records] if len(sizes) > 1 else []
    assert step.embedded == once + again

    # The same by hand, at once.
    step.model.zero_grad()
    vectors = step.model.embed(moca.processor.pack(step.pairs.records), False, "mean")
    queries, positives, negatives = vectors.split(B)
    loss, _ = info_nce(queries, positives, negatives, step.pairs.local_index,
                       step.pairs.excluded, 0.05)
    loss.backward()
    at_once = all_gradients(step.model)
    assert step.loss == pytest.approx(loss.item(), rel=1e-6)
    assert at_once.norm() > 1
    assert (cached - at_once).norm() <= 2e-6 * at_once.norm()
