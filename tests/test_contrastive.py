"""Stage 2's loss: InfoNCE, embeddings gathered across ranks with their gradient, gradient cache."""

import socket
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor

from nano_moca import losses
from nano_moca.losses import backward_through_cache, gather, info_nce

B, D, PER_QUERY = 7, 16, 2


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit queries and positives [B, D], hard negatives [B, 2, D], equal positives [B, B]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, D), (B, D), (B, PER_QUERY, D)
    vectors = [F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
               for shape in shapes]
    vectors[1][4] = vectors[1][2]
    equal = torch.zeros(B, B, dtype=torch.bool)
    equal[2, 4] = equal[4, 2] = True
    return *(v.to(dtype) for v in vectors), equal


def forbidden(equal: Tensor, mine: Tensor) -> Tensor:
    """[n, B + M] as the sampler makes it: equal positives, and other queries' hard negatives."""
    others = ~torch.eye(len(mine), dtype=torch.bool).repeat_interleave(PER_QUERY, 1)
    return torch.cat([equal[mine], others], 1)


def plain_loss(queries: Tensor, positives: Tensor, negatives: Tensor, equal: Tensor,
               temperature: float) -> Tensor:
    """The definition, pair by pair."""
    terms = []
    for i in range(B):
        candidates = [positives[i], *(positives[j] for j in range(B) if j != i and not equal[i, j]),
                      *negatives[i]]
        logits = torch.stack([queries[i] @ candidate for candidate in candidates]) / temperature
        terms.append(logits.logsumexp(0) - logits[0])
    return torch.stack(terms).mean()


def shared(queries: Tensor, positives: Tensor, negatives: Tensor, equal: Tensor, mine: Tensor,
           temperature: float = 0.03) -> tuple[Tensor, Tensor]:
    """A rank's call, with its part of the batch."""
    return info_nce(queries[mine], positives[mine], negatives[mine].flatten(0, 1), mine,
                    forbidden(equal, mine), temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 1.0])
