"""Stage 1 of MoCa: modality-aware continual pre-training. `torchrun train_cpt.py`, or with python.

A causal vision-language model is made bidirectional and learns to restore hidden words and patches:

    loss = MLM + mae_weight * MAE     (section 3.1; best at 0.5 in the paper, 0.1 in its script)

Without flags it starts from the nano base in this repository and the embedded data, and takes
minutes on a laptop. `--objective next-token` is the control: the same data under the causal loss.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nano_moca.config import BASE, MocaError, load_config, write_json
from nano_moca.data import Draw, Records, TokenBatches
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import Corruption, corrupt, next_token
from nano_moca.model import Restorer
from nano_moca.processor import Processor
from nano_moca.report import cross_modal_report, plot_restorations
from nano_moca.trainer import (
    Log, World, clip_gradients, flag, keep_lines, load_checkpoint, parse_flags, plot_losses,
    prefetch, require_finite, require_same, run, save_checkpoint, save_model, shard, start,
    warmup_then_linear,
)
from nano_moca.weights import build, find_checkpoint

REPORT_TOKENS = 8192  # of unseen records, for the report at the end
MAY_CHANGE = {"output", "steps", "save_every", "resume", "device"}  # when a run is resumed


@dataclass
class Flags:
    """Defaults are for the embedded data on a CPU; the README has recipes for 3B and 7B."""

    model: str = flag(str(BASE), "checkpoint to start from: a folder or a hub id")
    data: str = flag("builtin", ".jsonl or .parquet file, or a folder of them")
    output: str = flag("runs/cpt", "folder for log, checkpoint, model and pictures")
    steps: int = flag(1000, "optimiser steps", low=1)
    batch_tokens: int = flag(1000, "tokens a step over all ranks", low=1)
    max_tokens: int = flag(1280, "a record's limit; longer texts are shortened", low=8)
    accumulate: int = flag(1, "micro-batches a step on each rank", low=1)
    objective: str = flag("restore", "what is learned", choices=("restore", "next-token"))
    text_mask: float = flag(0.4, "share of text tokens hidden; 0 turns MLM off", low=0, high=1)
    image_mask: float = flag(0.5, "share of patch groups hidden; 0 turns MAE off", low=0, high=1)
    mae_weight: float = flag(0.5, "weight of the patch loss; 0 turns MAE off", low=0)
    attention: str = flag("bidirectional", "in the decoder", choices=("bidirectional", "causal"))
    learning_rate: float = flag(2e-3, "at its peak; 2e-6 for 3B and 7B", low=0, high=1)
    warmup: float = flag(0.1, "share of the steps in which it rises", low=0, high=1)
    clip: float = flag(5.0, "largest gradient norm; inf for no limit", low=1e-9)
    seed: int = flag(0, "of order, masks and new weights", low=0, high=2**63 - 1)
    device: str = flag(None, "default: cuda if there is one", choices=("cpu", "cuda"))
    dtype: str = flag(None, "default: bfloat16 on cuda", choices=("float32", "bfloat16"))
    checkpointing: bool = flag(False, "recompute activations in backward to save memory")
    save_every: int = flag(100, "steps between checkpoints", low=1)
    resume: bool = flag(False, "go on from the checkpoint in --output")
    on_error: str = flag("stop", "at a record that cannot be used", choices=("stop", "skip"))


def load(flags: Flags, world: World) -> tuple[Restorer, Processor]:
    """The checkpoint as a float32 `Restorer`, sharded if there are ranks, and its processor."""
    folder = find_checkpoint(flags.model)
    config = load_config(folder)
    processor = Processor.load(folder, config)
    # a new mask token takes a padded row of the embedding; the embedding grows if none is free
    config = replace(config, vocabulary=max(config.vocabulary, processor.mask_token + 1))
    mask_row = processor.mask_token if processor.mask_is_new else None
    model = build(folder, config, world.device, torch.float32,
                  lambda vlm: shard(Restorer(vlm), vlm, world), mask_row)
    model.patch_decoder.start_from(model.vlm.language, flags.seed)
    model.vlm.language.checkpointing = model.vlm.visual.checkpointing = flags.checkpointing
    return model, processor


def exercises(draw: Draw, processor: Processor, flags: Flags) -> list[Corruption]:
    """One corrupted micro-batch a part of the draw; seed and record decide what is hidden."""
    batches = [processor.pack([item for _, item in part]) for part in draw.parts]
    if flags.objective == "next-token":
        return [next_token(batch, processor) for batch in batches]
    rates = flags.text_mask, flags.image_mask if flags.mae_weight else 0.0
    keys = [[(flags.seed, number) for number, _ in part] for part in draw.parts]
    return [corrupt(b, processor, *rates, k) for b, k in zip(batches, keys, strict=True)]


def finish(flags: Flags, world: World, model: Restorer, processor: Processor,
           batches: TokenBatches, log: Log, causal: bool) -> None:
    """Draw the pictures and say what was learned, on the records that would have come next."""
    output, lines, scores = Path(flags.output), log.lines, {}
    tenth = max(1, len(lines) // 10)
    for name in ("mlm_loss", "mae_loss"):
        for when, part in (("first", lines[:tenth]), ("last", lines[-tenth:])):
            scores[f"{name}, {when} tenth"] = sum(line[name] for line in part) / tenth
    # every rank looks at the same records
    batches.rank, batches.world, batches.accumulate, batches.budget = 0, 1, 1, REPORT_TOKENS
    try:
        items = [item for item in next(batches).parts[0] if item[1].grids]
        if items and flags.objective == "restore":
            chosen = flags.text_mask, flags.image_mask, flags.seed, world, causal
            scores |= cross_modal_report(model, processor, items, *chosen)
            shown = [item for item in items if len(item[1].grids) == 1][:8]
            if shown:
                plot_restorations(output / "reconstruction.png", model, processor, shown, *chosen)
    except MocaError as error:  # the model is saved: a record nobody learned from spoils no run
        print(f"no report on unseen records: {error}", flush=True)
    if world.main:
        plot_losses(output / "loss.png", lines, ["loss", "mlm_loss", "mae_loss"])
        write_json(output / "scores.json", scores)
        for name, value in scores.items():
            print(f"{name:>42s}  " + ("nothing was hidden" if value is None else f"{value:.3f}"))
        print(f"{output}: the model is in model/, beside it scores.json and the pictures")


def train(flags: Flags) -> None:
    """The whole of stage 1: build, loop, save, report."""
    world, output = start(flags.device, flags.dtype), Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load(flags, world)
    skipped = None
    if flags.on_error == "skip":
        skipped = output / "skipped.jsonl" if world.main else Path(os.devnull)
    batches = TokenBatches(
        Records(flags.data, flags.seed), processor, flags.batch_tokens, flags.max_tokens,
        flags.seed, world.rank, world.size, flags.accumulate, skipped)
    optimizer = torch.optim.AdamW(
        model.parameters(), flags.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    saved = flags.resume and load_checkpoint(output / "checkpoint", world, model, optimizer)
    done = saved["step"] if saved else 0
    if flags.resume and not saved and world.main:
        print(f"{output} holds no checkpoint: starting anew", flush=True)
    if saved:
        batches.state = saved["data"]
        require_same(saved["flags"], asdict(flags), MAY_CHANGE)
    keep_lines(output / "skipped.jsonl", batches.state["skipped"], world)
    log = Log(output / "log.jsonl", world, flags.steps, done)
    causal = flags.attention == "causal" or flags.objective == "next-token"
    if world.main:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{flags.model} -> {output}: {parameters:,} parameters, steps {done + 1} to "
              f"{flags.steps} of {flags.batch_tokens:,} tokens, {world.size} rank(s) on "
              f"{world.device.type}, products in {world.dtype}, all else in float32, "
              f"attention {'causal' if causal else 'bidirectional'}, seed {flags.seed}", flush=True)

    def draw() -> tuple[Draw, list[Corruption]]:
        drawn = next(batches)
        return drawn, exercises(drawn, processor, flags)

    loader, seen = prefetch(draw), batches.state
    for step in range(done + 1, flags.steps + 1):
        began = time.perf_counter()
        drawn, parts = next(loader)
        seen = drawn.state
        # divided by the counts of the whole step, so neither ranks nor --accumulate change it
        counts = world.total(sum(len(part.labels) for part in parts),
                             sum(len(part.target) for part in parts))
        mlm_count, mae_count = (max(1.0, count) for count in counts)
        loss = partial(masked_reconstruction_loss, mlm_count=mlm_count, mae_count=mae_count)
        mlm_sum = mae_sum = 0.0
        for part in parts:
            mlm, mae = model(part.to(world.device), causal, loss)
            # FSDP averages gradients over the ranks, and ours have to add up
            (world.size * (mlm + flags.mae_weight * mae)).backward()
            mlm_sum, mae_sum = mlm_sum + mlm.item(), mae_sum + mae.item()
        mlm_loss, mae_loss = world.total(mlm_sum, mae_sum)
        grad_norm = clip_gradients(model, flags.clip)
        whole = mlm_loss + flags.mae_weight * mae_loss
        require_finite(step, {"loss": whole, "gradient norm": grad_norm},
                       [source for part in parts for source in part.batch.sources])
        rate = flags.learning_rate * warmup_then_linear(step - 1, flags.steps, flags.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        log.write({"step": step, "loss": whole, "mlm_loss": mlm_loss, "mae_loss": mae_loss,
                   "lr": rate, "grad_norm": grad_norm, "tokens": drawn.tokens,
                   "tokens_per_second": drawn.tokens / (time.perf_counter() - began)})
        if step % flags.save_every == 0 or step == flags.steps:
            state = {"step": step, "data": seen, "flags": asdict(flags)}
            save_checkpoint(output / "checkpoint", world, model, optimizer, state)
    log.bar.close()
    loader.close()  # the draw that was one ahead has not been learned from: take it back
    batches.state = seen
    keep_lines(output / "skipped.jsonl", seen["skipped"], world)
    save_model(output / "model", world, model.vlm, processor)
    finish(flags, world, model, processor, batches, log, causal)


if __name__ == "__main__":
    run(lambda: train(parse_flags(Flags, None, __doc__)))
