"""Faults planted in the source, one at a time, and whether test_cuda_path.py fails of each.

    python tests/cuda_mutations.py               all: about a minute each
    python tests/cuda_mutations.py offsets       those whose names hold a word

Not part of the test suite. Each fault is put into a copy of the repository, where the test must
fail with the word that is written beside it; without a fault it must pass. A fault is a line of our
code and what takes its place. When the code has changed, and no line fits any more, that is said
here and is an error: write the fault anew.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(".git", "__pycache__", "*.png", "notebooks", "golden", "runs")
Edit = tuple[str, str, str]  # file, what stands there, what takes its place

# By name: lines of which at least one is there, and what the test must say.
FAULTS: dict[str, tuple[list[Edit], str]] = {
    "int64 offsets": ([
        ("nano_moca/attention.py", "to(self.device, torch.int32)", "to(self.device)"),
        ("nano_moca/attention.py", "torch.int32", "torch.int64"),
        ("nano_moca/batch.py", "torch.int32", "torch.int64"),
    ], "offsets of int32"),
    "image tokens' index left on the CPU": ([
        ("nano_moca/batch.py", "image_index=self.image_index.to(device, non_blocking=True)",
         "image_index=self.image_index"),
    ], "left on the CPU"),
    "labels left on the CPU": ([
        ("nano_moca/masking.py", "labels=self.labels.to(device, non_blocking=True)",
         "labels=self.labels"),
    ], "on the CPU"),
    "heads not repeated": ([
        ("nano_moca/attention.py",
         "key = key.repeat_interleave(H // K, dim=1)  # [T, H, d]\n"
         "    value = value.repeat_interleave(H // K, dim=1)  # [T, H, d]\n\n    # How far", "# How far"),
        ("nano_moca/attention.py", "enable_gqa=True", "enable_gqa=False"),
    ], "heads"),
    "index made on the CPU, in pooling": ([
        ("nano_moca/model.py", "batch.cu_seqlens[1:].to(hidden.device)", "batch.cu_seqlens[1:]"),
        ("nano_moca/model.py", "hidden[ends - 1]", "hidden[(ends - 1).cpu()]"),
    ], "test_the_host_stops_as_seldom_as_it_did[stage 2, last token]"),
    "index made on the CPU, in the step": ([
        ("nano_moca/model.py", "hidden[masked.text_index]",
         "hidden[torch.arange(len(masked.labels))]"),
    ], "test_the_host_stops_as_seldom_as_it_did[stage 1]"),
    "number read in the step": ([
        ("nano_moca/losses.py", "return losses.sum() * scale",
         "return losses.sum() * scale if losses.sum() > 0 else losses.sum()"),
    ], "test_the_host_stops_as_seldom_as_it_did[stage 1]"),
    "labels of int32": ([
        ("nano_moca/masking.py", "labels=batch.tokens[token_masked]",
         "labels=batch.tokens[token_masked].int()"),
    ], "labels must be int64"),
    "hidden states of float16 for the loss": ([
        ("nano_moca/model.py", "masked_reconstruction_loss(text_hidden,",
         "masked_reconstruction_loss(text_hidden.half(),"),
    ], "nothing float16"),
    "head's gradient in bfloat16": ([
        ("nano_moca/losses.py", "out_dtype=total.dtype, out=total", "out_dtype=left.dtype, out=total"),
    ], "would refuse"),
    "losses of the kernel in bfloat16": ([
        ("nano_moca/kernels.py", "losses = logits.new_empty(r, dtype=torch.float32)",
         "losses = logits.new_empty(r)"),
    ], "losses is torch.bfloat16"),
    "rotary angles left on the CPU": ([
        ("nano_moca/model.py", "frequencies = rotary_frequencies(config.head_width, config.rope_theta, "
         "positions.device)", "frequencies = rotary_frequencies(config.head_width, config.rope_theta, "
         "\"cpu\")"),
    ], "left on the CPU"),
}


def run_test(copy: Path) -> str:
    """The end of what pytest prints for the test in a copy of the repository."""
    words = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider",
             "tests/test_cuda_path.py"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return "" if done.returncode == 0 else done.stdout


def plant(copy: Path, edits: list[Edit]) -> bool:
    """Put the first edit that fits into the copy; whether one did."""
    for name, old, new in edits:
        text = (copy / name).read_text(encoding="utf-8")
        if old in text:
            (copy / name).write_text(text.replace(old, new), encoding="utf-8")
            return True
    return False


def main(word: str) -> int:
    """The number of faults that were not caught, or not planted."""
    missed = 0
    todo = {"no fault": ([], "")} | {name: f for name, f in FAULTS.items() if word in name}
    for name, (edits, said) in todo.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(ROOT, copy, ignore=IGNORED)
            if edits and not plant(copy, edits):
                print(f"NOT PLANTED  {name}: no line fits", flush=True)
                missed += 1
                continue

            # Without a fault nothing may fail; with one the right thing has to.
            output = run_test(copy)
            good = said in output if edits else not output
            missed += not good
            print(f"{'caught' if edits and good else 'passed' if good else 'MISSED':11s}  {name}",
                  flush=True)
            if not good:
                print(output[-1500:])
    return missed


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or [""])))
