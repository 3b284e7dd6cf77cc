"""The fused masked-reconstruction loss against its plain twin: values, gradients, memory, refusals.

Truth is the plain twin in float64. An error is measured against the largest entry of the truth, so
where the truth is zero (no rows) nothing but zero will do.
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
PLACES = [("cpu", "torch")]  # the kernels without a GPU: see test_kernels.py
if torch.cuda.is_available():
    PLACES += [("cuda", "torch")] + [("cuda", "triton")] * kernels.TRITON_AVAILABLE


def make_inputs(R: int, G: int, V: int = 501, D: int = 16, W: int = 37) -> list[Tensor]:
    """hidden, head, labels, predicted, target in float64; labels hold the first and last word."""
    generator = torch.Generator().manual_seed(1000 * R + G)
    hidden, head, predicted, target = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((R, D), (V, D), (G, W), (G, W)))
    labels = torch.randint(V, (R,), generator=generator)
    labels[:1], labels[1:2] = V - 1, 0
    return [hidden, head / D**0.5 * 2, labels, predicted, target]


def run(loss: Callable, inputs: list[Tensor], dtype: torch.dtype, device: str = "cpu",
        **options) -> list[Tensor]:
    """Both losses, and the gradients of a weighted sum of them, all on inputs cast to `dtype`."""
    inputs = [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs]
    for i in (0, 1, 3):
        inputs[i] = inputs[i].clone().requires_grad_()
    mlm, mae = loss(*inputs, **options)
    (1.7 * mlm + 0.3 * mae).backward()
    return [x.detach().cpu() for x in (mlm, mae, *(inputs[i].grad for i in (0, 1, 3)))]


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
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """What the function asks of a chunk, (rows, gradient) each time."""
    calls = []

    def spy(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
        calls.append((len(logits), gradient))
        held = logits.untyped_storage().nbytes() // logits[0].nbytes
        assert held == calls[0][0], "more logits are held than one chunk's"
        return kernels.cross_entropy_torch_(logits, labels, scale, gradient)

    monkeypatch.setitem(kernels.BACKENDS, "torch", (spy, kernels.squared_error_torch))
    return calls


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only the second rule: chunks of D/2 rows in float32."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)


@pytest.mark.parametrize("R", [0, 1, 8, 37])
@pytest.mark.parametrize("G", [0, 1, 5])
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_equals_the_plain_twin(R: int, G: int, device: str, backend: str,
                               small_chunks: None) -> None:
    inputs = make_inputs(R, G)
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    assert_close(run(masked_reconstruction_loss, inputs, torch.float32, device, backend=backend),
                 truths)


def test_float64_is_float64_throughout(small_chunks: None) -> None:
    inputs = make_inputs(37, 5)
    assert_close(run(masked_reconstruction_loss, inputs, torch.float64),
                 run(plain_masked_reconstruction_loss, inputs, torch.float64), 1e-12)


def test_the_twin_is_the_textbook() -> None:
    """The truth itself, once by hand: -log softmax at the label, and the mean squared error."""
    hidden, head, labels, predicted, target = make_inputs(3, 2)
    softmax = torch.softmax(hidden @ head.T, dim=1)
    mlm, mae = plain_masked_reconstruction_loss(hidden, head, labels, predicted, target)
    assert torch.allclose(mlm, -softmax[range(3), labels].log().mean())
    assert torch.allclose(mae, ((predicted - target) ** 2).mean())


def test_counts_replace_the_rows() -> None:
    inputs = make_inputs(37, 5)
    counts = {"mlm_count": 74, "mae_count": 12.5}
    results = run(masked_reconstruction_loss, inputs, torch.float32, **counts)
    assert_close(results, run(plain_masked_reconstruction_loss, inputs, torch.float64, **counts))
    plain = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    assert_close(results[:2], [plain[0] / 2, plain[1] * 5 / 12.5])


def test_shares_of_a_batch_add_up_to_the_batch() -> None:
    """Two ranks, or two steps of accumulation, of which the second has no picture."""
    hidden, head, labels, predicted, target = make_inputs(37, 5)
    whole = run(masked_reconstruction_loss, make_inputs(37, 5), torch.float32)
    shares = [run(masked_reconstruction_loss, share, torch.float32, mlm_count=37, mae_count=5)
              for share in ([hidden[:30], head, labels[:30], predicted, target],
                            [hidden[30:], head, labels[30:], predicted[:0], target[:0]])]
    rows = 2, 4  # gradients by row, the others are sums
    assert_close([torch.cat([a, b]) if i in rows else a + b
                  for i, (a, b) in enumerate(zip(*shares))], [x.double() for x in whole])


def test_rows_go_through_in_chunks(small_chunks: None, steps: list) -> None:
    run(masked_reconstruction_loss, make_inputs(37, 1), torch.float32)  # D = 16: chunks of 8
    assert steps == [(8, True)] * 4 + [(5, True)]


def test_a_small_vocabulary_needs_no_chunks(steps: list) -> None:
    run(masked_reconstruction_loss, make_inputs(37, 1), torch.float32)
    assert steps == [(37, True)]


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_bfloat16_is_no_worse_than_plain_bfloat16(device: str, backend: str,
                                                  small_chunks: None) -> None:
    inputs = [x.bfloat16().double() if x.is_floating_point() else x for x in make_inputs(37, 5)]
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    ours = run(masked_reconstruction_loss, inputs, torch.bfloat16, device, backend=backend)
    plain = errors(run(plain_masked_reconstruction_loss, inputs, torch.bfloat16), truths)
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [torch.bfloat16] * 3
    for name, error in errors(ours, truths).items():
        assert error <= plain[name] + ROUNDING, (name, error, plain[name])


def test_the_gradient_of_the_head_is_summed_in_float32(small_chunks: None, steps: list) -> None:
    """300 chunks of one row that push the same way: in bfloat16 the sum stops growing at 256."""
    D, R = 3, 300
    hidden = torch.ones(R, D, dtype=torch.bfloat16)
    head = torch.zeros(5, D, dtype=torch.bfloat16, requires_grad=True)
    labels, nothing = torch.zeros(R, dtype=torch.int64), torch.zeros(0, 7)
    masked_reconstruction_loss(hidden, head, labels, nothing, nothing, mlm_count=1)[0].backward()
    assert steps == [(1, True)] * R
    truth = torch.full((5, D), 0.2 * R)
    truth[0] = -0.8 * R
    assert torch.allclose(head.grad.float(), truth, rtol=ROUNDING)


def test_mixed_precision() -> None:
    """bfloat16 activations beside a float32 head and float32 pixels; autocast changes nothing."""
    inputs = [x.bfloat16().double() if x.is_floating_point() else x for x in make_inputs(9, 2)]
    truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
    dtypes = (torch.bfloat16, torch.float32, torch.int64, torch.bfloat16, torch.float32)
    hidden, head, labels, predicted, target = (x.to(d) for x, d in zip(inputs, dtypes))
    leaves = [x.requires_grad_() for x in (hidden, head, predicted)]
    mlm, mae = masked_reconstruction_loss(hidden, head, labels, predicted, target)
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


def test_gradients_go_only_where_they_are_asked_for(steps: list) -> None:
    whole = run(masked_reconstruction_loss, make_inputs(9, 2), torch.float32)
    for asked in ([0], [1], [3], [0, 3], []):
        inputs = [x.float() if x.is_floating_point() else x for x in make_inputs(9, 2)]
        inputs[4].requires_grad_()  # the target: asked or not, it gets none
        for i in asked:
            inputs[i].requires_grad_()
        steps.clear()
        mlm, mae = masked_reconstruction_loss(*inputs)
        assert steps == [(9, 0 in asked or 1 in asked)]
        (1.7 * mlm + 0.3 * mae).backward()
        for i, place in ((0, 2), (1, 3), (3, 4)):
            assert (inputs[i].grad is not None) == (i in asked)
            assert i not in asked or torch.equal(inputs[i].grad, whole[place])
        assert inputs[4].grad is None


def test_without_gradients_none_are_computed(steps: list) -> None:
    hidden, head, labels, predicted, target = make_inputs(9, 2)
    head = torch.nn.Parameter(head)
    with torch.no_grad():
        mlm, mae = masked_reconstruction_loss(hidden, head, labels, predicted, target)
    assert steps == [(9, False)] and not mlm.requires_grad and not mae.requires_grad
    assert_close([mlm, mae], list(plain_masked_reconstruction_loss(
        hidden, head, labels, predicted, target)))


def test_a_second_backward_is_refused() -> None:
    """The saved gradients are scaled in place: once more would square the weight."""
    hidden, *others = make_inputs(9, 2)
    mlm, _ = masked_reconstruction_loss(hidden.requires_grad_(), *others)
    (2 * mlm).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * mlm).backward()


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


def peak_memory() -> int:
    """The most bytes this process ever held (ru_maxrss on Linux may be what its parent held)."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines()
                    if line.startswith("VmHWM")) * 1024
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure() -> None:
    """Print by how many bytes each loss over Qwen's vocabulary raises the peak."""
    V, D, R = 151_936, 256, 1024
    hidden, head = (torch.full(shape, 0.1, requires_grad=True) for shape in ((R, D), (V, D)))
    labels, nothing = torch.randint(V, (R,)), torch.zeros(0, 4704)
    hidden[:2].detach() @ head[:2].detach().T  # let the matmul library take what it takes
    before = peak_memory()
    masked_reconstruction_loss(hidden, head, labels, nothing, nothing)[0].backward()
    fused, gradients = peak_memory() - before, hidden.grad.nbytes + head.grad.nbytes
    hidden.grad = head.grad = None  # freed blocks of this size go back to the system at once
    torch.nn.functional.cross_entropy(hidden @ head.T, labels).backward()
    print(fused, gradients, peak_memory() - before)


def test_memory_is_a_tenth_of_the_plain_loss() -> None:
    """151,936 words, 1,024 rows: what the fused loss holds beside the gradients that it returns."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    output = subprocess.run([sys.executable, __file__], env=environment, check=True,
                            capture_output=True, text=True).stdout
    fused, gradients, plain = map(int, output.split())
    print(f"peak in bytes: fused {fused}, {gradients} of it gradients; plain {plain}")
    assert plain > 1.2e9 and fused > gradients  # else the measure is broken
    assert fused - gradients <= plain / 10


if __name__ == "__main__":
    measure()
