"""Stage 1 of MoCa: modality-aware continual pre-training (`torchrun train_cpt.py`).

A causal vision-language model is made bidirectional and learns to restore masked
tokens (masked language modelling, MLM) and masked image patches (masked
autoencoding, MAE):

    loss = MLM + mae_weight * MAE     (section 3.1)

The paper's best weight is 0.5; the released script has 0.1 (scripts/cpt_train.sh:56). Here
it is 5: AdamW divides a step by the size of the gradient, and at 0.5 the miniature's steps
are MLM's alone (notebook 3 measures that, LOG.md what it costs).

Without flags it starts from the nano base and the built-in data, and takes minutes on a
laptop. `--objective next-token` is the control: the same data under the causal next-token
loss. The letters of all shapes stand in nano_moca/__init__.py.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nano_moca.batches import StepRecords, TokenBatches, prefetch
from nano_moca.data import load_records
from nano_moca.distributed import World, init_distributed, shard
from nano_moca.files import MocaError
from nano_moca.flags import CommonFlags, flag, main_guard, parse_flags
from nano_moca.masking import MaskedBatch, mask_batch, next_token_batch
from nano_moca.model import ReconstructionModel
from nano_moca.processor import Processor
from nano_moca.trainer import (Log, close_run, guarded, make_optimizer, open_checkpoint,
                               print_plan, resume, save_progress, skip_list, update)
from nano_moca.weights import load_weights

FIRST_LOOK = 500  # steps until the first pictures


@dataclass
class Flags(CommonFlags):
    """Stage 1's own flags. Those that both scripts have, such as --steps,
    --learning-rate and --attention, are in nano_moca/flags.py.
    docs/real_models.md has recipes for 3B."""

    batch_tokens: int = flag(1000, "tokens per step over all ranks", low=1)
    max_tokens: int = flag(1280, "a record's limit; longer texts are shortened", low=8)
    accumulate: int = flag(1, "micro-batches per step on each rank", low=1, high=100_000)
    objective: str = flag("restore", "training objective", choices=("restore", "next-token"))
    text_mask: float = flag(0.4, "share of text tokens masked; 0 turns MLM off", low=0, high=1)
    unhidden: float = flag(0.2, "u: of the masked tokens a share u keeps its word, "
                           "another u shows a random one; MoCa: 0, BERT: 0.1", low=0, high=0.5)
    image_mask: float = flag(0.5, "share of patch groups masked; 0 turns MAE off", low=0, high=1)
    mae_weight: float = flag(5.0, "weight of the patch loss; MoCa: 0.5; 0: no MAE", low=0, high=1e4)


def masked_steps(batches: TokenBatches, processor: Processor, flags: Flags, world: World
                 ) -> Iterator[tuple[StepRecords, list[MaskedBatch]]]:
    """Draw, pack, mask and send to the device: each step's records for this rank, and its
    micro-batches."""
    for drawn in batches:
        micro_batches = []
        for numbered in drawn.micro_batches:
            batch = processor.pack([record for _, record in numbered])

            # The seed and a record's number in the run decide what of it is masked: the
            # next epoch masks something else.
            keys = [(flags.seed, number) for number, _ in numbered]
            if flags.objective == "next-token":
                masked = next_token_batch(batch, processor)
            else:
                masked = mask_batch(batch, processor, flags.text_mask, flags.image_mask, keys,
                                    flags.unhidden)
            micro_batches.append(masked.to(world.device))
        yield drawn, micro_batches


def is_causal(flags: Flags) -> bool:
    """Whether the decoder attends causally: the next-token loss has no other way."""
    return flags.attention == "causal" or flags.objective == "next-token"


def draw_report(flags: Flags, world: World, model: ReconstructionModel, processor: Processor,
                batches: TokenBatches, data_state: dict, log: Log) -> None:
    """Pictures and scores of what was learned, on the records that would come next: on all
    ranks the same."""
    from nano_moca.report import stage1  # imported here: training needs none of it

    # A sampler and a state of its own. What it cannot use it lists nowhere: no step
    # drew it.
    unlisted = Path(os.devnull) if batches.skipped else None
    unseen = TokenBatches(batches.records, processor, stage1.REPORT_TOKENS, flags.max_tokens,
                          flags.seed, skipped=unlisted, state=dict(data_state))
    stage1.write_report(flags, world, model, processor, unseen, log.lines, is_causal(flags))


@guarded  # --plan: only print an estimate; else: --output is this run's alone
def train(flags: Flags) -> None:
    """The whole of stage 1: build, loop, save, report."""
    # An ablation turns a loss off by masking nothing for it. A patch that counts
    # nothing need not be masked either.
    if not flags.mae_weight:
        flags = replace(flags, image_mask=0.0)
    if flags.objective == "restore" and not flags.text_mask and not flags.image_mask:
        raise MocaError("nothing is masked, so there is nothing to learn: raise --text-mask, or "
                        "--image-mask and --mae-weight")
    causal = is_causal(flags)
    attention = "causal" if causal else "bidirectional"
    output = Path(flags.output)

    # The model: shapes without memory at first. `shard` gives each rank memory for its
    # part of every block, and of the root, which is all that is in no block.
    world = init_distributed(flags.device, flags.dtype)
    folder, vlm, processor = open_checkpoint(flags, world)
    model = ReconstructionModel(vlm)
    shard(model, [*vlm.visual.blocks, *vlm.language.layers], world)
    load_weights(vlm, folder, processor.new_mask_token, flags.allow_extra)
    model.patch_decoder.init_from(vlm.language, flags.seed)

    # The data: every rank draws the same records, and takes its share of each step.
    records = load_records(flags.data, flags.seed, flags.cap)
    skipped = skip_list(flags, world)
    batches = TokenBatches(
        records, processor, flags.batch_tokens, flags.max_tokens, flags.seed,
        rank=world.rank, world_size=world.size, accumulate=flags.accumulate, skipped=skipped)

    # Begin, or go on where the checkpoint in --output was written.
    optimizer = make_optimizer(model, flags.learning_rate)
    saved = resume(flags, world, model, optimizer, batches)
    done = saved["step"] if saved else 0
    contents = f"{flags.batch_tokens:,} tokens, {attention} attention"
    print_plan(flags, world, model, done, contents)
    log = Log(output / "log.jsonl", world, flags.steps, saved)

    # `batches` is a step ahead of what was learned: `data_state` says where to go on.
    data_state = batches.state
    loader = prefetch(masked_steps(batches, processor, flags, world), flags.steps - done)
    for step in range(done + 1, flags.steps + 1):
        started = time.perf_counter()

        # 1. This rank's records, packed and masked, in micro-batches.
        drawn, micro_batches = next(loader)
        data_state = drawn.state

        # 2. What the losses are divided by: the masked tokens and groups of the whole step,
        #    so that neither the number of ranks nor --accumulate, which cut the step into
        #    more and smaller parts, change it. The host waits for the other ranks' counts.
        masked_tokens = sum(len(masked.labels) for masked in micro_batches)
        masked_groups = sum(len(masked.group_index) for masked in micro_batches)
        mlm_count, mae_count = world.total(masked_tokens, masked_groups).tolist()

        # 3. Forward and backward. FSDP averages the gradients of the ranks, and ours have to
        #    add up: hence the factor. The sums stay on the device: to read one is to wait.
        mlm_sum = 0.0
        mae_sum = 0.0
        for masked in micro_batches:
            mlm, mae = model(masked, causal, mlm_count, mae_count)
            loss = mlm + flags.mae_weight * mae
            (world.size * loss).backward()
            mlm_sum += mlm.detach().double()
            mae_sum += mae.detach().double()

        # 4. Clip the gradients; read norm and losses, of the whole step over all ranks; stop if
        #    one is not finite, and name the step's records; set this step's learning rate;
        #    AdamW's step; drop the gradients.
        sources = sum((masked.batch.sources for masked in micro_batches), [])
        losses = world.total(mlm_sum, mae_sum)
        (mlm_loss, mae_loss), figures = update(step, losses, flags, model, optimizer, sources)
        step_loss = mlm_loss + flags.mae_weight * mae_loss

        # 5. Every rank saves its part of the checkpoint, the main rank writes the log.
        seconds = time.perf_counter() - started
        log.write({"step": step, "loss": step_loss, "mlm_loss": mlm_loss,
                   "mae_loss": mae_loss, **figures, "tokens": drawn.tokens,
                   "tokens_per_second": drawn.tokens / seconds})
        if step % flags.save_every == 0 or step == flags.steps:
            save_progress(step, flags, world, model, optimizer, data_state, log)

        # 6. A first look at what is learned, long before the end.
        if step == FIRST_LOOK < flags.steps and not flags.no_report:
            draw_report(flags, world, model, processor, batches, data_state, log)

    close_run(flags, world, log, loader, data_state, vlm)

    # The model, as others read it.
    from nano_moca.convert.export import save_model  # stands beside the road

    save_model(output / "model", world, vlm, processor,
               {"attention": attention, "max_tokens": flags.max_tokens})

    # What was learned.
    if not flags.no_report:
        draw_report(flags, world, model, processor, batches, data_state, log)


if __name__ == "__main__":
    main_guard(lambda: train(parse_flags(Flags, None, __doc__)))