def test_info_nce_is_its_definition(temperature: float) -> None:
    """Loss and all gradients equal the plain loop in float64."""
    *vectors, equal = batch()
    truth = [v.double().requires_grad_() for v in vectors]
    expected = plain_loss(*truth, equal, temperature)
    expected.backward()
    ours = [v.requires_grad_() for v in vectors]
    loss, _ = shared(*ours, equal, torch.arange(B), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, its in zip(ours, truth, strict=True):
        assert mine.grad.double().allclose(its.grad, atol=1e-5 * its.grad.abs().max())


def test_bfloat16_embeddings_are_compared_in_float32() -> None:
    """The loss of bfloat16 vectors is that of the same vectors in float32."""
    *vectors, equal = batch(torch.bfloat16)
    low, _ = shared(*vectors, equal, torch.arange(B))
    high, _ = shared(*(v.float() for v in vectors), equal, torch.arange(B))
    assert low.dtype == torch.float32 and low.item() == high.item()


def test_right_answers_are_counted_strictly() -> None:
    """All right where queries are their positives; none where everything is one point, or NaN."""
    *vectors, _ = batch()
    nothing = torch.zeros(B, B, dtype=torch.bool)
    apart = torch.eye(B, D)
    assert shared(apart, apart, torch.zeros(B, 2, D), nothing, torch.arange(B))[1] == B
    point = torch.ones(B, D) / 4
    assert shared(point, point, point[:, None].expand(B, 2, D), nothing, torch.arange(B))[1] == 0
    broken = torch.full((B, D), float("nan"))
    assert shared(broken, broken, vectors[2], nothing, torch.arange(B))[1] == 0


def test_a_rank_without_pairs() -> None:
    """Nothing: a loss of zero that still has a gradient."""
    empty = torch.zeros(0, D, requires_grad=True)
    rows = torch.zeros(0, dtype=torch.int64)
    loss, right = info_nce(empty, empty, empty, rows, torch.zeros(0, B, dtype=torch.bool), 0.03)
    loss.backward()
    assert loss.item() == right.item() == 0 and empty.grad.shape == (0, D)


# --- across ranks -------------------------------------------------------------------------------

def without_gradient(mine: Tensor, rows: Tensor, total: int) -> Tensor:
    """What a plain all-gather does: other ranks' losses do not reach this rank's embeddings."""
    whole = gather(mine.detach(), rows, total)
    return whole.index_copy(0, rows, mine)


SHARES = {  # of the pairs, to two ranks
    "even": ([0, 2, 4, 6], [1, 3, 5]),
    "uneven": ([3], [0, 1, 2, 4, 5, 6]),
    "nothing for one": ([], [0, 1, 2, 3, 4, 5, 6]),
    "without gradient": ([0, 2, 4, 6], [1, 3, 5]),
}
Result = tuple[float, int, list[Tensor]]  # loss, right answers, gradients


def rank_gradients(rank: int, port: int, folder: str) -> None:
    """One of two ranks: its part of each case, forward and backward; what it got goes to a file."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for case, shares in SHARES.items():
        losses.gather = without_gradient if case == "without gradient" else gather
        results[case] = gradients(torch.tensor(shares[rank], dtype=torch.int64))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def gradients(mine: Tensor) -> Result:
    """Loss, right answers and gradients of a rank with these pairs."""
    *vectors, equal = batch()
    vectors = [v.requires_grad_() for v in vectors]
    loss, right = shared(*vectors, equal, mine)
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
    one, two = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return {case: (one[case][0] + two[case][0], one[case][1] + two[case][1],
                   [a + b for a, b in zip(one[case][2], two[case][2], strict=True)])
            for case in SHARES}


@pytest.mark.parametrize("case", ["even", "uneven", "nothing for one"])
def test_two_ranks_are_one(two_ranks: dict[str, Result], case: str) -> None:
    """However the pairs are divided, the sums over ranks are those of one process."""
    (loss, right, grads), (one_loss, one_right, one_grads) = (
        two_ranks[case], gradients(torch.arange(B)))
    assert loss == pytest.approx(one_loss, rel=1e-6) and right == one_right
    for ours, theirs in zip(grads, one_grads, strict=True):
        assert ours.allclose(theirs, atol=1e-6)


def test_a_gather_without_gradient_would_fail(two_ranks: dict[str, Result]) -> None:
    """The same loss, and yet the positives' gradient is wrong: this is what the test above sees."""
    (loss, _, grads), (one_loss, _, one_grads) = (
        two_ranks["without gradient"], gradients(torch.arange(B)))
    assert loss == pytest.approx(one_loss, rel=1e-6)
    assert not grads[1].allclose(one_grads[1], atol=1e-2 * one_grads[1].abs().max())


# --- gradient cache -----------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[21], [7, 7, 7], [1] * 21, [20, 1], [0, 21]])
def test_gradient_cache_changes_nothing(sizes: list[int]) -> None:
    """Weights get the gradient of the whole batch, whatever the chunks; the loss is called once."""
    inputs = torch.randn(3 * B, 5, generator=torch.Generator().manual_seed(1))
    *_, equal = batch()
    equal[:] = False

    def gradient(chunks: list[list[int]], backward: Callable) -> Tensor:
        weight = torch.linspace(-1, 1, 5 * D).sin().view(5, D).requires_grad_()
        calls = []

        def loss(vectors: Tensor) -> Tensor:
            calls.append(len(vectors))
            queries, positives, negatives = vectors.split(B)
            rows = torch.arange(B)
            mask = torch.cat([equal, ~torch.eye(B, dtype=torch.bool)], 1)
            return info_nce(queries, positives, negatives, rows, mask, 0.03)[0]

        backward(lambda chunk: F.normalize(inputs[chunk] @ weight, dim=-1), chunks, loss)
        assert calls == [3 * B]
        return weight.grad

    numbers = list(range(3 * B))
    whole = gradient([numbers], lambda embed, chunks, loss: loss(embed(chunks[0])).backward())
    chunks = [numbers[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    assert gradient(chunks, backward_through_cache).allclose(whole, rtol=1e-4, atol=1e-5)
