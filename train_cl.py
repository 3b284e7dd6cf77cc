"""Stage 2 of MoCa: heterogeneous contrastive fine-tuning (`torchrun train_cl.py`).

The bidirectional model becomes an embedder: a query q is pulled towards its
positive p, and away from the other positives of the batch and from its own hard
negatives (near misses),

    loss = -log(exp(cos(q, p) / t) / sum over c of exp(cos(q, c) / t))   (section 3.2)

where c runs over p and all of those negatives. There are three kinds of pairs (long
documents, image and text, text only), and each step takes a single task. Without flags
it goes on from stage 1's output, or from the nano base if there is none.

All embeddings have to be there before the loss can be taken, and with large batches
their activations do not fit into memory. But what lies below an embedding needs nothing
of the others. So the gradient cache (`--chunk`; GradCache, arXiv 2101.06983) embeds
twice: first without a graph, to get the loss and its gradient at each embedding; then
chunk by chunk with a graph, to go on backward from there. (No dropout: both times are
the same.) The letters of all shapes stand in nano_moca/__init__.py.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nano_moca.batch import KINDS, Batch, Pair
from nano_moca.batches import PairBatch, PairBatches, prefetch
from nano_moca.config import BASE
from nano_moca.data import Joined, load_tasks
from nano_moca.distributed import World, init_distributed, shard
from nano_moca.files import MocaError
from nano_moca.flags import CommonFlags, flag, main_guard, parse_flags
from nano_moca.losses import info_nce
from nano_moca.model import POOLINGS
from nano_moca.processor import Processor
from nano_moca.trainer import (Log, close_run, guarded, make_optimizer, open_checkpoint,
                               print_plan, resume, save_progress, skip_list, update)
from nano_moca.weights import load_weights
import torch  # after nano_moca, which first says how torch's threads wait

STAGE_1 = Path("runs/cpt/model")  # where train_cpt.py leaves its model


@dataclass
class Flags(CommonFlags):
    """Stage 2's own flags, and other defaults for some that both scripts have (see
    nano_moca/flags.py)."""

    model: str = flag(str(STAGE_1 if STAGE_1.is_dir() else BASE), "a folder or a hub id: "
                      "stage 1's output, or the nano base if there is none")
    data: str = flag("builtin", ".jsonl, .parquet or .arrow file of pairs, a folder, or several")
    output: str = flag("runs/cl", "folder for log, checkpoint, model and pictures")
    steps: int = flag(290, "optimiser steps", low=1)
    learning_rate: float = flag(5e-4, "peak value; 2e-5 for 3B and 7B", low=0, high=1)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", low=0, high=1)
    batch: int = flag(64, "pairs per step over all ranks", low=2)
    max_tokens: int = flag(1280, "a record's limit; longer texts are shortened", low=8)
    chunk: int = flag(0, "tokens embedded at once (gradient cache); 0: all", low=0)
    hard_negatives: int = flag(2, "at most this many per query", low=0)
    temperature: float = flag(0.03, "what cosines are divided by", low=1e-4, high=10)
    pooling: str = flag(None, "default: mean; last if causal", choices=POOLINGS)
    task_batches: str = flag("on", "on: one task per step; off: mixed", choices=("on", "off"))
    alpha: float = flag(1.0, "a task's share of steps goes with size ** alpha", low=0, high=10)
    without: str = flag(None, "a kind of pairs to leave out", choices=KINDS)
    held_out: str = flag(None, "pairs for the report (default: --data, or built-in ones)")


def load_pairs(flags: Flags, unusable: list[MocaError] | None) -> dict[str, Sequence[Pair]]:
    """The tasks that the flags ask for; with --task-batches off, all in one."""
    tasks = load_tasks(flags.data, flags.seed, unusable, flags.cap)
    tasks = {name: task for name, task in tasks.items() if task.kind != flags.without}
    if not tasks:
        raise MocaError(f"{flags.data} holds no pairs to learn from: see --data and --without")
    if flags.task_batches == "off":
        return {"mixed": Joined(tasks.values())}
    return tasks


def packed_steps(batches: PairBatches, processor: Processor, world: World
                 ) -> Iterator[tuple[PairBatch, list[Batch]]]:
    """Draw, pack and send to the device: each step's pairs for this rank, and its chunks,
    which a gradient cache embeds twice."""
    for drawn in batches:
        chunks = []
        for records in drawn.chunks:
            # In place of an empty chunk the filler is embedded, and its vector dropped:
            # under FSDP all ranks must take part in each forward pass.
            batch = processor.pack(records or [drawn.filler])
            chunks.append(batch.to(world.device))
        yield drawn.to(world.device), chunks


@guarded  # --plan: only print an estimate; else: --output is this run's alone
def train(flags: Flags) -> None:
    """The whole of stage 2: build, loop, save, report."""
    causal = flags.attention == "causal"
    pooling = flags.pooling or ("last" if causal else "mean")
    output = Path(flags.output)

    # The model: shapes without memory at first. `shard` gives each rank memory for its
    # part of every block, and of the root, which is all that is in no block.
    world = init_distributed(flags.device, flags.dtype)
    folder, model, processor = open_checkpoint(flags, world)
    shard(model, [*model.visual.blocks, *model.language.layers], world)
    load_weights(model, folder, processor.new_mask_token, flags.allow_extra)

    # The data: every rank draws the same pairs, and takes its share of each step.
    skipped = skip_list(flags, world)
    unusable: list[MocaError] = []  # lines that name no task, to be listed; else they stop us
    tasks = load_pairs(flags, unusable if skipped else None)
    batches = PairBatches(tasks, processor, flags.batch, flags.max_tokens,
                          flags.hard_negatives, flags.seed, flags.alpha, flags.chunk,
                          world.rank, world.size, skipped, unusable)

    # Begin, or go on where the checkpoint in --output was written.
    optimizer = make_optimizer(model, flags.learning_rate)
    saved = resume(flags, world, model, optimizer, batches)
    done = saved["step"] if saved else 0
    step_contents = (f"{flags.batch} pairs ({batches.steps} steps an epoch: {batches.counts}), "
                     f"{flags.attention} attention, {pooling} pooling")
    print_plan(flags, world, model, done, step_contents)
    log = Log(output / "log.jsonl", world, flags.steps, saved)

    # `batches` is a step ahead of what was learned: `data_state` says where to go on.
    data_state = batches.state
    loader = prefetch(packed_steps(batches, processor, world), flags.steps - done)
    for step in range(done + 1, flags.steps + 1):
        started = time.perf_counter()

        # 1. This rank's pairs: n queries, n positives, M hard negatives, packed in chunks. All
        #    ranks have equally many chunks, so that all cache or none does. Until the loss is
        #    read (5.) the host waits for nothing.
        drawn, chunks = next(loader)
        data_state = drawn.state
        sizes = [len(records) for records in drawn.chunks]
        cached = len(chunks) > 1

        # 2. Embed them all. If the gradient is to be cached, no graph is kept: the vectors
        #    are where backward stops for now.
        chunk_vectors = []
        for chunk, size in zip(chunks, sizes, strict=True):
            with torch.set_grad_enabled(not cached):
                embedded = model.embed(chunk, causal, pooling)
            chunk_vectors.append(embedded[:size])
        vectors = torch.cat(chunk_vectors)  # [n + n + M, D]
        if cached:
            vectors.requires_grad_()

        # 3. The loss over the pairs of all ranks, and backward: to the weights, or to the
        #    vectors. FSDP averages the gradients of the ranks, and ours have to add up.
        n = len(drawn.local_index)
        queries, positives, negatives = vectors.split([n, n, len(vectors) - 2 * n])
        loss, correct = info_nce(
            queries, positives, negatives, drawn.local_index, drawn.excluded,
            flags.temperature)
        (world.size * loss).backward()

        # 4. With a cache: embed each chunk again, now with a graph, and go on backward from
        #    the gradient at its vectors. One chunk's activations are in memory at a time.
        if cached:
            gradients = vectors.grad.split(sizes)
            for chunk, gradient in zip(chunks, gradients, strict=True):
                embedded = model.embed(chunk, causal, pooling)
                embedded[: len(gradient)].backward(gradient)

        # 5. Clip the gradients; read their norm and the loss of the whole step, over all ranks;
        #    stop if one is not finite, and name the step's records; set this step's learning
        #    rate; AdamW's step; drop the gradients.
        sources = [record.source for record in drawn.records]
        totals = world.total(loss.detach(), correct)
        (step_loss, correct_count), figures = update(step, totals, flags, model, optimizer, sources)

        # 6. Every rank saves its part of the checkpoint, the main rank writes the log.
        seconds = time.perf_counter() - started
        log.write({"step": step, "loss": step_loss, "task": drawn.task,
                   "accuracy": correct_count / drawn.batch, **figures, "tokens": drawn.tokens,
                   "tokens_per_second": drawn.tokens / seconds})
        if step % flags.save_every == 0 or step == flags.steps:
            save_progress(step, flags, world, model, optimizer, data_state, log)

    close_run(flags, world, log, loader, data_state, model)

    # The model, as others read it.
    from nano_moca.convert.export import save_model  # stands beside the road

    save_model(output / "model", world, model, processor, {
        "attention": flags.attention, "pooling": pooling, "max_tokens": flags.max_tokens})

    # What was learned, on held-out pairs.
    if not flags.no_report:
        from nano_moca import Moca  # imported here: training needs none of it
        from nano_moca.report import stage2

        moca = Moca(model, processor, flags.attention, pooling, flags.max_tokens)
        stage2.write_report(flags, world, moca, log.lines)


if __name__ == "__main__":
    main_guard(lambda: train(parse_flags(Flags, None, __doc__)))
