"""A script's own training loop on make-believe CUDA: what it waits for, sends, and holds.

    python tests/trace_cuda.py cpt 3B                                  two layers, rank 0 of 8
    python tests/trace_cuda.py cl 7B --world 4 --layers 0              all layers: minutes
    python tests/trace_cuda.py cpt 3B --world 1 --accumulate 32        a flag of the script

No GPU is needed, and none is used: see fake_cuda/. The script's `train` runs as rank 0 of
--world ranks under FSDP2, with true shapes and vocabulary, on a file of weights that is one
large hole and on records of noise pictures (1024 x 768, 999 tokens each) and words. For each
step it prints

    waits           where the host stood still until the device had done all that it was asked
    copies          to the device, by kind: blocking, unpinned, pinned; and the bytes sent
    collectives     what the ranks sent each other, and the bytes of the largest tensor of each
    launches        how many kernels the host started
    memory          the peak, and at the end which line made how much of it

Add about 2 GB to the peak for CUDA's context, NCCL and the allocator. The first step differs:
AdamW makes its moments. Nothing is saved: the run is stopped after the last step's line.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from fake_cuda import start
from real_shapes import config_3b

GB = 1e9
WORDS = "red anchor, blue star, nothing, yellow snowman " * 6
# The README's recipes for 3B; what is said on the command line comes after them, and counts.
PIXELS = ["--min-pixels", str(256 * 28 * 28), "--max-pixels", str(1024 * 28 * 28)]
FLAGS = {"cpt": ["--batch-tokens", "100000", "--learning-rate", "2e-6"],
         "cl": ["--batch", "192", "--chunk", "8", "--learning-rate", "2e-5"]}


class Done(Exception):
    """The last step was traced."""


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of the script."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=("cpt", "cl"))
    parser.add_argument("size", choices=("3B", "7B"))
    parser.add_argument("--layers", type=int, default=2, help="of each tower; 0: all")
    parser.add_argument("--world", type=int, default=8, help="ranks")
    parser.add_argument("--traced", type=int, default=2, help="steps")
    parser.add_argument("--images", type=float, default=1.0, help="share of records with one")
    return parser.parse_known_args(words)


# --- a checkpoint and data, made up ---------------------------------------------------


def config_of(size: str, layers: int) -> dict:
    """config.json of Qwen2.5-VL-3B or 7B, with so many layers in each tower (0: all)."""
    raw = config_3b()
    if size == "7B":
        raw |= dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                    num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                    tie_word_embeddings=False)
        raw["vision_config"] |= dict(out_hidden_size=3584)
    if layers:
        raw["num_hidden_layers"] = layers
        raw["vision_config"] |= dict(depth=layers, fullatt_block_indexes=[layers - 1])
    return raw


def write_checkpoint(folder: Path, raw: dict) -> None:
    """A checkpoint whose weights are zeros that take no room on the disk."""
    from nano_moca import weights
    from nano_moca.config import BASE
    from nano_moca.convert.configs import parse_config

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(BASE / name, folder / name)

    # The file's header says where each tensor lies; behind it is a hole.
    config = parse_config(raw)
    header = {}
    end = 0
    for name, parameter in weights.empty_model(config).named_parameters():
        shape = config.vision.kernel if name == weights.KERNEL else tuple(parameter.shape)
        begin, end = end, end + 2 * parameter.numel()  # bfloat16: two bytes
        header[weights.stored_name(name, config)] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_data(folder: Path, script: str, share: float) -> None:
    """data.jsonl: records of stage 1, or pairs of stage 2; this share of them has images."""
    from nano_moca import MARK

    random = np.random.default_rng(0)
    for number in range(4):
        pixels = random.integers(0, 255, (768, 1024, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)

    lines = []
    for number in range(400):
        pictured = number % 100 < 100 * share
        image = {"text": MARK + str(number), "images": [f"{number % 4}.jpg"]}
        found = image if pictured else {"text": f"{number} {WORDS}"}
        words = {"text": f"{MARK if pictured else ''}{WORDS}"}
        if pictured:
            words["images"] = image["images"]
        pair = {"task": "traced", "kind": "image-text", "query": {"text": f"{WORDS} {number}"},
                "positive": found, "negatives": [found, found]}
        lines.append(json.dumps(words if script == "cpt" else pair) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))


# --- the run --------------------------------------------------------------------------


class Tracer:
    """The script's log, that also prints what was noted since the last step."""

    def __init__(self, cuda: Any, launches: list, steps: int) -> None:
        self.cuda = cuda
        self.launches = launches
        self.steps = steps

    def write(self, log: Any, line: dict) -> None:
        """The end of a step."""
        self.print_notes(line["step"])
        if line["step"] >= self.steps:
            raise Done
        self.begin()

    def begin(self) -> None:
        """A step begins: forget what was before, but what is in memory."""
        gc.collect()
        memory = self.cuda.memory
        memory.peak = 0
        memory.set_peak()
        self.cuda.notes.clear()
        for kernel in self.launches:
            kernel.count = 0

    def print_notes(self, step: int) -> None:
        """What was noted in a step."""
        notes = self.cuda.notes
        kinds = ("blocking", "unpinned", "pinned")
        copies = ", ".join(f"{notes.of_kind(kind)} {kind} ({notes.sent[kind] / 1e6:.1f} MB)"
                           for kind in kinds)
        triton = sum(kernel.count for kernel in self.launches)
        print(f"step {step}: waits {notes.waits.total()}; copies {copies}; launches "
              f"{notes.launches.total()} and {triton} of Triton; peak "
              f"{self.cuda.memory.peak / GB:.2f} GB", flush=True)
        for (what, line), count in notes.waits.most_common():
            print(f"    wait  {count:5d}  {what}  {line}")
        for (kind, line), count in notes.copies.most_common():
            print(f"    copy  {count:5d}  {kind}  {line}")
        for name, count in notes.collectives.most_common():
            print(f"    ranks {count:5d}  {name}  {notes.moved[name] / GB:.2f} GB")


