"""Stage 1's losses against their plain twin: values, gradients, memory, refusals.

Truth is the plain twin in float64. An error is measured against the largest entry of the
truth, so where the truth is zero (no tokens, no groups) nothing but zero will do.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nano_moca import kernels, losses
from nano_moca.losses import masked_reconstruction_loss, plain_masked_reconstruction_loss

NAMES = ("mlm", "mae", "grad hidden", "grad head", "grad predicted")
ROUNDING = 2**-8  # half of the spacing of bfloat16 numbers between 1 and 2
PLACES = [("cpu", "torch")]  # the kernel without a GPU: see test_kernels.py
if torch.cuda.is_available():
    PLACES += [("cuda", "torch")] + [("cuda", "triton")] * kernels.TRITON_AVAILABLE
MAE_SHAPES = [  # R, G, values of a group
    (37, 5, 37),
    (1, 1, 4704),  # the true size of a group
    (0, 2, 1024),
    (3, 0, 37),
    (2, 1, 1025),
    (1, 1, 1),
    (0, 0, 4704),
]


def make_inputs(R: int, G: int, V: int = 501, D: int = 16, W: int = 37) -> list[Tensor]:
    """hidden, head, labels, predicted, target in float64, with W values per group; the
    labels contain the first and the last word."""
    generator = torch.Generator().manual_seed(1000 * R + G)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden = normal(R, D)
    head = normal(V, D)
    predicted = normal(G, W)
    target = normal(G, W)
    labels = torch.randint(V, (R,), generator=generator)
    labels[:1] = V - 1
    labels[1:2] = 0
    return [hidden, head / D**0.5 * 2, labels, predicted, target]


def cast(inputs: list[Tensor], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The inputs in `dtype`, but for the labels, which stay integers."""
    return [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs]


def make_rounded_inputs(*sizes: int, **more: int) -> list[Tensor]:
    """The same inputs, rounded to numbers that bfloat16 can hold, in float64."""
    return cast(cast(make_inputs(*sizes, **more), torch.bfloat16), torch.float64)


def run(loss: Callable, inputs: list[Tensor], dtype: torch.dtype, device: str = "cpu",
        **options) -> list[Tensor]:
    """Both losses, and the gradients of a weighted sum of them, on inputs cast to `dtype`."""
    inputs = cast(inputs, dtype, device)
    for i in (0, 1, 3):
        inputs[i] = inputs[i].clone().requires_grad_()
    mlm, mae = loss(*inputs, **options)
    (1.7 * mlm + 0.3 * mae).backward()
    results = [mlm, mae, inputs[0].grad, inputs[1].grad, inputs[3].grad]
    return [x.detach().cpu() for x in results]


def errors(results: list[Tensor], truths: list[Tensor]) -> dict[str, float]:
    """The largest error of each result, relative to the largest entry of its truth."""
    def error(result: Tensor, truth: Tensor) -> float:
        if result.shape != truth.shape:
            return float("inf")
        if not truth.any():  # nothing, or zeros: exactly zero is asked for
            return float("inf") if result.any() else 0.0
        return ((result.double() - truth).abs().max() / truth.abs().max()).item()

    return {name: error(result, truth) for name, result, truth in zip(NAMES, results, truths)}


