"""The Triton kernel without a GPU: run by Triton's interpreter, and compiled for two GPUs.

Whether Triton interprets or compiles is settled when it is imported, and then holds for
the process. So each kind of check runs in a process of its own (this file as a script,
see the end), which prints what it found as JSON; the tests judge it. On a GPU: see PLACES
in test_losses.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nano_moca import kernels
from nano_moca.losses import masked_reconstruction_loss, plain_masked_reconstruction_loss
from test_losses import ROUNDING, cast, errors, make_inputs, make_rounded_inputs, run

needs_triton = pytest.mark.skipif(not kernels.TRITON_AVAILABLE, reason="Triton is not installed")
SHAPES = [  # R, G, V, values of a group
    (37, 5, 501, 37),
    (1, 1, 4097, 4704),  # one word more than a block
    (0, 2, 501, 1024),
    (3, 0, 4096, 37),
    (2, 1, 9001, 1025),  # three blocks
    (1, 1, 1, 1),
    (0, 0, 501, 4704),
]


def in_a_process(check: str, **environment: str) -> dict:
    """Run one of the checks below in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(Path(kernels.__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, __file__, check], env=clean | environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return in_a_process("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return in_a_process("compile", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_interpreted_loss_equals_the_plain_twin(interpreted: dict, shape: tuple) -> None:
    found = interpreted[f"{shape} float32"]["ours"]
    assert len(found) == 5 and all(error <= 1e-5 for error in found.values()), found


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_bfloat16_is_no_worse_than_plain(interpreted: dict, shape: tuple) -> None:
    found = interpreted[f"{shape} bfloat16"]
    for name, error in found["ours"].items():
        assert error <= found["plain"][name] + ROUNDING, (name, found)


@needs_triton
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_online_softmax_in_any_order(interpreted: dict, order: str) -> None:
    """Logits from -300 to 300 over three blocks: each block brings a new maximum, or none
    does."""
    assert interpreted[order]["loss"] <= 1e-5 and interpreted[order]["gradient"] <= 1e-5


@needs_triton
def test_a_label_outside_the_vocabulary_is_nan_for_its_row_alone(interpreted: dict) -> None:
    assert interpreted["outside"] == {"losses": [False, True, True, False],
                                      "gradient": [False, True, True, False]}


@needs_triton
def test_without_gradient_the_logits_stay(interpreted: dict) -> None:
    assert interpreted["no gradient"] == {"logits changed": False}


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("gradient", [True, False])
def test_compiles_to_machine_code(compiled: dict, gradient: bool, dtype: str,
                                  architecture: int) -> None:
    """For A100 (80) and H100 (90), at Qwen's vocabulary: an ELF file for that GPU."""
    found = compiled[f"{gradient} {dtype} {architecture}"]
    assert found["magic"] == "7f454c46" and found["bytes"] > 1000
    assert found["target"].startswith(f"sm_{architecture}")


def test_a_backend_is_one_function() -> None:
    assert kernels.BACKENDS == {"torch": kernels.cross_entropy_torch_,
                                "triton": kernels.cross_entropy_triton_}


def test_without_triton_only_the_kernel_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    spec = importlib.util.spec_from_file_location("kernels_without_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.TRITON_AVAILABLE
    logits = torch.randn(3, 5)
    labels = torch.tensor([0, 4, 2])
    assert module.cross_entropy_torch_(logits.clone(), labels, 1.0, True).shape == (3,)
    with pytest.raises(RuntimeError, match="pip install triton"):
        module.cross_entropy_triton_(logits, labels, 1.0, True)


@needs_triton
def test_impossible_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(3, 2)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="needs a GPU, or TRITON_INTERPRET=1"):
        masked_reconstruction_loss(*cast(inputs, torch.float32), backend="triton")
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float64"):
        masked_reconstruction_loss(*inputs, backend="triton")


# --- what runs in a process of its own ------------------------------------------------


def interpret() -> dict:
    """Errors of the Triton path on CPU tensors, by case."""
    from nano_moca import losses
    losses.CHUNK_BYTES = 0  # several chunks

    # Both losses and all gradients, where there are few tokens or groups, or none.
    found = {}
    for shape in SHAPES:
        R, G, V, W = shape
        inputs = make_rounded_inputs(R, G, V, W=W)
        truths = run(plain_masked_reconstruction_loss, inputs, torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            ours = run(masked_reconstruction_loss, inputs, dtype, backend="triton")
            plain = run(plain_masked_reconstruction_loss, inputs, dtype)
            name = str(dtype).removeprefix("torch.")
            found[f"{shape} {name}"] = {
                "ours": errors(ours, truths), "plain": errors(plain, truths)}

    # One row of logits in several orders.
    V = 9001
    ramp = torch.linspace(-300, 300, V)
    orders = {"rising": ramp, "falling": ramp.flip(0), "equal": torch.full((V,), 7.0)}
    for order, row in orders.items():
        logits = row[None].clone()
        label = torch.tensor([V // 2])
        truth = logits.double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(truth, label)
        loss.backward()
        ours = kernels.cross_entropy_triton_(logits, label, 1.0, True)
        found[order] = {"loss": abs(ours.item() / loss.item() - 1),
                        "gradient": (logits - truth.grad).abs().max().item()}

    # Two labels that the vocabulary of five words does not have.
    logits = torch.randn(4, 5)
    nan = kernels.cross_entropy_triton_(logits, torch.tensor([4, 5, -1, 0]), 1.0, True).isnan()
    found["outside"] = {"losses": nan.tolist(), "gradient": logits.isnan().all(1).tolist()}

    before = torch.randn(4, 5)
    logits = before.clone()
    kernels.cross_entropy_triton_(logits, torch.tensor([4, 0, 1, 0]), 1.0, False)
    found["no gradient"] = {"logits changed": not torch.equal(logits, before)}
    return found


def compile_kernel() -> dict:
    """What Triton's compiler makes of the kernel for each GPU, with none present."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for architecture in (80, 90):
        target = GPUTarget("cuda", architecture, 32)
        for dtype in ("fp32", "bf16"):
            for gradient in (True, False):
                constants = {"V": 151_936, "BLOCK": kernels.VOCABULARY_BLOCK,
                             "GRADIENT": gradient}
                signature = {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32",
                             "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
                source = ASTSource(kernels.cross_entropy_kernel, signature, constants)
                code = triton.compile(source, target=target, options={"num_warps": 8}).asm

                lines = code["ptx"].splitlines()
                targets = [line.split()[1] for line in lines if line.startswith(".target")]
                found[f"{gradient} {dtype} {architecture}"] = {
                    "bytes": len(code["cubin"]), "magic": code["cubin"][:4].hex(),
                    "target": targets[0]}
    return found


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_kernel}[sys.argv[1]]()))
