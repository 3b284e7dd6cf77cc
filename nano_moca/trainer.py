"""What a training loop needs around it: setting up, the update, the log, the end.

Plain functions, each of which does one thing; the two loops stand in the scripts,
train_cpt.py and train_cl.py, which call them in this order:

    guarded            before all: --plan, or a claim on --output (see plan/)
    open_checkpoint    find the model to start from; its shapes and processor
    skip_list          where unusable records are listed
    make_optimizer     AdamW over all that is trained
    resume             after a break: weights, optimiser and data as they were (plan/resume.py)
    print_plan         one line that says what will be done
    Log                log.jsonl and the progress bar
    at each step       update (clip, learning rate, AdamW), Log.write, save_progress
    close_run          after the last step

The log and the list of skipped records are part of each checkpoint. What an earlier run
left under their names stays until this run has a checkpoint; before, they are written
beside it, as log.jsonl.part and skipped.jsonl.part.

Left out: a Trainer class. What a step computes is in the scripts, and only there.
"""

import json
import math
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from nano_moca.checkpoint import snapshot, write_checkpoint
from nano_moca.config import grow_vocabulary
from nano_moca.distributed import World
from nano_moca.families import load_config
from nano_moca.files import MocaError, first_lines, fresh_folder, one_line, put_text, writing
from nano_moca.flags import CommonFlags
from nano_moca.processor import Processor
from nano_moca.weights import PROCESSOR_FILES, empty_model, find_checkpoint, find_weights

# One thread writes the checkpoints, one at a time; here is the one under way, if any.
WRITER = ThreadPoolExecutor(1)
UNDER_WAY: list[Future] = []


def guarded(train: Callable[[CommonFlags], None]) -> Callable[[CommonFlags], None]:
    """Wrap a script's `train`: with --plan print the estimate and return; else
    claim --output, which no other run may use and none of this run's inputs may lie
    in, and train."""

    @wraps(train)
    def checked(flags: CommonFlags) -> None:
        # Neither is a part of training.
        from nano_moca.plan.claims import claim_output
        from nano_moca.plan.estimate import print_estimate

        if flags.plan:
            return print_estimate(flags)
        with claim_output(flags):
            # Keep the claim until the last checkpoint is written, also after an
            # error.
            try:
                train(flags)
            finally:
                finish_checkpoint()

    return checked


def open_checkpoint(flags: CommonFlags, world: World) -> tuple[Path, nn.Module, Processor]:
    """The folder of the checkpoint that --model names, a model of its shapes, and its
    processor.

    Nothing big is read yet (but a hub id is downloaded): the model has no memory, and its
    weights are known to be there. MocaError says what is missing or not supported.
    """
    folder = find_checkpoint(flags.model)
    config = load_config(folder)
    tools = find_checkpoint(flags.processor, PROCESSOR_FILES) if flags.processor else folder
    processor = Processor.load(tools, config, flags.min_pixels, flags.max_pixels)

    # A new mask token takes a padded row of the embedding, or a new row if none is free.
    vlm = empty_model(grow_vocabulary(config, processor.mask_token))
    find_weights(folder, vlm, flags.allow_extra)
    vlm.set_checkpointing(flags.checkpointing)

    # A batch may hold no image. The vision tower runs all the same: under FSDP all ranks
    # have to run it. One rank alone does so too: AdamW skips weights without any
    # gradient, and one rank would train differently from two.
    vlm.run_vision_always = True

    # With --lora most weights are frozen, and small matrices beside them are trained.
    if flags.lora:
        from nano_moca.lora import add_adapters  # stands beside the road

        add_adapters(vlm, flags.lora, world.dtype)
    return folder, vlm, processor


