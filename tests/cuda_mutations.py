"""Faults planted in the source, one at a time, and whether the guard of the CUDA path sees them.

    python tests/cuda_mutations.py               all: a few seconds each
    python tests/cuda_mutations.py offsets       those whose names hold a word

Not part of the test suite. Each fault is put into a copy of the repository, where the path beside
it must fail the tests of test_cuda_path.py, with the word that is written there; without the fault
it must pass. A fault is a line of our code and what takes its place. When the code has changed, and
none of the lines is there any more, that is an error: write the fault anew.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_cuda import start

# What takes long to load and is not ours, once, before the forks.
with contextlib.suppress(ImportError):
    import torch.nn.attention.varlen  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(".git", "__pycache__", "*.png", "notebooks", "golden", "runs")
Edit = tuple[str, str, str]  # file, what stands there, what takes its place


@dataclass
class Fault:
    """Edits of which the first that fits is made; the path that must fail; and what is said."""

    edits: list[Edit]
    path: str
    said: str


FAULTS = {
    "int64 offsets": Fault([
        ("nano_moca/attention.py", "torch.int32", "torch.int64"),
    ], "stage 1", "offsets of int32"),
    "image tokens' index left on the CPU": Fault([
        ("nano_moca/batch.py", "= send(value, device)",
         "= value if entry.name == 'image_index' else send(value, device)"),
    ], "stage 2", "left on the CPU"),
    "labels left on the CPU": Fault([
        ("nano_moca/batch.py", "= send(value, device)",
         "= value if entry.name == 'labels' else send(value, device)"),
    ], "stage 1, loss without Triton", "on the CPU"),
    "angles of rotation made on the CPU": Fault([
        ("nano_moca/model.py", "(config.head_width, config.rope_theta, positions.device)",
         "(config.head_width, config.rope_theta, 'cpu')"),
    ], "caption", "left on the CPU"),
    "heads not repeated": Fault([
        ("nano_moca/attention.py", 'options["enable_gqa"] = True', "pass"),
    ], "stage 1, causal", "heads"),
    "index made on the CPU, in pooling": Fault([
        ("nano_moca/model.py", "hidden[offsets[1:].long() - 1]",
         "hidden[(offsets[1:].long() - 1).cpu()]"),
    ], "embed, last token", "model.py"),
    "index made on the CPU, in the step": Fault([
        ("nano_moca/model.py", "hidden[masked.text_index]",
         "hidden[torch.arange(len(masked.labels))]"),
    ], "stage 1", "blocking copy, nano_moca/model.py"),
    "number read in the step": Fault([
        ("nano_moca/losses.py", "return losses.sum() * scale",
         "return losses.sum() * scale if losses.sum() > 0 else losses.sum()"),
    ], "stage 1", "item, nano_moca/losses.py"),
    "labels of int32": Fault([
        ("nano_moca/masking.py", "labels=batch.tokens[token_masked]",
         "labels=batch.tokens[token_masked].int()"),
    ], "stage 1", "labels must be int64"),
    "hidden states of float16 for the loss": Fault([
        ("nano_moca/model.py", "masked_reconstruction_loss(text_hidden,",
         "masked_reconstruction_loss(text_hidden.half(),"),
    ], "stage 1", "nothing float16"),
    "head's gradient added up in bfloat16": Fault([
        ("nano_moca/losses.py", "out_dtype=total.dtype, out=total",
         "out_dtype=left.dtype, out=total"),
    ], "stage 1", "would refuse"),
    "losses of the kernel in bfloat16": Fault([
        ("nano_moca/kernels.py", "losses = logits.new_empty(r, dtype=torch.float32)",
         "losses = logits.new_empty(r)"),
    ], "stage 1", "losses is torch.bfloat16"),
}


def plant(copy: Path, edits: list[Edit]) -> bool:
    """Put the first edit that fits into the copy; whether one did."""
    for name, old, new in edits:
        text = (copy / name).read_text(encoding="utf-8")
        if old in text:
            (copy / name).write_text(text.replace(old, new), encoding="utf-8")
            return True
    return False


def judge(copy: Path, path: str) -> str:
    """What test_cuda_path.py would say of a path in a copy of the repository, in this process;
    empty if its tests would pass."""
    # The copy's modules, and not those that this file has imported.
    sys.path[:0] = [str(copy), str(copy / "tests")]
    for name in [name for name in sys.modules if name.startswith("fake_cuda")]:
        del sys.modules[name]
    import cuda_paths
    from test_cuda_path import STOPS

    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        cuda_paths.main([path])
    line = json.loads(found.getvalue())
    stops = line["waits"] + line["blocking"]
    return line["error"] or ("" if stops == STOPS[path] else f"stops {stops}: {line['where']}")


def in_a_process(copy: Path, path: str) -> str:
    """`judge` in a fork of this process, which has loaded PyTorch and nothing of ours."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with open(write, "w") as pipe:
            try:
                pipe.write(judge(copy, path))
            except BaseException as error:
                pipe.write(f"no verdict: {type(error).__name__}: {error}")
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@functools.cache
def without_fault(path: str) -> str:
    """What is said of a path here; nothing, if all is well."""
    return in_a_process(ROOT, path)


def verdict(fault: Fault) -> str:
    """What becomes of a fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=IGNORED)
        if before := without_fault(fault.path):
            return f"FAILED WITHOUT IT: {before}"
        if not plant(copy, fault.edits):
            return "NOT PLANTED: none of the lines is there any more"
        answer = in_a_process(copy, fault.path)
        return f"caught: {answer}" if fault.said in answer else f"MISSED: {answer}"


def main(word: str) -> bool:
    """Whether any fault was not caught."""
    missed = False
    for name, fault in FAULTS.items():
        if word in name:
            result = verdict(fault)
            missed |= not result.startswith("caught")
            print(f"{name:40s} {result[:200]}", flush=True)
    return missed


if __name__ == "__main__":
    if why := start.missing():
        sys.exit(f"no make-believe CUDA here: {why}")
    if start.started():
        sys.exit(main(*(sys.argv[1:] or [""])))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(start.run_again(Path(__file__), sys.argv[1:], Path(temporary)))
