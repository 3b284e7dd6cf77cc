"""The benchmark on a tiny checkpoint: it compares equals. How fast they are is not tested."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nano_moca import Moca, benchmark_gpu
from nano_moca.benchmark import BATCHES, Flags, benchmark, main, make_mixes
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import mask_batch
from nano_moca.model import ReconstructionModel
from nano_moca.weights import empty_model

TINY = Flags(records=3)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen2-vl", None])
def test_transformers_and_we_compute_the_same_hidden_states(golden: Path, capsys, name: str | None):
    pytest.importorskip("transformers")
    assert 0 < benchmark(replace(TINY, model=name and str(golden / name), width=128)) < 1e-3
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[-1][:2] == ["our", "time:"] and "mm" in rows[-1]
    for mix in ("mixed", "sorted", "equal"):
        lines = [row for row in rows if row and row[0] == mix]
        assert len(lines) == 2  # forward, and forward with backward
        for *_, theirs, ours, ratio in lines:
            theirs, ours = (float(number.replace(",", "")) for number in (theirs, ours))
            assert float(ratio) == pytest.approx(ours / theirs, abs=0.1)


def test_the_three_mixes_are_what_they_are_called(moca: Moca):
    mixes = make_mixes(moca.processor, TINY)
    lengths = {mix: [batch.lengths for batch in batches] for mix, batches in mixes.items()}
    assert all(len(batches) == BATCHES and all(len(each) == TINY.records for each in batches)
               for batches in lengths.values())
    flat = {mix: sum(batches, ()) for mix, batches in lengths.items()}
    assert sorted(flat["mixed"]) == list(flat["sorted"]) != list(flat["mixed"])
    assert len(set(flat["equal"])) == 1


def test_the_package_itself_does_without_transformers():
    package = Path(__file__).resolve().parents[1] / "nano_moca"
    users = [file.name for file in package.rglob("*.py")
             if any(line.startswith(("import transformers", "from transformers"))
                    for line in file.read_text().splitlines())]
    assert not users  # the benchmark imports it inside its function


def test_what_a_gpu_would_be_asked_runs_on_a_cpu(golden: Path, capsys, monkeypatch) -> None:
    """Every table is there. What is not installed, or needs a GPU, has a line that says so; and so
    has the comparison, if there is nothing to compare with."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    main(replace(TINY, gpu=True, model=str(golden / "qwen2.5-vl"), step_records=4, peak=1e-3))
    out = capsys.readouterr().out
    assert out.startswith("a CPU, torch ") and "peak for MFU: 0.001 TFLOP/s" in out
    assert "packing is not compared: there is nothing to compare with: pip install tra" in out

    lines = {line[:24].strip(): line[24:].split() for line in out.splitlines() if line}
    for absent, why in (("fused, Triton", "RuntimeError:"), ("Liger", "ModuleNotFoundError:")):
        assert lines[absent][:3] == ["not", "measured:", why]
    for stage in ("stage 1", "stage 2", "stage 1, checkpointing", "stage 2, checkpointing"):
        milliseconds, memory, rate, share = (float(x.replace(",", "")) for x in lines[stage])
        assert milliseconds > 0 and memory != memory and 0 < share
    assert float(lines["fused, PyTorch"][0]) > 0 and float(lines["full logits"][0]) > 0

    # Both columns of the errors are those of the dtype, and nothing is called too large.
    errors = [line.split() for line in out.splitlines() if " torch.bfloat16 " in line]
    assert len(errors) == 5 and "TOO LARGE" not in out
    assert all(1e-3 < float(error) < 3e-2 for row in errors for error in row[-2:])


def test_a_wrong_kernel_is_called_too_large(capsys, monkeypatch) -> None:
    """The table of errors sees a loss that is off by one part in a thousand."""
    def wrong(*inputs):
        mlm, mae = masked_reconstruction_loss(*inputs)
        return mlm * 1.001, mae

    wrong.__name__ = "wrong"
    monkeypatch.setattr(benchmark_gpu, "masked_reconstruction_loss", wrong)
    benchmark_gpu.print_errors(torch.device("cpu"))
    large = [line for line in capsys.readouterr().out.splitlines() if "TOO LARGE" in line]
    assert len(large) == 1 and large[0].split()[:2] == ["wrong", "torch.float32"]


def test_flops_are_those_that_pytorch_counts(moca: Moca) -> None:
    """Forward and backward of stage 1's model, to the last one. PyTorch is told of two operations
    that it does not know: a product added in place, and the CPU's attention, whose backward we
    count without what it computes again."""
    def attention(query: tuple, key: tuple, *_: object, **__: object) -> int:
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]

    def attention_backward(_: tuple, query: tuple, key: tuple, *__: object, **___: object) -> int:
        return 2 * attention(query, key)

    aten = torch.ops.aten
    known = {aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
             aten._scaled_dot_product_flash_attention_for_cpu: attention,
             aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward}
    records = [benchmark_gpu.BuiltinRecords("train")[number] for number in range(6)]
    batch = moca.processor.batch(records)
    masked = mask_batch(batch, moca.processor, 0.4, 0.5, [(0, n) for n in range(6)])
    config = moca.model.config
    root = ReconstructionModel(empty_model(config))
    ours = benchmark_gpu.step_flops(config, benchmark_gpu.stage_1, masked)

    root.to_empty(device="cpu")
    for parameter in root.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        mlm, mae = root(masked, causal=False)
        (mlm + mae).backward()
    assert ours == counter.get_total_flops()
