"""What a training loop needs around it: setting up, the update, the log, the end.

Plain functions, each of which does one thing; the two loops stand in the scripts,
train_cpt.py and train_cl.py, which call them in this order:

    guarded            looks first at what the run may touch
    open_checkpoint    find the model to start from; its config and processor
    skip_list          where unusable records are listed
    make_optimizer     AdamW over all parameters
    resume             after a break: weights, optimiser and data as they were
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
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from nano_moca.checkpoint import load_checkpoint, save_checkpoint
from nano_moca.config import Config, grow_vocabulary
from nano_moca.distributed import World
from nano_moca.families import load_config
from nano_moca.files import MocaError, first_lines, one_line, put_text, writing
from nano_moca.flags import CommonFlags
from nano_moca.processor import Processor
from nano_moca.weights import PROCESSOR_FILES, find_checkpoint


def guarded(train: Callable[[CommonFlags], None]) -> Callable[[CommonFlags], None]:
    """A script's `train`, behind the checks of plan.py: one run an --output, and over
    nothing that it reads."""

    @wraps(train)
    def checked(flags: CommonFlags) -> None:
        if flags.plan:
            from nano_moca.estimate import print_estimate  # computed; nothing is trained

            return print_estimate(flags)
        from nano_moca.plan import claim_output  # what may go wrong there is no part of training

        with claim_output(flags):
            train(flags)

    return checked


def open_checkpoint(flags: CommonFlags) -> tuple[Path, Config, Processor]:
    """The folder of the checkpoint that --model names, its config and its processor.

    Nothing big is read yet (but a hub id is downloaded). MocaError says what is missing
    or not supported.
    """
    folder = find_checkpoint(flags.model)
    config = load_config(folder)
    tools = find_checkpoint(flags.processor, PROCESSOR_FILES) if flags.processor else folder
    processor = Processor.load(tools, config, flags.min_pixels, flags.max_pixels)

    # A new mask token takes a padded row of the embedding, or a new row if none is free.
    return folder, grow_vocabulary(config, processor.mask_token), processor


def make_optimizer(model: nn.Module, learning_rate: float) -> AdamW:
    """AdamW over all parameters; its moments begin with the first step.

    The second beta is 0.95, as is usual for language models, so that the scale of the
    gradients is followed within tens of steps. (The released code has 0.999, no decay.)
    """
    return AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.01)


def skip_list(flags: CommonFlags, world: World) -> Path | None:
    """The file in which unusable records are listed; None if the first one stops the
    run. All ranks draw the same records: only the main rank's list is kept."""
    if flags.on_error == "stop":
        return None
    return Path(flags.output) / "skipped.jsonl.part" if world.main else Path(os.devnull)


def resume(flags: CommonFlags, world: World, model: nn.Module, optimizer: Optimizer,
           batches: Any) -> dict | None:
    """With --resume, go back to the checkpoint in the output folder.

    Returns the checkpoint's state, or None for a new run. Then model, optimiser and
    batches are as they were when it was saved. MocaError if flags or data differ from
    those of the run that saved it, or a part of it is missing.

    batches: draws the data. Its `state` is a dictionary that says, among others, how
    many "records" the data holds, their "fingerprint", and how many were "skipped" so far.
    """
    # With --resume and no checkpoint yet, a run begins: one command serves for both.
    output = Path(flags.output)
    place = output / "checkpoint"
    saved = load_checkpoint(place, world, model, optimizer) if flags.resume else None
    if flags.resume and saved is None and world.main:
        print(f"{one_line(output)} holds no checkpoint: starting anew", flush=True)

    # Other flags or other data would end in what is neither the old run nor a new one.
    if saved is not None:
        from nano_moca.plan import check_same_run

        check_same_run(flags, saved, batches.state)
        batches.state |= saved["data"]
        before = saved["flags"].get("steps")
        if before != flags.steps and world.main:
            print(f"--steps was {before} and is {flags.steps}: so is the schedule", flush=True)

    # What was listed after the checkpoint is drawn again; in a new run, everything.
    if world.main:
        put_text(output / "skipped.jsonl.part", saved["skipped"] if saved else "")
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
    plan = (f"{flags.model} -> {Path(flags.output)}: {parameters:,} parameters, {done} of "
            f"{flags.steps} steps done, each of {step_contents}, {world.size} rank(s), products on "
            f"{world.device.type} in {world.dtype}, weights in float32, seed {flags.seed}")
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
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

        # The bar has room for losses and accuracy.
        names = [name for name in line if "loss" in name or name == "accuracy"]
        shown = [f"{name} {line[name]:.4g}" for name in names]
        self.bar.set_postfix_str(" ".join(shown), refresh=False)
        self.bar.update()

    def publish(self) -> None:
        """Take the place of an earlier run's log: there is a checkpoint now."""
        if self.path.suffix == ".part":
            self.path = self.path.replace(self.path.with_suffix(""))


def update(step: int, loss: float, flags: CommonFlags, model: nn.Module, optimizer: Optimizer,
           sources: list[str]) -> dict[str, float]:
    """The end of a step: clip the gradients, move the weights, drop the gradients.

    step: from 1. loss: of the step over all ranks. sources: this rank's records of it.
    Returns what the log says of the step, {"lr", "grad_norm"}. MocaError if loss or
    gradients are not finite; it names the records. The weights do not move then, and the
    last checkpoint is from before the step.
    """
    # The norm over all parameters and ranks, before clipping.
    norm = nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # One step with nan would spoil every weight for good.
    for name, value in (("loss", loss), ("gradient norm", norm)):
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
    return {"lr": rate, "grad_norm": norm}


def warmup_then_linear(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, counted from 0, as a share of its peak: it rises to 1
    over the first `warmup` of the steps, then falls linearly, to 0 after the last one."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


def save_progress(step: int, flags: CommonFlags, world: World, model: nn.Module,
                  optimizer: Optimizer, data_state: dict, log: Log) -> None:
    """Save the checkpoint from which the run can go on after this step.

    data_state: from which the next step's records are drawn.
    """
    # All that an earlier run left stays until the checkpoint stands under its name.
    output = Path(flags.output)
    skipped = first_lines(output / "skipped.jsonl.part", data_state["skipped"])
    state = {"step": step, "data": data_state, "flags": asdict(flags),
             "log": log.lines, "skipped": skipped}
    save_checkpoint(output / "checkpoint", world, model, optimizer, state)
    if world.main:
        log.publish()
        put_text(output / "skipped.jsonl", skipped)


def close_run(flags: CommonFlags, world: World, log: Log, loader: Generator,
              data_state: dict) -> None:
    """After the last step: close log and loader, and say how much was skipped.

    loader: draws one step ahead, in a thread. data_state: after the last step.
    """
    log.bar.close()

    # Nothing was learned from the step drawn ahead: take back what it listed as skipped.
    loader.close()
    skipped = data_state["skipped"]
    if world.main:
        part = Path(flags.output) / "skipped.jsonl.part"
        put_text(part.with_suffix(""), first_lines(part, skipped))
        part.unlink(missing_ok=True)
        if skipped:
            print(f"{skipped} times a record could not be used: see skipped.jsonl", flush=True)