def make_optimizer(model: nn.Module, learning_rate: float) -> AdamW:
    """AdamW over all that is trained; its moments begin with the first step.

    The second beta is 0.95, as is usual for language models, so that the scale of the
    gradients is followed within tens of steps. (The released code has 0.999, no decay.)
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # On CUDA one kernel for all: else a step takes 4 bytes a parameter more for a moment.
    fused = trained[0].is_cuda
    return AdamW(trained, learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)


def skip_list(flags: CommonFlags, world: World) -> Path | None:
    """The file in which unusable records are listed; None if the first one stops the
    run. All ranks draw the same records: only the main rank's list is kept."""
    if flags.on_error == "stop":
        return None
    return Path(flags.output) / "skipped.jsonl.part" if world.main else Path(os.devnull)


def resume(flags: CommonFlags, world: World, model: nn.Module, optimizer: Optimizer,
           batches: Any) -> dict | None:
    """With --resume, go back to the checkpoint in the output folder, as plan/resume.py says.

    Returns the checkpoint's state, or None for a new run. batches: draws the data. Its
    `state` is a dictionary that says, among others, how many records were "skipped" so far.
    """
    saved = None
    if flags.resume:
        from nano_moca.plan.resume import go_on  # other runs need none of it

        saved = go_on(flags, world, model, optimizer, batches)

    # What was listed after the checkpoint is drawn again; in a new run, everything.
    if world.main:
        skipped = Path(flags.output) / "skipped.jsonl.part"
        put_text(skipped, saved["skipped"] if saved else "")

    # Adapters begin, or go on beside the same frozen weights as before.
    if flags.lora:
        from nano_moca.lora import begin

        batches.state["frozen"] = begin(model, flags.seed, world, saved)
    return saved


def print_plan(flags: CommonFlags, world: World, model: nn.Module, done: int,
               step_contents: str) -> None:
    """One line that says what the run will do, by the main rank.

    done: steps behind us. step_contents: what one step takes, for instance "1,000
    tokens, causal attention".
    """
    if not world.main:
        return

    # Numel of a sharded parameter counts the parts of all ranks.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    plan = (f"{flags.model} -> {Path(flags.output)}: {trained:,} of {parameters:,} parameters "
            f"trained in float32, {done} of {flags.steps} steps done, each {step_contents}, seed "
            f"{flags.seed}, {world.size} rank(s), products on {world.device.type} in {world.dtype}")
    print(one_line(plan), flush=True)


class Log:
    """log.jsonl, one object per step, and a progress bar that shows its losses.

    Every rank keeps the lines; the main rank writes and shows them.
    """

    def __init__(self, path: Path, world: World, steps: int, saved: dict | None) -> None:
        """Open the log of a run of `steps` steps, new (saved None) or resumed.

        saved: the checkpoint's state, of which "log" is read.
        """
        self.lines = list(saved["log"]) if saved else []
        self.path = path if world.main else Path(os.devnull)
        self.lock = Lock()  # the thread that writes checkpoints publishes

        # Steps after the checkpoint will run again: their lines go. A new run's log
        # stands beside an earlier one until there is a checkpoint.
        if world.main:
            part = path.with_name(path.name + ".part")
            part.unlink(missing_ok=True)
            if saved:
                put_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
            elif path.exists():
                self.path = part

        # None is tqdm's word for: shown on a terminal, and not in a file.
        self.bar = tqdm(total=steps, initial=len(self.lines), disable=None if world.main else True,
                        unit="step")

    def write(self, line: dict) -> None:
        """Log one step."""
        # At once, so that nothing is lost in a crash.
        self.lines.append(line)
        with self.lock, writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

        # The bar has room for losses and accuracy.
        names = [name for name in line if "loss" in name or name == "accuracy"]
        shown = [f"{name} {line[name]:.4g}" for name in names]
        self.bar.set_postfix_str(" ".join(shown), refresh=False)
        self.bar.update()

    def publish(self) -> None:
        """Take the place of an earlier run's log: there is a checkpoint now."""
        with self.lock:
            if self.path.suffix == ".part":
                self.path = self.path.replace(self.path.with_suffix(""))


