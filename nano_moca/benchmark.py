"""What packing is worth: the same records through transformers, padded, and through us.

    pip install transformers
    python -m nano_moca.benchmark [--model DIR|HUB_ID] [--gpu]

One model (if none is named, the nano base made wider, with random weights, about in
the proportions of Qwen2.5-VL-3B), one process, the same batches, causal in both (as
transformers computes it), the two taking turns. Three mixes of the built-in records: as
they come; sorted by length before they are cut into batches, the best that padding can
do for itself; and all of one length, so that nothing is padded. Only real tokens count.
Before anything is timed the two have to compute the same hidden states. The last line
says where our time goes. What --gpu adds is in benchmark_gpu.py.

Left out: reading images, which both need, and making positions, which both are given.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nano_moca.batch import Batch
from nano_moca.builtin import BuiltinRecords
from nano_moca.builtin.base import initialise
from nano_moca.config import BASE
from nano_moca.convert.configs import parse_config
from nano_moca.convert.export import save_weights
from nano_moca.evaluate.embedder import load
from nano_moca.families import load_config
from nano_moca.files import MocaError
from nano_moca.flags import flag, main_guard, parse_flags
from nano_moca.model import VLM
from nano_moca.processor import Processor
from nano_moca.weights import find_checkpoint

BATCHES = 2  # of each mix
REPEATS = 3  # measurements of each, whose median counts


@dataclass
class Flags:
    """What to run, and where. The number of threads: OMP_NUM_THREADS in the
    environment."""

    model: str = flag(None, "checkpoint: a folder or a hub id (default: one made for it)")
    width: int = flag(512, "of the decoder that is made, a multiple of 128", low=128)
    records: int = flag(64, "in a batch: about two steps of train_cpt.py", low=1, high=10**5)
    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    dtype: str = flag("float32", "of the weights", choices=("float32", "bfloat16"))
    gpu: bool = flag(False, "first what a GPU makes of both stages, then all of this on it")
    step_records: int = flag(4, "with --gpu: records in a step", low=2, high=10**5)
    peak: float = flag(None, "with --gpu: its TFLOP/s, if it is not known", low=1e-3, high=1e6)


def make_wide(folder: Path, width: int) -> None:
    """A checkpoint of the nano base's depth with random weights and this width."""
    # Heads are 32 wide, as the nano base's.
    base = load_config(BASE)
    vision = base.raw["vision_config"] | dict(
        hidden_size=width // 2, intermediate_size=width * 4 // 3, num_heads=width // 64,
        out_hidden_size=width)
    model = VLM(parse_config(base.raw | dict(
        hidden_size=width, intermediate_size=width * 43 // 8, num_attention_heads=width // 32,
        num_key_value_heads=width // 128, vision_config=vision)))

    # In files, as transformers wants it.
    initialise(model, seed=0)
    save_weights(folder, model.state_dict(), model.config)
    Processor.load(BASE, base).save(folder)


def make_mixes(processor: Processor, flags: Flags) -> dict[str, list[Batch]]:
    """Three mixes, each of BATCHES batches of as many records."""
    # The same records in two orders, and the middle one many times.
    records = BuiltinRecords("train")
    mixed = [processor.encode(records[index]) for index in range(BATCHES * flags.records)]
    ordered = sorted(mixed, key=lambda record: len(record.tokens))
    equal = [ordered[len(ordered) // 2]] * len(ordered)

    # The batches of all three, cut at the same numbers.
    mixes: dict[str, list[Batch]] = {"mixed": [], "sorted": [], "equal": []}
    for start in range(0, len(mixed), flags.records):
        for batches, encoded in zip(mixes.values(), (mixed, ordered, equal), strict=True):
            batch = processor.pack(encoded[start : start + flags.records])
            batches.append(batch.to(flags.device))
    return mixes


def run_padded(theirs: nn.Module, batch: Batch) -> Tensor:
    """Hidden states [T, D] by transformers, fed as usual: one row per record, padded."""
    def pad(packed: Tensor) -> Tensor:  # [T, ...] -> [N, longest, ...]
        return pad_sequence(packed.split(batch.lengths), batch_first=True)

    # 1 where a token is, 0 where padding is.
    mask = pad(torch.ones_like(batch.tokens))  # [N, longest]
    images = dict(pixel_values=batch.patches, image_grid_thw=batch.grids)
    positions = pad(batch.positions.T).permute(2, 0, 1)  # [3, N, longest]
    output = theirs(input_ids=pad(batch.tokens), attention_mask=mask, position_ids=positions,
                    use_cache=False, **images if len(batch.grids) else {})
    return output.last_hidden_state[mask.bool()]


def seconds(engine: Callable, batch: Batch, backward: bool) -> float:
    """The time of one pass over a batch."""
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        hidden = engine(batch)
        if backward:
            hidden.sum().backward()

    # Waits for the GPU, if there is one.
    hidden[0, 0].item()
    return time.perf_counter() - began


def speeds(engines: tuple, batches: list[Batch], backward: bool) -> list[float]:
    """Tokens per second of each engine. They take turns."""
    times = np.zeros((1 + REPEATS, len(batches), len(engines)))
    for turn, batch, engine in np.ndindex(times.shape):
        times[turn, batch, engine] = seconds(engines[engine], batches[batch], backward)

    # Without the first turn, which is the warm-up.
    spent = np.median(times[1:], 0).sum(0)  # of each engine
    tokens = sum(len(batch.tokens) for batch in batches)
    return (tokens / spent).tolist()


def benchmark(flags: Flags) -> float:
    """Compare, time and print. Returns the largest difference between the two's hidden
    states."""
    try:
        from transformers import AutoModelForImageTextToText
    except ImportError:
        raise MocaError("there is nothing to compare with: pip install transformers") from None

    # Both read the same files; theirs goes without its output head, as ours does.
    with tempfile.TemporaryDirectory() as temporary:
        if not flags.model:
            make_wide(Path(temporary), flags.width)
        folder = find_checkpoint(flags.model or temporary)
        moca = load(folder, flags.device, getattr(torch, flags.dtype))
        theirs = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=flags.dtype, attn_implementation="sdpa")
    padded = partial(run_padded, theirs.model.to(flags.device))
    packed = partial(moca.model, causal=True)
    mixes = make_mixes(moca.processor, flags)

    # Is it the same work?
    with torch.no_grad():
        differences = [padded(batch) - packed(batch) for batch in mixes["mixed"]]
    apart = float(torch.cat(differences).abs().max())
    print(f"{BATCHES} batches of {flags.records} records; hidden states differ by {apart:.1e}")
    if flags.dtype == "float32" and not apart < 1e-3:
        raise MocaError("the two compute different things: there is nothing to compare")

    # How fast is it done?
    print(f"{'tokens a second':26s}  transformers     nano_moca  ratio")
    for mix, batches in mixes.items():
        for backward, name in ((False, "forward"), (True, "forward, backward")):
            before, ours = speeds((padded, packed), batches, backward)
            figures = f"{before:14,.0f}{ours:14,.0f}{ours / before:7.2f}"
            print(f"{mix:8s}{name:18s}{figures}", flush=True)

    # Where does our own time go?
    with torch.profiler.profile() as profiler:
        seconds(packed, mixes["mixed"][0], backward=True)
    spent = Counter({event.key: event.self_cpu_time_total for event in profiler.key_averages()})
    shares = []
    for name, part in spent.most_common(5):
        shares.append(f"{name.removeprefix('aten::')} {part / spent.total():.0%}")
    print("our time:", ", ".join(shares))
    return apart


def main(flags: Flags) -> None:
    """The comparison; with --gpu, the tables of benchmark_gpu.py before it."""
    if not flags.gpu:
        benchmark(flags)
        return
    from nano_moca.benchmark_gpu import benchmark_gpu

    world = benchmark_gpu(flags.model, flags.step_records, flags.peak)
    dtype = str(world.dtype).removeprefix("torch.")
    print()
    try:
        benchmark(replace(flags, device=world.device.type, dtype=dtype))
    except MocaError as error:
        # Without transformers, for instance, or with a --model that has no weights.
        print(f"packing is not compared: {error}")


if __name__ == "__main__":
    main_guard(lambda: main(parse_flags(Flags, None, "Packed and padded, side by side.")))
