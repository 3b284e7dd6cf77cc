"""Attention and rotary embedding: the fast paths equal the definition, and no sequence sees
another."""

import pytest
import torch
from torch import Tensor

from nano_moca.attention import (
    Segments,
    attend,
    grouped_attention,
    reference_attention,
    varlen_attention,
    varlen_attn,
)
from nano_moca.model import rotary_frequencies, rotate

HEADS = 4  # H, of queries
WIDTH = 16  # d, of one head
LENGTHS = {
    "one token": (1,),
    "one sequence": (13,),
    "equal lengths": (5, 5, 5),
    "length one among others": (7, 1, 3, 1, 12),
    "many": tuple(torch.randint(1, 20, (15,), generator=torch.Generator().manual_seed(0)).tolist()),
}


def segments_of(lengths: tuple[int, ...], device: str = "cpu") -> Segments:
    return Segments.of(lengths, torch.device(device))


def make_inputs(total: int, kv_heads: int, seed: int = 0) -> list[Tensor]:
    """Random query [T, H, d], key and value [T, K, d] in float64, with gradients; T is
    `total`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for heads in (HEADS, kv_heads, kv_heads):
        x = torch.randn(total, heads, WIDTH, generator=generator, dtype=torch.float64)
        inputs.append(x.requires_grad_())
    return inputs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_grouped_equals_reference(lengths: tuple[int, ...], kv_heads: int, causal: bool) -> None:
    """The fused path gives the definition's values and gradients, for grouped queries too."""
    inputs = make_inputs(sum(lengths), kv_heads)
    segments = segments_of(lengths)
    expected = reference_attention(*inputs, segments, causal)
    actual = grouped_attention(*inputs, segments, causal)

    # The definition takes its softmax in float32, so no closer than that.
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)

    weights = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad((actual * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for our_gradient, gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_gradient, gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_random_lengths(causal: bool) -> None:
    """The two paths agree on ten random packings."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 9, (1,), generator=generator))
        lengths = tuple(torch.randint(1, 9, (count,), generator=generator).tolist())
        inputs = make_inputs(sum(lengths), 2, seed)
        segments = segments_of(lengths)
        torch.testing.assert_close(
            grouped_attention(*inputs, segments, causal),
            reference_attention(*inputs, segments, causal), atol=2e-6, rtol=0)


@pytest.mark.parametrize("attention", [reference_attention, grouped_attention])
@pytest.mark.parametrize("lengths, first, last", [((6,), 0, 5), ((3, 6, 2, 6), 3, 8)],
                         ids=["alone", "packed"])
def test_last_token_is_seen_when_bidirectional(attention, lengths, first: int, last: int) -> None:
    """A sequence's last token changes its first output when bidirectional, and not when
    causal."""
    segments = segments_of(lengths)
    before = [x.detach() for x in make_inputs(sum(lengths), 2)]
    after = [x.clone() for x in before]
    for x in after:
        x[last] += 1.0
    for causal in (False, True):
        change = attention(*after, segments, causal) - attention(*before, segments, causal)
        assert (change[first].abs().max() > 1e-3) == (not causal)
        assert change[last].abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attention", [reference_attention, grouped_attention])
def test_nothing_crosses_a_border(attention, causal: bool) -> None:
    """Changing one sequence leaves every other one's output the same to the bit."""
    lengths = (4, 1, 7, 4)
    segments = segments_of(lengths)
    before = [x.detach() for x in make_inputs(sum(lengths), 2)]
    after = [x.clone() for x in before]
    for x in after:
        x[5:12] = 100.0 * torch.randn_like(x[5:12])

    # The third sequence is tokens 5 to 11.
    same = attention(*after, segments, causal) == attention(*before, segments, causal)
    assert same[:5].all() and same[12:].all() and not same[5:12].all()


def test_packing_order_is_kept() -> None:
    """Each packed sequence gets what it gets alone, whatever lies beside it."""
    lengths = (3, 1, 5, 3, 1)
    query, key, value = make_inputs(sum(lengths), 2)
    packed = attend(query, key, value, segments_of(lengths), True)
    pieces = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    alone = [attend(*piece, segments_of((len(piece[0]),)), True) for piece in pieces]
    torch.testing.assert_close(packed, torch.cat(alone))


@pytest.mark.skipif(not torch.cuda.is_available() or varlen_attn is None, reason="needs CUDA")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_varlen_equals_reference_on_cuda(lengths: tuple[int, ...], causal: bool) -> None:
    """The variable-length kernel gives the definition's values and gradients to bfloat16."""
    inputs = [x.detach().to("cuda", torch.bfloat16).requires_grad_()
              for x in make_inputs(sum(lengths), 2)]
    segments = segments_of(lengths, "cuda")
    expected = reference_attention(*inputs, segments, causal)
    actual = varlen_attention(*inputs, segments, causal)
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)

    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((actual * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for our_gradient, gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_gradient, gradient, atol=6e-2, rtol=6e-2)


def test_rotary_product_depends_on_the_difference_of_positions() -> None:
    """A query at m and a key at n have the same product wherever m - n is the same, and
    another one elsewhere."""
    query, key, _ = [x.detach() for x in make_inputs(1, HEADS)]
    frequencies = rotary_frequencies(WIDTH, 10000.0, torch.device("cpu")).double()

    def product(m: int, n: int) -> Tensor:
        turned_query = rotate(query, m * frequencies[None], query.dtype)
        turned_key = rotate(key, n * frequencies[None], key.dtype)
        return torch.einsum("thd,thd->h", turned_query, turned_key)

    torch.testing.assert_close(product(7, 4), product(103, 100))
    torch.testing.assert_close(product(0, 9), product(41, 50))
    assert (product(7, 4) - product(7, 5)).abs().max() > 1e-3


def test_rotary_keeps_lengths_and_leaves_position_zero() -> None:
    """A rotation changes no norm, and position 0 changes nothing."""
    x = make_inputs(5, 2)[0].detach()
    frequencies = rotary_frequencies(WIDTH, 10000.0, torch.device("cpu"))
    turned = rotate(x, torch.arange(5)[:, None] * frequencies, x.dtype)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0]) and not torch.equal(turned[1], x[1])


def test_rotary_pairs_and_direction() -> None:
    """The pair (x[i], x[i + d/2]) turns by angles[i], anticlockwise: the half-split form
    of Qwen."""
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    turned = rotate(x, torch.tensor([[torch.pi / 2, torch.pi]]), x.dtype)
    torch.testing.assert_close(turned, torch.tensor([[[0.0, 0.0, 1.0, -1.0]]]), atol=1e-6, rtol=0)
