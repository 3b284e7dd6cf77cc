"""What packing is worth: the same records through transformers, padded, and through nano_moca.

    pip install transformers
    python -m nano_moca.benchmark [--model DIR|HUB_ID]

One model (if none is named, the nano base made wider, with random weights, about in the proportions
of Qwen2.5-VL-3B), one process, the same batches, causal in both (as transformers computes it), the
two taking turns. Three mixes of the built-in records: as they come; sorted by length before they
are cut into batches, the best that padding can do for itself; and all of one length, so that
nothing is padded. Only real tokens count. Before anything is timed the two have to compute the same
hidden states. The last line says where our time goes.

Left out: reading images, which both need, and making positions, which both are given.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nano_moca import load
from nano_moca.builtin import Builtin, initialise
from nano_moca.config import BASE, MocaError, load_config, parse_config
from nano_moca.model import VLM
from nano_moca.processor import Batch, Processor
from nano_moca.trainer import flag, parse_flags, run
from nano_moca.weights import find_checkpoint, save_weights

BATCHES, REPEATS = 2, 3  # batches of each mix; measurements of each, whose median counts


@dataclass
class Flags:
    """What to run, and where. The number of threads: OMP_NUM_THREADS in the environment."""

    model: str = flag(None, "checkpoint: a folder or a hub id (default: one made for it)")
    width: int = flag(512, "of the decoder that is made, a multiple of 128", low=128)
    records: int = flag(64, "in a batch: about two steps of train_cpt.py", low=1)
    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    dtype: str = flag("float32", "of the weights", choices=("float32", "bfloat16"))


def make_wide(folder: Path, width: int) -> None:
    """A checkpoint of the nano base's depth with random weights and this width."""
    base = load_config(BASE)
    vision = dict(hidden_size=width // 2, intermediate_size=width * 4 // 3, num_heads=width // 64,
                  out_hidden_size=width)  # heads are 32 wide, as the nano base's
    model = VLM(parse_config(base.raw | dict(
        hidden_size=width, intermediate_size=width * 43 // 8, num_attention_heads=width // 32,
        num_key_value_heads=width // 128, vision_config=base.raw["vision_config"] | vision)))
    initialise(model, seed=0)
    save_weights(folder, model.state_dict(), model.config)
    Processor.load(BASE, base).save(folder)


def make_mixes(processor: Processor, flags: Flags) -> dict[str, list[Batch]]:
    """Three mixes, each of BATCHES batches of as many records."""
    source, count = Builtin("train"), flags.records
    mixed = [processor.encode(source[index]) for index in range(BATCHES * count)]
    ordered = sorted(mixed, key=lambda item: len(item.tokens))
    equal = [ordered[len(ordered) // 2]] * len(ordered)
    return {mix: [processor.pack(items[at : at + count]).to(flags.device)
                  for at in range(0, len(items), count)]
            for mix, items in (("mixed", mixed), ("sorted", ordered), ("equal", equal))}


def run_padded(theirs: nn.Module, batch: Batch) -> Tensor:
    """Hidden states [T, D] by transformers, fed as usual: one row per record, padded."""
    tokens, positions, mask = (
        pad_sequence(x.split(batch.lengths), batch_first=True)  # [N, longest, ...]
        for x in (batch.tokens, batch.positions.T, torch.ones_like(batch.tokens)))
    images = dict(pixel_values=batch.patches, image_grid_thw=batch.grids)
    hidden = theirs(
        input_ids=tokens, attention_mask=mask, position_ids=positions.permute(2, 0, 1),
        use_cache=False, **images if len(batch.grids) else {}).last_hidden_state
    return hidden[mask.bool()]


def seconds(engine: Callable, batch: Batch, backward: bool) -> float:
    """The time of one pass over a batch."""
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        hidden = engine(batch)
        if backward:
            hidden.sum().backward()
    hidden[0, 0].item()  # waits for the GPU, if there is one
    return time.perf_counter() - began


def benchmark(flags: Flags) -> float:
    """Compare, time and print. Returns the largest difference between the two's hidden states."""
    try:
        from transformers import AutoModelForImageTextToText
    except ImportError:
        raise MocaError("there is nothing to compare with: pip install transformers") from None
    with tempfile.TemporaryDirectory() as made:
        if not flags.model:
            make_wide(Path(made), flags.width)
        folder = find_checkpoint(flags.model or made)
        moca = load(folder, flags.device, getattr(torch, flags.dtype))
        theirs = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=flags.dtype, attn_implementation="sdpa")
    theirs = theirs.model.to(flags.device)  # without the output head, as ours
    engines = partial(run_padded, theirs), partial(moca.model, causal=True)
    mixes = make_mixes(moca.processor, flags)
    with torch.no_grad():
        apart = max(float((engines[0](batch) - engines[1](batch)).abs().max())
                    for batch in mixes["mixed"])
    print(f"{BATCHES} batches of {flags.records} records; hidden states differ by {apart:.1e}")
    if flags.dtype == "float32" and not apart < 1e-3:
        raise MocaError("the two compute different things: there is nothing to compare")
    print(f"{'tokens a second':26s}  transformers     nano_moca  ratio")
    for mix, batches in mixes.items():
        tokens = sum(len(batch.tokens) for batch in batches)
        for backward, name in ((False, "forward"), (True, "forward, backward")):
            spent = torch.zeros(2)
            for batch in batches:
                rounds = torch.tensor([[seconds(engine, batch, backward) for engine in engines]
                                       for _ in range(1 + REPEATS)])
                spent += rounds[1:].median(0).values  # the first is the warm-up
            theirs, ours = (tokens / spent).tolist()
            print(f"{mix:8s}{name:18s}{theirs:14,.0f}{ours:14,.0f}{ours / theirs:7.2f}", flush=True)
    with torch.profiler.profile() as profiler:
        seconds(engines[1], mixes["mixed"][0], backward=True)
    spent = Counter({event.key: event.self_cpu_time_total for event in profiler.key_averages()})
    print("our time:", ", ".join(f"{name.removeprefix('aten::')} {part / spent.total():.0%}"
                                 for name, part in spent.most_common(5)))
    return apart


if __name__ == "__main__":
    run(lambda: benchmark(parse_flags(Flags, None, "Packed and padded, side by side.")))
