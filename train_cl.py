"""Stage 2 of MoCa: heterogeneous contrastive fine-tuning. `torchrun train_cl.py`, or with python.

The bidirectional model becomes an embedder: a query q is pulled towards its positive p, and away
from the other positives of the batch and from its own hard negatives (near misses),

    loss = -log(exp(cos(q, p) / t) / sum over c of exp(cos(q, c) / t))   (section 3.2)

where c runs over p and all of these. There are three kinds of pairs (long documents, image and
text, text only), and each step takes a single task.
Without flags it goes on from stage 1's output, or from the nano base if there is none.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nano_moca import Moca  # before torch, because it sets OMP_WAIT_POLICY
from nano_moca.config import BASE, MocaError, write_json
from nano_moca.data import KINDS, Pair, PairBatches, load_tasks
from nano_moca.evaluate import plot_retrieval, plot_similarity, rank_pairs
from nano_moca.losses import backward_through_cache, info_nce
from nano_moca.processor import Encoded
from nano_moca.trainer import (
    CommonFlags, World, begin, end, flag, load_model, parse_flags, plot_losses, prefetch, run,
    save_step, skip_list, start, update,
)
from torch import Tensor
from torch.utils.data import ConcatDataset

STAGE_1 = Path("runs/cpt/model")  # where train_cpt.py leaves its model
REPORT_PAIRS = 200  # of each task, for the report at the end


@dataclass
class Flags(CommonFlags):
    """Stage 2's own flags, and other defaults for some that both scripts have."""

    model: str = flag(str(STAGE_1 if STAGE_1.is_dir() else BASE), "a folder or a hub id: "
                      "stage 1's output, or the nano base if there is none")
    data: str = flag("builtin", ".jsonl or .parquet file of pairs, or a folder of them")
    output: str = flag("runs/cl", "folder for log, checkpoint, model and pictures")
    steps: int = flag(300, "optimiser steps", low=1)
    learning_rate: float = flag(1e-3, "peak value; 2e-5 for 3B and 7B", low=0, high=1)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", low=0, high=1)
    batch: int = flag(64, "pairs per step over all ranks", low=2)
    max_tokens: int = flag(1280, "a record's limit; longer texts are shortened", low=8)
    chunk: int = flag(0, "records embedded at once (gradient cache); 0: all", low=0)
    hard_negatives: int = flag(2, "at most this many per query", low=0)
    temperature: float = flag(0.03, "what cosines are divided by", low=1e-4, high=10)
    pooling: str = flag(None, "default: mean; last if causal", choices=("mean", "last"))
    task_batches: str = flag("on", "on: one task per step; off: mixed", choices=("on", "off"))
    alpha: float = flag(1.0, "a task's share of steps goes with size ** alpha", low=0, high=10)
    without: str = flag(None, "a kind of pairs to leave out", choices=KINDS)
    held_out: str = flag(None, "pairs for the report (default: --data, or built-in ones)")


def load_pairs(flags: Flags, unusable: list[MocaError] | None) -> dict[str, Sequence[Pair]]:
    """The tasks that the flags ask for; with --task-batches off, all in one."""
    tasks = {name: task for name, task in load_tasks(flags.data, flags.seed, unusable).items()
             if task.kind != flags.without}
    if not tasks:
        raise MocaError(f"{flags.data} holds no pairs to learn from: see --data and --without")
    return tasks if flags.task_batches == "on" else {"mixed": ConcatDataset(tasks.values())}


def finish(flags: Flags, world: World, moca: Moca, lines: list[dict]) -> None:
    """Rank held-out pairs, draw the pictures, and say what was learned."""
    output, scores, rankings = Path(flags.output), {}, {}
    held_out = flags.held_out or ("builtin:development" if flags.data == "builtin" else flags.data)
    try:  # on all ranks, for sharded models
        for name, task in load_tasks(held_out, 0, [] if skip_list(flags, world) else None).items():
            pairs = [task[i] for i in range(min(REPORT_PAIRS, len(task)))]
            rankings[name] = rank_pairs(pairs, lambda records: moca.embed(records).numpy())
            scores[name] = rankings[name].scores()
        if world.main:
            plot_retrieval(output / "retrieval.png", rankings)
            plot_similarity(output / "similarity.png", rankings)
    except MocaError as error:  # the model is saved already: a bad pair only costs the report
        if world.main:
            print(f"no report on {held_out}: {error}", flush=True)
    if world.main:
        plot_losses(output / "loss.png", lines, ["loss", "accuracy"])
        write_json(output / "scores.json", {"pairs": held_out, "tasks": scores})
        print(f"ranked: pairs of {held_out}{', learned from' * (held_out == flags.data)}")
        for name, task in scores.items():
            print(f"{name:>24s} ", ", ".join(f"{key} {task[key]:.3g}" for key in task))
        print(f"{output}: the model is in model/, beside it scores.json and the pictures")


def train(flags: Flags) -> None:
    """The whole of stage 2: build, loop, save, report."""
    world = start(flags.device, flags.dtype)
    model, processor = load_model(flags, world)
    skipped = skip_list(flags, world)
    unusable = [] if skipped else None  # what is wrong with lines that say no task
    batches = PairBatches(load_pairs(flags, unusable), processor, flags.batch, flags.max_tokens,
                          flags.hard_negatives, flags.seed, flags.alpha, world.rank, world.size,
                          skipped, unusable or ())
    causal = flags.attention == "causal"
    pooling = flags.pooling or ("last" if causal else "mean")
    model.config.raw["nano_moca"] = {"attention": flags.attention, "pooling": pooling}  # is saved
    about = (f"{flags.batch} pairs ({batches.steps} steps an epoch: {batches.counts}), "
             f"{flags.attention} attention, {pooling} pooling")
    optimizer, log, done = begin(flags, world, model, batches, about)

    def embed(items: list[Encoded]) -> Tensor:  # [items, D]
        batch = processor.pack(items or [drawn.spare]).to(world.device)
        return model.embed(batch, causal, pooling)[: len(items)]

    def loss(vectors: Tensor) -> Tensor:  # [n + n + M, D]: queries, positives, hard negatives
        n = len(drawn.mine)
        share, right = info_nce(*vectors.split([n, n, len(vectors) - 2 * n]),
                                drawn.mine.to(world.device), drawn.forbidden.to(world.device),
                                flags.temperature)
        figures[:] = share.item(), right.item()
        # FSDP averages gradients over the ranks, and ours have to add up
        return world.size * share

    figures = [0.0, 0.0]  # this rank's share of the loss, and how many queries were right
    loader, seen = prefetch(batches.__next__), batches.state
    for step in range(done + 1, flags.steps + 1):
        began = time.perf_counter()
        drawn = next(loader)
        seen = drawn.state
        backward_through_cache(embed, drawn.chunks(flags.chunk), loss)
        whole, right = world.total(*figures)
        moved = update(step, whole, flags, model, optimizer, [item.source for item in drawn.items])
        log.write({"step": step, "loss": whole, "task": drawn.task, "accuracy": right / drawn.batch,
                   **moved, "tokens": drawn.tokens,
                   "tokens_per_second": drawn.tokens / (time.perf_counter() - began)})
        save_step(step, flags, world, model, optimizer, seen, log)
    end(flags, world, model, processor, log, loader, seen)
    moca = Moca(model, processor, flags.attention, pooling, flags.max_tokens)
    finish(flags, world, moca, log.lines)


if __name__ == "__main__":
    run(lambda: train(parse_flags(Flags, None, __doc__)))
