"""Stage 2 of MoCa: heterogeneous contrastive fine-tuning. `torchrun train_cl.py`, or with python.

The bidirectional model becomes an embedder: a query and what it should find are pulled together,
away from all else in the batch and from near misses,

    loss = -log exp(cos(q, p) / t) / sum over candidates c of exp(cos(q, c) / t)   (section 3.2)

over three kinds of pairs (long documents, image and text, text only), each step of one task.
Without flags it goes on from stage 1's output, or from the nano base if there is none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from nano_moca import Moca
from nano_moca.config import MocaError, load_config, write_json
from nano_moca.data import KINDS, Pair, PairBatches, load_tasks
from nano_moca.losses import backward_through_cache, info_nce
from nano_moca.model import VLM
from nano_moca.processor import Encoded, Processor
from nano_moca.report import plot_retrieval, plot_similarity, rank_pairs
from nano_moca.trainer import (
    Log, World, clip_gradients, flag, keep_lines, load_checkpoint, parse_flags, plot_losses, prefetch,
    require_finite, require_same, run, save_checkpoint, save_model, shard, start,
    warmup_then_linear,
)
from nano_moca.weights import build, find_checkpoint

BASE = Path(__file__).parent / "nano_moca" / "base"
STAGE_1 = Path("runs/cpt/model")
REPORT_PAIRS = 200  # of each task, for the report at the end
MAY_CHANGE = {"output", "steps", "save_every", "resume", "device"}  # when a run is resumed


@dataclass
class Flags:
    """Defaults are for the embedded data on a CPU; the README has recipes for 3B and 7B."""

    model: str = flag("", "checkpoint to start from (default: stage 1's, else the nano base)")
    data: str = flag("builtin", ".jsonl or .parquet file of pairs, or a folder of them")
    output: str = flag("runs/cl", "folder for log, checkpoint, model and pictures")
    steps: int = flag(400, "optimiser steps", low=1)
    batch: int = flag(64, "pairs a step over all ranks", low=2)
    max_tokens: int = flag(1280, "a record's limit; longer texts are shortened", low=8)
    chunk: int = flag(0, "records embedded at once, by the gradient cache; 0: all", low=0)
    hard_negatives: int = flag(2, "of each query, at most", low=0)
    temperature: float = flag(0.03, "what cosines are divided by", low=1e-4)
    task_batches: str = flag("on", "one task a step, or off: tasks mixed", choices=("on", "off"))
    alpha: float = flag(1.0, "a task's share of the steps is its size to this power", low=0)
    held_out: str = flag(None, "pairs for the report (default: --data; the embedded data has some)")
    without: str = flag(None, "a kind of pairs to leave out", choices=KINDS)
    attention: str = flag("bidirectional", "in the decoder", choices=("bidirectional", "causal"))
    pooling: str = flag(None, "default: mean; last if causal", choices=("mean", "last"))
    learning_rate: float = flag(5e-4, "at its peak; 2e-5 for 3B and 7B", low=0, high=1)
    warmup: float = flag(0.05, "share of the steps in which it rises", low=0, high=1)
    clip: float = flag(5.0, "largest gradient norm; inf for no limit", low=1e-9)
    seed: int = flag(0, "of the order of pairs", low=0, high=2**63 - 1)
    device: str = flag(None, "default: cuda if there is one", choices=("cpu", "cuda"))
    dtype: str = flag(None, "default: bfloat16 on cuda", choices=("float32", "bfloat16"))
    checkpointing: bool = flag(False, "recompute activations in backward to save memory")
    save_every: int = flag(100, "steps between checkpoints", low=1)
    resume: bool = flag(False, "go on from the checkpoint in --output")
    on_error: str = flag("stop", "at a pair that cannot be used", choices=("stop", "skip"))


def load(flags: Flags, world: World) -> tuple[VLM, Processor]:
    """The checkpoint in float32, sharded if there are ranks, and its processor."""
    folder = find_checkpoint(flags.model or str(STAGE_1 if STAGE_1.is_dir() else BASE))
    config = load_config(folder)
    processor = Processor.load(folder, config)
    model = build(folder, config, world.device, torch.float32, lambda vlm: shard(vlm, vlm, world))
    model.language.checkpointing = model.visual.checkpointing = flags.checkpointing
    return model, processor


def load_pairs(flags: Flags, unusable: list[str] | None) -> dict[str, Sequence[Pair]]:
    """The tasks that the flags ask for; with --task-batches off, all in one."""
    tasks = {name: task for name, task in load_tasks(flags.data, flags.seed, unusable).items()
             if task.kind != flags.without}
    if not tasks:
        raise MocaError(f"{flags.data} holds no pairs to learn from: see --data and --without")
    return tasks if flags.task_batches == "on" else {"mixed": ConcatDataset(tasks.values())}


def finish(flags: Flags, world: World, moca: Moca, log: Log) -> None:
    """Rank held-out pairs, draw the pictures, and say what was learned."""
    output, scores, rankings = Path(flags.output), {}, {}
    held_out = flags.held_out or ("builtin:development" if flags.data == "builtin" else flags.data)
    try:
        for name, task in load_tasks(held_out, 0).items():  # on all ranks, for sharded models
            pairs = [task[i] for i in range(min(REPORT_PAIRS, len(task)))]
            rankings[name] = rank_pairs(pairs, lambda records: moca.embed(records).numpy())
            scores[name] = rankings[name].scores()
        if world.main:
            plot_retrieval(output / "retrieval.png", rankings)
            plot_similarity(output / "similarity.png", rankings)
    except MocaError as error:  # the model is saved: a pair that is only reported spoils no run
        print(f"no report on {held_out}: {error}", flush=True)
    if world.main:
        plot_losses(output / "loss.png", log.lines, ["loss", "accuracy"])
        write_json(output / "scores.json", {"pairs": held_out, "tasks": scores})
        for name, task in scores.items():
            print(f"{name:>24s}  recall@1 {task['recall@1']:.3f}  recall@10 {task['recall@10']:.3f}"
                  f"  of {task['candidates']} (chance {task['chance recall@1']:.3f}, "
                  f"{task['chance recall@10']:.3f})")
        print(f"{output}: the model is in model/, beside it scores.json and the pictures")


def train(flags: Flags) -> None:
    """The whole of stage 2: build, loop, save, report."""
    world, output = start(flags.device, flags.dtype), Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load(flags, world)
    causal = flags.attention == "causal"
    pooling = flags.pooling or ("last" if causal else "mean")
    skipped = None
    if flags.on_error == "skip":
        skipped = output / "skipped.jsonl" if world.main else Path(os.devnull)
    unusable = [] if skipped else None
    batches = PairBatches(load_pairs(flags, unusable), processor, flags.batch, flags.max_tokens, flags.hard_negatives,
                          flags.seed, flags.alpha, world.rank, world.size, skipped, unusable or ())
    optimizer = torch.optim.AdamW(
        model.parameters(), flags.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    saved = flags.resume and load_checkpoint(output / "checkpoint", world, model, optimizer)
    done = saved["step"] if saved else 0
    if saved:
        batches.state = saved["data"]
        require_same(saved["flags"], asdict(flags), MAY_CHANGE)
    keep_lines(output / "skipped.jsonl", batches.state["skipped"], world)
    log = Log(output / "log.jsonl", world, flags.steps, done)

    if world.main:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{flags.model} -> {output}: {parameters:,} parameters, steps {done + 1} to "
              f"{flags.steps} of {flags.batch} pairs, {world.size} rank(s) on "
              f"{world.device.type}, products in {world.dtype}, all else in float32, "
              f"attention {flags.attention}, {pooling} pooling, seed {flags.seed}; steps of an epoch: "
              + ", ".join(f"{name} {count}" for name, count in batches.counts.items()), flush=True)

    def embed(items: list[Encoded]) -> Tensor:  # [items, D]
        batch = processor.pack(items or [drawn.spare]).to(world.device)
        return model.embed(batch, causal, pooling)[: len(items)]

    loader, seen = prefetch(batches.__next__), batches.state
    for step in range(done + 1, flags.steps + 1):
        began = time.perf_counter()
        drawn = next(loader)
        seen = drawn.state
        n, value, right = len(drawn.mine), 0.0, 0.0

        def loss(vectors: Tensor) -> Tensor:
            nonlocal value, right
            queries, positives, negatives = vectors.split([n, n, len(vectors) - 2 * n])
            share, correct = info_nce(queries, positives, negatives, drawn.mine.to(world.device),
                                      drawn.forbidden.to(world.device), flags.temperature)
            value, right = share.item(), float(correct)
            return world.size * share
        backward_through_cache(embed, drawn.chunks(flags.chunk), loss)
        value, right = world.total(value, right)
        grad_norm = clip_gradients(model, flags.clip)
        require_finite(step, {"loss": value, "gradient norm": grad_norm},
                       [item.source for item in drawn.items])
        rate = flags.learning_rate * warmup_then_linear(step - 1, flags.steps, flags.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        log.write({"step": step, "loss": value, "task": drawn.task, "accuracy": right / drawn.batch,
                   "lr": rate, "grad_norm": grad_norm, "tokens": drawn.tokens,
                   "tokens_per_second": drawn.tokens / (time.perf_counter() - began)})
        if step % flags.save_every == 0 or step == flags.steps:
            state = {"step": step, "data": seen, "flags": asdict(flags)}
            save_checkpoint(output / "checkpoint", world, model, optimizer, state)
    log.bar.close()
    loader.close()
    save_model(output / "model", world, model, processor)
    finish(flags, world, Moca(model, processor, flags.attention, pooling), log)


if __name__ == "__main__":
    run(lambda: train(parse_flags(Flags, None, __doc__)))