def assert_close(results: list[Tensor], truths: list[Tensor], bound: float = 1e-5) -> None:
    found = errors(results, truths)
    assert all(error <= bound for error in found.values()), found  # NaN fails too


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """What the loss asks of the kernel, chunk by chunk: (tokens, whether a gradient)."""
    calls = []

    def spy(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
        calls.append((len(logits), gradient))
        held = logits.untyped_storage().nbytes() // logits[0].nbytes
        assert held == calls[0][0], "more logits are held than one chunk's"
        return kernels.cross_entropy_torch_(logits, labels, scale, gradient)

    monkeypatch.setitem(kernels.BACKENDS, "torch", spy)
    return calls


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only the second rule: chunks of D/2 tokens in float32."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)


# --- values and gradients -------------------------------------------------------------


@pytest.mark.parametrize("R", [0, 1, 8, 37])
@pytest.mark.parametrize("G", [0, 1, 5])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_equals_the_plain_twin(R: int, G: int, device: str, backend: str,
                               small_chunks: None) -> None:
    inputs = make_inputs(R, G)
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    results = run(masked_reconstruction_loss, inputs, torch.float32, device, backend=backend)
    assert_close(results, truths)


def test_float64_is_float64_throughout(small_chunks: None) -> None:
    inputs = make_inputs(37, 5)
    results = run(masked_reconstruction_loss, inputs, torch.float64)
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    assert_close(results, truths, 1e-12)


def test_the_twin_is_the_textbook() -> None:
    """The truth itself, once by hand: -log softmax at the label, and the mean squared
    error."""
    hidden, head, labels, predicted, target = make_inputs(3, 2)
    softmax = torch.softmax(hidden @ head.T, dim=1)
    mlm, mae = plain_masked_reconstruction_loss(hidden, head, labels, predicted, target)
    assert torch.allclose(mlm, -softmax[range(3), labels].log().mean())
    assert torch.allclose(mae, ((predicted - target) ** 2).mean())


def test_counts_are_what_the_sums_are_divided_by() -> None:
    inputs = make_inputs(37, 5)
    counts = {"mlm_count": 74, "mae_count": 12.5}
    results = run(masked_reconstruction_loss, inputs, torch.float32, **counts)
    assert_close(results, run(plain_masked_reconstruction_loss, inputs, torch.float64, **counts))
    means = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    assert_close(results[:2], [means[0] / 2, means[1] * 5 / 12.5])


def test_shares_of_a_batch_add_up_to_the_batch() -> None:
    """Two ranks, or two micro-batches, of which the second has no picture."""
    hidden, head, labels, predicted, target = make_inputs(37, 5)
    together = run(masked_reconstruction_loss, make_inputs(37, 5), torch.float32)
    counts = {"mlm_count": 37, "mae_count": 5}
    one = run(masked_reconstruction_loss,
              [hidden[:30], head, labels[:30], predicted, target], torch.float32, **counts)
    other = run(masked_reconstruction_loss,
                [hidden[30:], head, labels[30:], predicted[:0], target[:0]],
                torch.float32, **counts)

    # Gradients at tokens and at groups stand one after the other; the others are sums.
    added = []
    for name, ours, theirs in zip(NAMES, one, other, strict=True):
        apart = name in ("grad hidden", "grad predicted")
        added.append(torch.cat([ours, theirs]) if apart else ours + theirs)
    assert_close(added, [x.double() for x in together])


# --- chunks ---------------------------------------------------------------------------


def test_tokens_go_through_in_chunks(small_chunks: None, chunks: list) -> None:
    run(masked_reconstruction_loss, make_inputs(37, 1), torch.float32)  # D = 16: chunks of 8
    assert chunks == [(8, True)] * 4 + [(5, True)]


def test_a_small_vocabulary_needs_no_chunks(chunks: list) -> None:
    run(masked_reconstruction_loss, make_inputs(37, 1), torch.float32)
    assert chunks == [(37, True)]


# --- precision ------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_bfloat16_is_no_worse_than_plain_bfloat16(device: str, backend: str,
                                                  small_chunks: None) -> None:
    inputs = make_rounded_inputs(37, 5)
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    ours = run(masked_reconstruction_loss, inputs, torch.bfloat16, device, backend=backend)
    plain = errors(run(plain_masked_reconstruction_loss, inputs, torch.bfloat16), truths)
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [torch.bfloat16] * 3
    for name, error in errors(ours, truths).items():
        assert error <= plain[name] + ROUNDING, (name, error, plain[name])


