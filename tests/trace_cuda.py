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
    launches        how many operations the host put into the device's queue
    memory          the peak, and at the end which line made how much of it

Add about 2 GB to the peak for CUDA's context, NCCL and the allocator. The first step differs:
AdamW makes its moments. Nothing is saved: the run is stopped after the last step's line.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch.distributed as dist
from PIL import Image

from fake_cuda import start
from real_shapes import config_3b

MB, GB = 1e6, 1e9
WORDS = "red anchor, blue star, nothing, yellow snowman " * 6
# docs/real_models.md's for 3B; what is said on the command line comes after them, and counts.
PIXELS = ["--min-pixels", str(256 * 28 * 28), "--max-pixels", str(1024 * 28 * 28)]
FLAGS = {"cpt": ["--batch-tokens", "100000", "--learning-rate", "2e-6"],
         "cl": ["--batch", "192", "--chunk", "8192", "--learning-rate", "2e-5"]}


class Done(Exception):
    """The last step was traced."""


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of the script."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=("cpt", "cl"))
    parser.add_argument("size", choices=("nano", "3B", "7B"))
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
        stored = parameter[weights.stored_part(name, config)]  # without padding
        shape = config.vision.kernel if name == weights.KERNEL else tuple(stored.shape)
        begin, end = end, end + 2 * stored.numel()  # bfloat16: two bytes
        header[weights.stored_name(name, config)] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_data(folder: Path, options: argparse.Namespace) -> None:
    """data.jsonl: records of stage 1, or pairs of stage 2; a share of them has images."""
    from nano_moca import MARK

    # Noise: what is worst for a JPEG decoder.
    random = np.random.default_rng(0)
    high, wide = (84, 112) if options.size == "nano" else (768, 1024)
    for number in range(4):
        pixels = random.integers(0, 255, (high, wide, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)

    lines = []
    for number in range(400):
        # One item in stage 1; in stage 2 a text, and one item that it should find, and two
        # that it should not.
        items = [{"text": f"{WORDS} {number} {near}"} for near in range(3)]
        if number % 100 < 100 * options.images:
            items = [{"text": MARK + item["text"], "images": [f"{number % 4}.jpg"]}
                     for item in items]
        record = items[0]
        if options.script == "cl":
            record = {"task": "traced", "kind": "image-text", "query": {"text": f"find {number}"},
                      "positive": items[0], "negatives": items[1:]}
        lines.append(json.dumps(record) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))


# --- the run --------------------------------------------------------------------------


class Tracer:
    """Prints what was noted in each step, and ends the run after so many."""

    def __init__(self, cuda: Any, launches: list, steps: int) -> None:
        self.cuda = cuda
        self.launches = launches  # of Triton kernels
        self.steps = steps
        self.done = 0  # steps

    def begin(self) -> None:
        """A step begins: forget what was before, but what is in memory."""
        gc.collect()
        memory = self.cuda.memory
        memory.peak = 0
        memory.set_peak()
        self.cuda.notes.clear()
        for kernel in self.launches:
            kernel.count = 0

    def end(self, line: dict) -> None:
        """A step ends, with this line of the log."""
        notes = self.cuda.notes
        copies = [f"{notes.of_kind(kind)} {kind} ({notes.sent[kind] / MB:.1f} MB)"
                  for kind in ("blocking", "unpinned", "pinned")]
        triton = sum(kernel.count for kernel in self.launches)
        print(f"step {line['step']}: {line['tokens']:,} tokens over all ranks; "
              f"{notes.waits.total()} waits; copies: {', '.join(copies)}; "
              f"{notes.launches.total()} launches and {triton} of Triton; "
              f"peak {self.cuda.memory.peak / GB:.2f} GB", flush=True)
        for (what, place), number in notes.waits.most_common():
            print(f"    wait   {number:5d}  {what}  {place}")
        for (kind, place), number in notes.copies.most_common():
            print(f"    copy   {number:5d}  {kind}  {place}")
        for name, number in notes.collectives.most_common():
            print(f"    ranks  {number:5d}  {name}  {notes.moved[name] / GB:.2f} GB")

        self.done += 1
        if self.done == self.steps:
            raise Done
        self.begin()


def join(world: int) -> None:
    """Become rank 0 of W, of which the others are not there: collectives answer at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0",
                   "LOCAL_WORLD_SIZE": str(world)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **kwargs | {"backend": "fake"})


def follow(cuda: Any, launches: list, options: argparse.Namespace, words: list[str],
           folder: Path) -> None:
    """Run the script's `train` on the device, and print what is noted in each step."""
    import train_cl
    import train_cpt
    from nano_moca import trainer
    from nano_moca.config import BASE

    # What the recipe of that size says, and then what the command line says.
    script = {"cpt": train_cpt, "cl": train_cl}[options.script]
    model = BASE
    write_data(folder, options)
    given: list[Any] = []
    if options.size != "nano":
        model = folder / "model"
        write_checkpoint(model, config_of(options.size, options.layers))
        given = [*PIXELS, *FLAGS[options.script], "--checkpointing"]
        if options.script == "cpt":
            given += ["--accumulate", max(1, 32 // options.world)]
    given += ["--model", model, "--data", folder / "data.jsonl", "--output", folder / "run",
              "--device", "cuda", "--steps", options.traced + 1, "--save-every", 10**6,
              "--no-report"]
    flags = script.parse_flags(script.Flags, [*map(str, given), *words], "")

    # FakeTensors of two threads at once are more than PyTorch takes: a step is drawn when it is
    # asked for, and counted with it, instead of one ahead.
    script.prefetch = lambda steps, _: iter(steps)

    # The plan is printed before the first step, the log written at the end of each.
    tracer = Tracer(cuda, launches, options.traced)
    trainer.Log.write = lambda log, line: tracer.end(line)
    plan = script.print_plan
    script.print_plan = lambda *args: (plan(*args), tracer.begin())
    with cuda, contextlib.suppress(Done):
        script.train(flags)


def main() -> None:
    """Start again with the stub; then trace."""
    options, words = parse(sys.argv[1:])
    if why := start.missing():
        sys.exit(f"no make-believe CUDA here: {why}")
    if not start.started():
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(start.run_again(Path(__file__), sys.argv[1:], Path(folder)))

    from fake_cuda import demands, device
    from nano_moca import kernels

    cuda = device.FakeCuda()
    device.pretend(cuda)
    join(options.world)
    cuda.watch_threads()
    follow(cuda, demands.stand_in_for_kernels(kernels), options, words, Path.cwd())
    print(f"at the peak of the last step, {cuda.memory.peak / GB:.2f} GB:")
    for line, size in Counter(cuda.memory.at_peak).most_common(20):
        print(f"    {size / GB:8.2f} GB  {line}")


if __name__ == "__main__":
    main()
