"""What packing is worth: the same records through transformers, padded, and through nano_moca.

    python -m nano_moca.benchmark

One random model in about the proportions of Qwen2.5-VL-3B, one process, the same batches, causal in
both (as transformers computes it), the two taking turns. Three mixes of the embedded default's
records: as they come; sorted by length before they are cut into batches, the best that padding can
do for itself; and all of one length, with nothing to pad. Only real tokens count. Before anything
is timed the two have to compute the same hidden states; at the end stands where our time goes.

Left out: reading images, which both need, and making positions, which both are given.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nano_moca.builtin import SPECIAL, Builtin, initialise, make_tokenizer
from nano_moca.config import MocaError, nano_config, parse_config
from nano_moca.model import VLM
from nano_moca.processor import Batch, Processor
from nano_moca.trainer import flag, parse_flags, run
from nano_moca.weights import save_weights

BATCHES = 2  # of each mix
KINDS = {"matrix products": "mm", "attention": "attention", "gather": "index", "elementwise": ""}
Engine = Callable[[Batch], Tensor]  # a packed batch -> hidden states [T, D]


@dataclass
class Flags:
    """How large, how often, and where."""

    width: int = flag(512, "of the decoder, a multiple of 128; the vision tower has half", low=128)
    layers: int = flag(4, "of the decoder, and as many blocks of the vision tower", low=1)
    records: int = flag(64, "in a batch: about a step of train_cpt.py", low=1)
    repeats: int = flag(3, "of each measurement; the median counts", low=1)
    threads: int = flag(1, "on the CPU", low=1)
    device: str = flag("cpu", "where to run", choices=("cpu", "cuda"))
    dtype: str = flag("float32", "of the weights", choices=("float32", "bfloat16"))


def random_model(flags: Flags) -> tuple[VLM, Processor]:
    """The nano model, wider, with random weights and the embedded default's tokenizer."""
    tokenizer, width = make_tokenizer(), flags.width
    raw = nano_config(2048, {name: tokenizer.token_to_id(name) for name in SPECIAL}).raw
    raw |= dict(hidden_size=width, intermediate_size=width * 43 // 8, torch_dtype=flags.dtype,
                num_hidden_layers=flags.layers, num_attention_heads=width // 32,
                num_key_value_heads=width // 128)  # heads are 32 wide, as the nano model's
    raw["vision_config"] |= dict(
        hidden_size=width // 2, intermediate_size=width * 4 // 3, depth=flags.layers,
        num_heads=width // 64, out_hidden_size=width, window_size=112,
        fullatt_block_indexes=[flags.layers - 1])
    model = VLM(parse_config(raw))
    initialise(model, seed=0)
    images = dict(min_pixels=28 * 28, max_pixels=1024 * 28 * 28)
    return model.to(getattr(torch, flags.dtype)), Processor(tokenizer, model.config, images)


def make_mixes(processor: Processor, flags: Flags) -> dict[str, list[Batch]]:
    """Three mixes, each of BATCHES batches of as many records."""
    source, count = Builtin("train"), flags.records
    mixed = [processor.encode(source[index]) for index in range(BATCHES * count)]
    ordered = sorted(mixed, key=lambda item: len(item.tokens))
    equal = [ordered[len(ordered) // 2]] * len(ordered)
    return {mix: [processor.pack(items[at : at + count]).to(flags.device)
                  for at in range(0, len(items), count)]
            for mix, items in (("mixed", mixed), ("sorted", ordered), ("equal", equal))}


def transformers_engine(model: VLM, device: str) -> Engine:
    """The same weights in transformers, fed as usual: a row a record, padded to the longest."""
    from transformers import Qwen2_5_VLForConditionalGeneration as Reference

    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder), model.state_dict(), model.config)
        theirs = Reference.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    theirs = theirs.model.to(device)  # without the output head, as ours

    def run_padded(batch: Batch) -> Tensor:
        pad = lambda x: pad_sequence(x.split(batch.lengths), batch_first=True)  # noqa: E731
        mask = pad(torch.ones_like(batch.tokens))  # [N, longest]
        images = (batch.patches, None, batch.grids) if len(batch.grids) else ()
        hidden = theirs(pad(batch.tokens), mask, pad(batch.positions.T).permute(2, 0, 1), None,
                        None, False, *images).last_hidden_state  # [N, longest, D]
        return hidden[mask.bool()]  # [T, D]

    return run_padded


def seconds(engine: Engine, batch: Batch, backward: bool) -> float:
    """The time of one pass over a batch."""
    began = time.perf_counter()
    with torch.set_grad_enabled(backward):
        hidden = engine(batch)
        if backward:
            hidden.sum().backward()
    hidden[0, 0].item()  # waits for the GPU, if there is one
    return time.perf_counter() - began


def breakdown(engine: Engine, batch: Batch) -> str:
    """The share of each kind of operation in forward and backward."""
    with torch.profiler.profile() as profiler:
        seconds(engine, batch, backward=True)
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next(kind for kind, part in KINDS.items() if part in event.key)
        spent[kind] += event.self_device_time_total or event.self_cpu_time_total
    return ", ".join(f"{kind} {spent[kind] / spent.total():.0%}" for kind in KINDS)


def benchmark(flags: Flags) -> float:
    """Compare, time and print. Returns the largest difference between the two's hidden states."""
    torch.set_num_threads(flags.threads)
    model, processor = random_model(flags)
    mixes, engines, apart = make_mixes(processor, flags), {}, 0.0
    try:
        engines["transformers"] = transformers_engine(model, flags.device)
    except ImportError:
        print("without transformers (pip install transformers) only nano_moca is timed")
    model.to(flags.device)
    engines["nano_moca"] = lambda batch: model(batch, causal=True)
    for batch in mixes["mixed"]:
        with torch.no_grad():
            hidden = [engine(batch) for engine in engines.values()]
        apart = max(apart, float((hidden[0] - hidden[-1]).abs().max()))
    print(f"{BATCHES} batches of {flags.records} records; hidden states differ by {apart:.1e}")
    if flags.dtype == "float32" and not apart < 1e-3:
        raise MocaError("the two compute different things: there is nothing to compare")
    print(f"{'tokens a second':26s}", *(f"{name:>13s}" for name in engines), f"{'ratio':>6s}")
    for mix, batches in mixes.items():
        tokens = sum(len(batch.tokens) for batch in batches)
        for backward, name in ((False, "forward"), (True, "forward, backward")):
            spent = torch.zeros(len(engines))
            for batch in batches:
                rounds = torch.tensor([[seconds(engine, batch, backward) for engine in
                                        engines.values()] for _ in range(1 + flags.repeats)])
                spent += rounds[1:].median(0).values  # the first is the warm-up
            speeds = (tokens / spent).tolist()
            print(f"{mix:8s}{name:18s}", *(f"{speed:13,.0f}" for speed in speeds),
                  f"{speeds[-1] / speeds[0]:6.2f}", flush=True)
    print("nano_moca's time:", breakdown(engines["nano_moca"], mixes["mixed"][0]))
    return apart


if __name__ == "__main__":
    run(lambda: benchmark(parse_flags(Flags, None, "Packed and padded, side by side.")))