def test_the_gradient_of_the_head_is_summed_in_float32(small_chunks: None, chunks: list) -> None:
    """300 chunks of one token that push the same way: in bfloat16 the sum stops growing at
    256."""
    D = 3
    R = 300
    hidden = torch.ones(R, D, dtype=torch.bfloat16)
    head = torch.zeros(5, D, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(R, dtype=torch.int64)
    nothing = torch.zeros(0, 7)
    masked_reconstruction_loss(hidden, head, labels, nothing, nothing, mlm_count=1)[0].backward()
    assert chunks == [(1, True)] * R
    truth = torch.full((5, D), 0.2 * R)
    truth[0] = -0.8 * R
    assert torch.allclose(head.grad.float(), truth, rtol=ROUNDING)


def test_mixed_precision() -> None:
    """bfloat16 activations beside a float32 head and float32 pixels; autocast changes
    nothing."""
    inputs = make_rounded_inputs(9, 2)
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    dtypes = (torch.bfloat16, torch.float32, torch.int64, torch.bfloat16, torch.float32)
    mixed = [x.to(dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
    leaves = [mixed[i].requires_grad_() for i in (0, 1, 3)]
    mlm, mae = masked_reconstruction_loss(*mixed)
    (1.7 * mlm + 0.3 * mae).backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
    assert_close([mlm, mae] + [x.grad for x in leaves], truths, 2 * ROUNDING)

    with torch.autocast("cpu", torch.bfloat16):
        assert_close(run(masked_reconstruction_loss, inputs, torch.float32), truths)


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    inputs = make_inputs(5, 1)
    inputs[0] = inputs[0] * 1e4
    results = run(masked_reconstruction_loss, inputs, torch.float32)
    assert results[0] > 1e3
    assert_close(results, run(plain_masked_reconstruction_loss, inputs, torch.float64))


# --- the MAE half: squared errors, by PyTorch alone -----------------------------------


@pytest.mark.parametrize("shape", MAE_SHAPES, ids=str)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_mae_in_float32(shape: tuple[int, int, int], device: str, backend: str) -> None:
    """Value and gradient are those of float64, and of the plain twin in float32."""
    R, G, W = shape
    inputs = make_inputs(R, G, W=W)
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    plain = run(plain_masked_reconstruction_loss, inputs, torch.float32)
    ours = run(masked_reconstruction_loss, inputs, torch.float32, device, backend=backend)
    assert ours[1].shape == () and ours[4].shape == (G, W)
    for i in (1, 4):
        assert_close(ours[i : i + 1], truths[i : i + 1])
        assert_close(ours[i : i + 1], [plain[i].double()])


@pytest.mark.parametrize("shape", MAE_SHAPES, ids=str)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_mae_in_bfloat16(shape: tuple[int, int, int], device: str, backend: str) -> None:
    """The value is as exact as in float32; the gradient is that of float32, rounded once."""
    R, G, W = shape
    inputs = make_rounded_inputs(R, G, W=W)
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    plain = run(plain_masked_reconstruction_loss, inputs, torch.bfloat16)
    high = run(masked_reconstruction_loss, inputs, torch.float32, device, backend=backend)
    ours = run(masked_reconstruction_loss, inputs, torch.bfloat16, device, backend=backend)
    assert ours[1].dtype == torch.float32 and ours[4].dtype == torch.bfloat16
    assert_close(ours[1:2], truths[1:2])
    assert_close(ours[1:2], [plain[1].double()])
    assert torch.equal(ours[1], high[1])
    assert torch.equal(ours[4], high[4].bfloat16())


def test_mae_is_computed_in_float32() -> None:
    """Difference, square and sum: in bfloat16 each of them would lose what is asked for."""
    predicted = torch.full((3, 4703), 1 + 2**-7, dtype=torch.bfloat16)
    target = torch.full((3, 4703), 2**-9, dtype=torch.bfloat16)
    nothing = make_inputs(0, 0)[:3]
    for pixels in (target, target.float()):
        _, mae = masked_reconstruction_loss(*cast(nothing, torch.bfloat16), predicted, pixels)
        assert mae.dtype == torch.float32
        assert mae.item() == pytest.approx((1 + 2**-7 - 2**-9) ** 2, rel=1e-6)


@pytest.mark.parametrize("G", [3, 100])
def test_mae_sums_groups_first(G: int) -> None:
    """Another order of the sum would change the last digits of what older runs logged."""
    inputs = cast(make_inputs(0, G, W=4704), torch.float32)
    _, mae = masked_reconstruction_loss(*inputs, mae_count=64)
    squares = (inputs[3] - inputs[4]).square()  # [G, 4704]
    scale = 1 / 64 / 4704
    assert torch.equal(mae, squares.sum(1).sum() * scale)
    assert not torch.equal(mae, squares.sum() * scale)  # else this test says nothing


def test_mae_sends_no_gradient_to_the_target() -> None:
    """Even where the target asks for one; and the gradient of `predicted` is the same."""
    inputs = cast(make_inputs(9, 2), torch.float32)
    expected = run(masked_reconstruction_loss, inputs, torch.float32)[4]
    predicted = inputs[3].requires_grad_()
    target = inputs[4].requires_grad_()
    _, mae = masked_reconstruction_loss(*inputs[:3], predicted, target)
    (0.3 * mae).backward()
    assert torch.equal(predicted.grad, expected)
    assert target.grad is None


# --- where gradients go ---------------------------------------------------------------


def test_gradients_go_only_where_they_are_asked_for(chunks: list) -> None:
    everywhere = run(masked_reconstruction_loss, make_inputs(9, 2), torch.float32)
    for asked in ([0], [1], [3], [0, 3], []):
        inputs = cast(make_inputs(9, 2), torch.float32)
        inputs[4].requires_grad_()  # the target: asked or not, it gets none
        for i in asked:
            inputs[i].requires_grad_()

        # The kernel is asked for a gradient only if the MLM half needs one.
        chunks.clear()
        mlm, mae = masked_reconstruction_loss(*inputs)
        assert chunks == [(9, 0 in asked or 1 in asked)]
        assert mae.requires_grad == (3 in asked)
        if asked:
            (1.7 * mlm + 0.3 * mae).backward()
        for i, result in ((0, 2), (1, 3), (3, 4)):
            assert (inputs[i].grad is not None) == (i in asked)
            assert i not in asked or torch.equal(inputs[i].grad, everywhere[result])
        assert inputs[4].grad is None


def test_without_gradients_none_are_computed(chunks: list) -> None:
    hidden, head, labels, predicted, target = make_inputs(9, 2)
    head = torch.nn.Parameter(head)
    predicted = torch.nn.Parameter(predicted)
    with torch.no_grad():
        mlm, mae = masked_reconstruction_loss(hidden, head, labels, predicted, target)
    assert chunks == [(9, False)] and not mlm.requires_grad and not mae.requires_grad
    plain = plain_masked_reconstruction_loss(hidden, head, labels, predicted, target)
    assert_close([mlm, mae], list(plain))


def test_a_second_backward_is_refused() -> None:
    """The saved gradients are scaled in place: once more would square the weight."""
    hidden, *others = make_inputs(9, 2)
    mlm, _ = masked_reconstruction_loss(hidden.requires_grad_(), *others)
    (2 * mlm).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * mlm).backward()


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "change", "message"), [
    (0, lambda x: x[:, 1:], "shapes"),
    (1, lambda x: x[0], "shapes"),
    (2, lambda x: x[1:], "shapes"),
    (2, lambda x: x.int(), "int64"),
    (2, lambda x: torch.full_like(x, 501), "labels must lie between 0 and 500"),
    (2, lambda x: torch.full_like(x, -100), "labels must lie between 0 and 500"),
    (3, lambda x: x[1:], "shapes"),
    (4, lambda x: x[:, 1:], "shapes"),
    (0, lambda x: x.half(), "float16"),
    (3, lambda x: x.half(), "float16"),
])
def test_impossible_inputs_are_refused(place: int, change: Callable, message: str) -> None:
    inputs = make_inputs(9, 2)
    inputs[place] = change(inputs[place])
    with pytest.raises(ValueError, match=message):
        masked_reconstruction_loss(*inputs)