def trace(options: argparse.Namespace, words: list[str], folder: Path) -> None:
    """In the process with the stub: the script's `train`, followed."""
    from fake_cuda import demands, device

    # Rank 0 of W ranks, of which the others are not there: collectives answer at once.
    device.pretend()
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(options.world), "LOCAL_RANK": "0"}
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.world)
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **kwargs | {"backend": "fake"})

    import train_cl
    import train_cpt
    from nano_moca import kernels, trainer

    # The checkpoint and the data.
    write_checkpoint(folder / "model", config_of(options.size, options.layers))
    write_data(folder, options.script, options.images)

    script = {"cpt": train_cpt, "cl": train_cl}[options.script]
    given = ["--model", folder / "model", "--data", folder / "data.jsonl", "--device", "cuda",
             "--output", folder / "run", "--steps", options.traced + 1, "--save-every", 10**6,
             "--no-report", "--checkpointing", *PIXELS, *FLAGS[options.script]]
    if options.script == "cpt":
        given += ["--accumulate", max(1, 32 // options.world)]
    flags = script.parse_flags(script.Flags, [*map(str, given), *words], "")

    cuda = device.FakeCuda()
    cuda.watch_threads()
    tracer = Tracer(cuda, demands.stand_in_for_kernels(kernels), options.traced)
    trainer.Log.write = lambda log, line: tracer.write(log, line)
    plan = script.print_plan
    script.print_plan = lambda *args: (plan(*args), tracer.begin())
    try:
        with cuda:
            script.train(flags)
    except Done:
        pass

    print(f"at the peak of the last step, {cuda.memory.peak / GB:.2f} GB:")
    for line, size in Counter(cuda.memory.at_peak).most_common(20):
        print(f"    {size / GB:8.2f} GB  {line}")


def main() -> None:
    """Start again with the stub, or trace."""
    options, words = parse(sys.argv[1:])
    if start.started():
        trace(options, words, Path.cwd())
        return
    if why := start.missing():
        sys.exit(f"no make-believe CUDA here: {why}")
    with tempfile.TemporaryDirectory() as folder:
        stub = start.compile_stub(Path(folder))
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=start.environment(stub), cwd=folder).returncode)


if __name__ == "__main__":
    main()
