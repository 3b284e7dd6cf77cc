"""Stage 1 of MoCa: modality-aware continual pre-training. Run with `torchrun train_cpt.py` (or python).

A causal vision-language model is made bidirectional and learns to restore hidden words and hidden image patches:

    loss = MLM + mae_weight * MAE        (section 3.1; the paper's best weight is 0.5, the released script says 0.1)

With no flags it starts from the nano base in this repository and the embedded data, and takes minutes on a laptop.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nano_moca.config import load_config
from nano_moca.data import Draw, Records, TokenBatches
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import Corruption, corrupt, next_token
from nano_moca.model import Restorer
from nano_moca.processor import Processor
from nano_moca.report import cross_modal_report, plot_restorations
from nano_moca.trainer import (Log, Skipped, World, clip_gradients, flag, load_checkpoint, parse_flags, plot_losses, prefetch,
                               require_finite, run, save_checkpoint, save_model, shard, start, warmup_then_linear)
from nano_moca.weights import build, find_checkpoint

REPORT_TOKENS = 8192  # of unseen records, for the report at the end
BASE = Path(__file__).parent / "nano_moca" / "base"


@dataclass
class Flags:
    """What can be chosen. The defaults are the embedded default's; the README has the recipes for 3B and 7B."""

    model: str = flag(str(BASE), "checkpoint to start from: a folder or a hub id")
    data: str = flag("builtin", ".jsonl or .parquet file, or a folder of them")
    output: str = flag("runs/cpt", "folder for log, checkpoint, model and pictures")
    steps: int = flag(900, "optimiser steps", low=1)
    batch_tokens: int = flag(2300, "tokens a step over all ranks", low=1)
    max_tokens: int = flag(1280, "a record's limit; longer texts are shortened", low=8)
    accumulate: int = flag(1, "micro-batches a step on each rank", low=1)
    objective: str = flag("restore", "restore what is hidden, or the causal control", choices=("restore", "next-token"))
    text_mask: float = flag(0.4, "share of text tokens hidden; 0 turns MLM off", low=0, high=1)
    image_mask: float = flag(0.5, "share of patch groups hidden; 0 turns MAE off", low=0, high=1)
    mae_weight: float = flag(0.5, "weight of the patch loss; 0 turns MAE off", low=0)
    attention: str = flag("bidirectional", "the decoder's attention", choices=("bidirectional", "causal"))
    learning_rate: float = flag(1e-3, "peak learning rate; for 3B and 7B 2e-6", low=0)
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises", low=0, high=1)
    clip: float = flag(5.0, "largest gradient norm", low=0)
    seed: int = flag(0, "of order, masks and new weights", low=0)
    device: str = flag(None, "cpu or cuda (default: cuda if there is one)", choices=("cpu", "cuda"))
    dtype: str = flag(None, "of matrix products (default: bfloat16 on cuda)", choices=("float32", "bfloat16"))
    checkpointing: bool = flag(False, "recompute activations in backward to save memory")
    save_every: int = flag(100, "steps between checkpoints", low=1)
    resume: bool = flag(False, "go on from the checkpoint in --output")
    on_error: str = flag("stop", "what a record that cannot be used does", choices=("stop", "skip"))


def load(flags: Flags, world: World) -> tuple[Restorer, Processor]:
    """The checkpoint as a `Restorer` in float32, sharded if there are ranks to share it, with its processor."""
    folder = find_checkpoint(flags.model)
    config = load_config(folder)
    processor = Processor.load(folder, config)
    if processor.mask_token >= config.vocabulary:  # no padded row is free: grow
        config = replace(config, vocabulary=processor.mask_token + 1)
    prepare = lambda vlm: shard(Restorer(vlm), vlm, world)  # noqa: E731
    mask_row = processor.mask_token if processor.mask_is_new else None
    model = build(folder, config, world.device, torch.float32, prepare, mask_row)
    model.patch_decoder.start_from(model.vlm.language, flags.seed)
    model.vlm.language.checkpointing = flags.checkpointing
    return model, processor


def exercises(draw: Draw, processor: Processor, flags: Flags) -> list[Corruption]:
    """One corrupted micro-batch for each part of this rank's draw; what is hidden follows from seed and record."""
    batches = [processor.pack([item for _, item in part]) for part in draw.parts]
    if flags.objective == "next-token":
        return [next_token(batch, processor) for batch in batches]
    image_rate = flags.image_mask if flags.mae_weight else 0.0
    return [corrupt(batch, processor, flags.text_mask, image_rate, [(flags.seed, key) for key, _ in part])
            for batch, part in zip(batches, draw.parts, strict=True)]