@pytest.mark.parametrize(("options", "message"), [
    ({"backend": "cuda"}, "backend must be"),
    ({"mlm_count": 0}, "9 rows cannot be divided by a count of 0"),
    ({"mae_count": -1}, "2 rows cannot be divided by a count of -1"),
    ({"mlm_count": float("nan")}, "count of nan"),
])
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_reconstruction_loss(*make_inputs(9, 2), **options)


def test_a_global_count_of_nothing_is_fine_where_there_is_nothing() -> None:
    inputs = make_inputs(0, 0)
    results = run(masked_reconstruction_loss, inputs, torch.float32, mlm_count=0, mae_count=0)
    assert not any(x.any() for x in results)


# --- memory ---------------------------------------------------------------------------


def peak_memory() -> int:
    """The most bytes this process ever held. (ru_maxrss on Linux may be what its parent
    held.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines()
                    if line.startswith("VmHWM")) * 1024
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure() -> None:
    """Print by how many bytes each loss over Qwen's vocabulary raises the peak."""
    V = 151_936
    D = 256
    R = 1024
    hidden = torch.full((R, D), 0.1, requires_grad=True)
    head = torch.full((V, D), 0.1, requires_grad=True)
    labels = torch.randint(V, (R,))
    nothing = torch.zeros(0, 4704)
    hidden[:2].detach() @ head[:2].detach().T  # let the matmul library take what it takes

    before = peak_memory()
    masked_reconstruction_loss(hidden, head, labels, nothing, nothing)[0].backward()
    fused = peak_memory() - before
    gradients = hidden.grad.nbytes + head.grad.nbytes

    # Freed blocks of this size go back to the system at once.
    hidden.grad = None
    head.grad = None
    torch.nn.functional.cross_entropy(hidden @ head.T, labels).backward()
    print(fused, gradients, peak_memory() - before)


def test_memory_is_a_tenth_of_the_plain_loss() -> None:
    """151,936 words, 1,024 tokens: what the fused loss holds beside the gradients that it
    returns."""
    environment = os.environ | {"PYTHONPATH": str(Path(losses.__file__).resolve().parents[1])}
    output = subprocess.run([sys.executable, __file__], env=environment, check=True,
                            capture_output=True, text=True).stdout
    fused, gradients, plain = map(int, output.split())
    print(f"peak in bytes: fused {fused}, {gradients} of it gradients; plain {plain}")
    assert plain > 1.2e9 and fused > gradients  # else the measure is broken
    assert fused - gradients <= plain / 10


if __name__ == "__main__":
    measure()