def update(step: int, totals: Tensor, flags: CommonFlags, model: nn.Module,
           optimizer: Optimizer, sources: list[str]) -> tuple[list[float], dict[str, float]]:
    """The end of a step: clip the gradients, move the weights, drop the gradients.

    step: from 1. totals: figures of the step over all ranks, as `World.total` gives
    them, such as its losses. sources: this rank's records of it. Returns the totals
    as numbers, and what else the log says of the step, {"lr", "grad_norm"}.
    MocaError if totals or gradients are not finite; it names the records. The
    weights do not move then, and the last checkpoint is from before the step.
    """
    # The norm over all parameters and ranks, before clipping.
    norm = nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    # Here the host waits for the device, and reads all that it has to know at once.
    *values, grad_norm = torch.cat([totals, norm.view(1)]).tolist()

    # One step with nan would spoil every weight for good.
    named = [("loss", value) for value in values]
    for name, value in [*named, ("gradient norm", grad_norm)]:
        if not math.isfinite(value):
            raise MocaError(f"step {step}: the {name} is {value}; the weights keep their last "
                            f"good state. Lower --learning-rate, or look at the records, "
                            f"{len(sources)} on this rank: {', '.join(sources[:5])}")

    # The schedule counts from 0.
    rate = flags.learning_rate * warmup_then_linear(step - 1, flags.steps, flags.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return values, {"lr": rate, "grad_norm": grad_norm}


def warmup_then_linear(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, counted from 0, as a share of its peak: it rises to 1
    over the first `warmup` of the steps, then falls linearly, to 0 after the last one."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising)


def save_progress(step: int, flags: CommonFlags, world: World, model: nn.Module,
                  optimizer: Optimizer, data_state: dict, log: Log) -> None:
    """Save the checkpoint from which the run can go on after this step.

    Training goes on as soon as a copy is in host memory: a thread writes it. An error of
    that thread is raised here at the next save, or at the end of the run. data_state: from
    which the next step's records are drawn.
    """
    finish_checkpoint()
    output = Path(flags.output)
    skipped = first_lines(output / "skipped.jsonl.part", data_state["skipped"])
    state = {"step": step, "data": data_state, "flags": asdict(flags),
             "log": list(log.lines), "skipped": skipped}
    content = snapshot(world, model, optimizer, state)

    # The main rank makes the new folder, and then all write into it.
    if world.main:
        fresh_folder(output / "checkpoint")
    world.wait()
    UNDER_WAY.append(WRITER.submit(write_progress, output, world, content, log))


def write_progress(output: Path, world: World, content: dict, log: Log) -> None:
    """In the thread: write a snapshot, and what goes with it."""
    # All that an earlier run left stays until the checkpoint stands under its name.
    write_checkpoint(output / "checkpoint", world, content)
    if world.main:
        log.publish()
        put_text(output / "skipped.jsonl", content["state"]["skipped"])


def finish_checkpoint() -> None:
    """Return when no checkpoint is under way. MocaError if it could not be written."""
    while UNDER_WAY:
        UNDER_WAY.pop().result()


def close_run(flags: CommonFlags, world: World, log: Log, loader: Generator, data_state: dict,
              vlm: nn.Module) -> None:
    """After the last step: close log and loader, wait for the last checkpoint, merge
    adapters into their weights, and say how much was skipped.

    loader: drew the steps, in a thread. data_state: after the last step. vlm: what will be
    saved.
    """
    log.bar.close()
    finish_checkpoint()
    if flags.lora:
        from nano_moca.lora import merge_adapters

        merge_adapters(vlm)

    # The list of what was skipped is as long as it was after the last step.
    loader.close()
    skipped = data_state["skipped"]
    if world.main:
        part = Path(flags.output) / "skipped.jsonl.part"
        put_text(part.with_suffix(""), first_lines(part, skipped))
        part.unlink(missing_ok=True)
        if skipped:
            print(f"{skipped} times a record could not be used: see skipped.jsonl", flush=True)
