"""Stage 1 of MoCa: modality-aware continual pre-training. `torchrun train_cpt.py`, or with python.

A causal vision-language model is made bidirectional and learns to reconstruct masked tokens (masked
language modelling, MLM) and masked image patches (masked autoencoding, MAE):

    loss = MLM + mae_weight * MAE     (section 3.1; 0.5 is best in the paper, its script has 0.1)

Without flags it starts from the nano base and the built-in data, and takes minutes on a laptop.
`--objective next-token` is the control: the same data under the causal next-token loss.
"""

import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nano_moca.config import MocaError, write_json
from nano_moca.data import Draw, TokenBatches, load_records
from nano_moca.losses import masked_reconstruction_loss
from nano_moca.masking import Corruption, corrupt, next_token
from nano_moca.model import Restorer
from nano_moca.processor import Processor
from nano_moca.report import cross_modal_report, plot_restorations
from nano_moca.trainer import (
    CommonFlags, World, begin, end, flag, load_model, parse_flags, plot_losses, prefetch, run,
    save_step, skip_list, start, update,
)

REPORT_TOKENS = 8192  # of unseen records, for the report at the end


@dataclass
class Flags(CommonFlags):
    """Stage 1's own flags, beside those that both scripts have. The README has recipes for 3B."""

    batch_tokens: int = flag(1000, "tokens per step over all ranks", low=1)
    max_tokens: int = flag(1280, "a record's limit; longer texts are shortened", low=8)
    accumulate: int = flag(1, "micro-batches per step on each rank", low=1)
    objective: str = flag("restore", "training objective", choices=("restore", "next-token"))
    text_mask: float = flag(0.4, "share of text tokens masked; 0 turns MLM off", low=0, high=1)
    image_mask: float = flag(0.5, "share of patch groups masked; 0 turns MAE off", low=0, high=1)
    mae_weight: float = flag(0.5, "weight of the patch loss; 0 turns MAE off", low=0)


def micro_batches(draw: Draw, processor: Processor, flags: Flags) -> list[Corruption]:
    """One corrupted micro-batch per part of the draw; seed and record decide what is masked."""
    batches = [processor.pack([item for _, item in part]) for part in draw.parts]
    if flags.objective == "next-token":
        return [next_token(batch, processor) for batch in batches]
    rates = flags.text_mask, flags.image_mask
    keys = [[(flags.seed, number) for number, _ in part] for part in draw.parts]
    return [corrupt(b, processor, *rates, k) for b, k in zip(batches, keys, strict=True)]


def finish(flags: Flags, world: World, model: Restorer, processor: Processor,
           batches: TokenBatches, lines: list[dict], causal: bool) -> None:
    """Draw the pictures and say what was learned, on the records that would have come next."""
    output, tenth = Path(flags.output), max(1, len(lines) // 10)
    parts = {"first": lines[:tenth], "last": lines[-tenth:]}
    scores = {f"{name}, {when} tenth": sum(line[name] for line in part) / tenth
              for name in ("mlm_loss", "mae_loss") for when, part in parts.items()}
    # every rank draws the same records; unusable ones are not listed, since no step used them
    batches.skipped = batches.skipped and Path(os.devnull)
    batches.rank, batches.world, batches.accumulate, batches.budget = 0, 1, 1, REPORT_TOKENS
    try:
        items = [item for item in next(batches).parts[0] if item[1].grids]
        if items and flags.objective == "restore":
            scores |= cross_modal_report(model, processor, items, flags, world, causal)
            shown = [item for item in items if len(item[1].grids) == 1][:8]
            if shown:
                path = output / "reconstruction.png"
                plot_restorations(path, model, processor, shown, flags, world, causal)
    except MocaError as error:  # the model is saved already: a bad record only costs the report
        print(f"no report on unseen records: {error}", flush=True)
    if world.main:
        plot_losses(output / "loss.png", lines, ["loss", "mlm_loss", "mae_loss"])
        write_json(output / "scores.json", scores)
        for name, value in scores.items():
            print(f"{name:>42s}  " + ("not measured" if value is None else f"{value:.3f}"))
        print(f"{output}: the model is in model/, beside it scores.json and the pictures")


def train(flags: Flags) -> None:
    """The whole of stage 1: build, loop, save, report."""
    if not flags.mae_weight:
        flags = replace(flags, image_mask=0.0)  # a patch that counts nothing need not be hidden
    if flags.objective == "restore" and not flags.text_mask and not flags.image_mask:
        raise MocaError("nothing is masked, so there is nothing to learn: raise --text-mask, or "
                        "--image-mask and --mae-weight")
    world = start(flags.device, flags.dtype)
    model, processor = load_model(flags, world, Restorer)
    model.patch_decoder.start_from(model.vlm.language, flags.seed)
    batches = TokenBatches(
        load_records(flags.data, flags.seed), processor, flags.batch_tokens, flags.max_tokens,
        flags.seed, world.rank, world.size, flags.accumulate, skip_list(flags, world))
    causal = flags.attention == "causal" or flags.objective == "next-token"
    attention = "causal" if causal else "bidirectional"
    model.vlm.config.raw["nano_moca"] = {"attention": attention}  # saved with the model
    about = f"{flags.batch_tokens:,} tokens, {attention} attention"
    optimizer, log, done = begin(flags, world, model, batches, about)

    def draw() -> tuple[Draw, list[Corruption]]:
        drawn = next(batches)
        return drawn, micro_batches(drawn, processor, flags)

    loader, seen = prefetch(draw), batches.state
    for step in range(done + 1, flags.steps + 1):
        began = time.perf_counter()
        drawn, parts = next(loader)
        seen = drawn.state
        # divided by the counts of the whole step, so neither ranks nor --accumulate change it
        mlm_count, mae_count = world.total(sum(len(part.labels) for part in parts),
                                           sum(len(part.target) for part in parts))
        loss = partial(masked_reconstruction_loss, mlm_count=mlm_count, mae_count=mae_count)
        mlm_sum = mae_sum = 0.0
        for part in parts:
            mlm, mae = model(part.to(world.device), causal, loss)
            # FSDP averages gradients over the ranks, and ours have to add up
            (world.size * (mlm + flags.mae_weight * mae)).backward()
            mlm_sum, mae_sum = mlm_sum + mlm.item(), mae_sum + mae.item()
        mlm_loss, mae_loss = world.total(mlm_sum, mae_sum)
        whole = mlm_loss + flags.mae_weight * mae_loss
        sources = [source for part in parts for source in part.batch.sources]
        moved = update(step, whole, flags, model, optimizer, sources)
        log.write({"step": step, "loss": whole, "mlm_loss": mlm_loss, "mae_loss": mae_loss, **moved,
                   "tokens": drawn.tokens,
                   "tokens_per_second": drawn.tokens / (time.perf_counter() - began)})
        save_step(step, flags, world, model, optimizer, seen, log)
    end(flags, world, model.vlm, processor, log, loader, seen)
    batches.state = seen
    finish(flags, world, model, processor, batches, log.lines, causal)


if __name__ == "__main__":
    run(lambda: train(parse_flags(Flags, None, __doc__)))