def finish(flags: Flags, world: World, model: Restorer, processor: Processor, batches: TokenBatches,
           log: Log) -> None:
    """Draw the pictures and say what was learned, on the records that would have come next."""
    output, shown = Path(flags.output), ["loss", "mlm_loss", "mae_loss"]
    if world.main:
        plot_losses(output / "loss.png", log.lines, shown)
    tenth = max(1, len(log.lines) // 10)
    mean = lambda lines, name: sum(line[name] for line in lines) / len(lines)  # noqa: E731
    scores = {f"{name}, {which} tenth": mean(lines, name) for name in shown
              for which, lines in (("first", log.lines[:tenth]), ("last", log.lines[-tenth:]))}
    if flags.objective == "restore":
        batches.accumulate, batches.world, batches.rank = 1, 1, 0  # every rank looks at the same records
        batches.budget = REPORT_TOKENS
        items = [item for item in next(batches).parts[0] if item[1].grids]
        rates = flags.text_mask, flags.image_mask
        if items:
            scores |= cross_modal_report(model, processor, items, rates, flags.seed, world)
            plot_restorations(output / "reconstruction.png", model, processor, items[:8], rates, flags.seed, world)
    if world.main:
        (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        print("\n".join(f"{name:>40s} {value:8.3f}" for name, value in scores.items() if value is not None))
        print(f"{output}: the model is in model/, the pictures are loss.png and reconstruction.png")


def train(flags: Flags) -> None:
    """The whole of stage 1: build, loop, save, report."""
    world = start(flags.device, flags.dtype, flags.seed)
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load(flags, world)
    causal = flags.attention == "causal" or flags.objective == "next-token"
    skipped = Skipped(output / "skipped.jsonl", world) if flags.on_error == "skip" else None
    batches = TokenBatches(Records(flags.data, flags.seed), processor, flags.batch_tokens, flags.max_tokens,
                           flags.seed, world.rank, world.size, flags.accumulate, skipped)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    resumed = load_checkpoint(output / "checkpoint", world, model, optimizer) if flags.resume else None
    done, batches.state = (resumed["step"], resumed["data"]) if resumed else (0, batches.state)
    log = Log(output / "log.jsonl", world, flags.steps, done)
    if world.main:
        print(f"{flags.model} -> {output}: {sum(p.numel() for p in model.parameters()):,} parameters, steps "
              f"{done + 1} to {flags.steps} of {flags.batch_tokens:,} tokens, {world.size} rank(s) on "
              f"{world.device.type}, products in {world.dtype}, the rest in float32, seed {flags.seed}", flush=True)

    def draw() -> tuple[Draw, list[Corruption]]:
        drawn = next(batches)
        return drawn, exercises(drawn, processor, flags)

    loader = prefetch(draw)
    for step in range(done + 1, flags.steps + 1):
        began = time.perf_counter()
        drawn, parts = next(loader)
        # divide by the counts of the whole step: then neither ranks nor --accumulate change the gradient
        text_count, group_count = world.total(sum(len(part.labels) for part in parts),
                                              sum(len(part.target) for part in parts))
        loss = partial(masked_reconstruction_loss, mlm_count=max(1, text_count), mae_count=max(1, group_count))
        mlm_sum = mae_sum = 0.0
        for part in parts:
            mlm, mae = model(part.to(world.device), causal, loss)
            # FSDP averages gradients over the ranks, and ours have to add up
            (world.size * (mlm + flags.mae_weight * mae)).backward()
            mlm_sum, mae_sum = mlm_sum + mlm.item(), mae_sum + mae.item()
        mlm_loss, mae_loss = world.total(mlm_sum, mae_sum)
        grad_norm = clip_gradients(model, flags.clip)
        total = mlm_loss + flags.mae_weight * mae_loss
        require_finite(step, {"loss": total, "gradient norm": grad_norm},
                       [source for part in parts for source in part.batch.sources])
        for group in optimizer.param_groups:
            group["lr"] = flags.learning_rate * warmup_then_linear(step - 1, flags.steps, flags.warmup)
        optimizer.step()
        optimizer.zero_grad()
        log.write({"step": step, "loss": total, "mlm_loss": mlm_loss, "mae_loss": mae_loss,
                   "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm, "tokens": drawn.tokens,
                   "tokens_per_second": round(drawn.tokens / (time.perf_counter() - began))})
        if step % flags.save_every == 0 or step == flags.steps:
            state = {"step": step, "data": drawn.state, "flags": asdict(flags)}
            save_checkpoint(output / "checkpoint", world, model, optimizer, state)
    log.bar.close()
    save_model(output / "model", world, model.vlm, processor)
    finish(flags, world, model, processor, batches, log)


if __name__ == "__main__":
    run(lambda: train(parse_flags(Flags, None, __doc__)))
