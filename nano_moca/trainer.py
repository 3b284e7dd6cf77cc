"""What both training loops need around them: flags, processes, sharding, checkpoints, log, picture.

Plain functions; the loops themselves stand in train_cpt.py and train_cl.py. In the order in which a
script needs them: `start`, `load_model`, `begin`, then at each step `prefetch`, `update` and
`save_step`, and `end` and `plot_losses`. The precision policy, in one place: master weights, summed
gradients and optimiser state are float32; matrix products run in `--dtype` (bfloat16 on CUDA);
norms, softmax and losses are computed in float32 whatever the dtype.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nano_moca.config import BASE, MocaError, load_config
from nano_moca.model import VLM
from nano_moca.processor import Processor
from nano_moca.weights import (
    build, find_checkpoint, find_folder, fresh_folder, replace_folder, save_weights, stored_dtype,
    writing,
)

# flags that may differ on --resume, since they change nothing that is computed
MAY_CHANGE = "output steps save_every resume device checkpointing on_error held_out".split()


def flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf,
         choices: tuple[str, ...] | None = None) -> Any:
    """A field of a flags dataclass: default, help text, and the values that make sense."""
    return dataclasses.field(default=default, metadata=locals())


class Parser(argparse.ArgumentParser):
    """An unknown flag or an impossible value is one line and exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


@dataclass
class CommonFlags:
    """Flags of both scripts. Defaults are for the built-in data on a CPU; a script may change
    them."""

    model: str = flag(str(BASE), "checkpoint to start from: a folder or a hub id")
    data: str = flag("builtin", ".jsonl or .parquet file, or a folder of them")
    output: str = flag("runs/cpt", "folder for log, checkpoint, model and pictures")
    steps: int = flag(1000, "optimiser steps", low=1)
    min_pixels: int = flag(None, "smallest image area in pixels (default: the checkpoint's)")
    max_pixels: int = flag(None, "largest image area in pixels (default: the checkpoint's)")
    attention: str = flag("bidirectional", "of the decoder", choices=("bidirectional", "causal"))
    learning_rate: float = flag(2e-3, "peak value; 2e-6 for 3B and 7B", low=0, high=1)
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises", low=0, high=1)
    clip: float = flag(5.0, "largest gradient norm; inf for no limit", low=1e-9)
    seed: int = flag(0, "for data order, masks and new weights", low=0, high=2**63 - 1)
    device: str = flag(None, "default: cuda if there is one", choices=("cpu", "cuda"))
    dtype: str = flag(None, "default: bfloat16 on cuda", choices=("float32", "bfloat16"))
    checkpointing: bool = flag(False, "recompute activations in backward to save memory")
    save_every: int = flag(100, "steps between checkpoints", low=1)
    resume: bool = flag(False, "continue from the checkpoint in --output")
    on_error: str = flag("stop", "what to do with an unusable record", choices=("stop", "skip"))


def parse_flags(kind: type, argv: list[str] | None, description: str) -> Any:
    """Fill a flags dataclass from the command line (argv None) or a list of words."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {field.name: "--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):
        value = (dict(action="store_true") if field.type is bool else
                 dict(type=field.type, choices=field.metadata["choices"]))
        silent = field.default is None or field.type is bool
        about = field.metadata["help"] + ("" if silent else " (default: %(default)s)")
        parser.add_argument(names[field.name], default=field.default, help=about, **value)
    flags = parser.parse_args(argv)
    for field in dataclasses.fields(kind):
        value, low, high = getattr(flags, field.name), field.metadata["low"], field.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:  # nan is refused too
            parser.error(f"{names[field.name]} {value} is not from {low} to {high}")
    return kind(**vars(flags))


@dataclass(frozen=True)
class World:
    """This process among the ranks that torchrun started (one, without torchrun)."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """FSDP2 for more than one rank, and for products in another dtype than the weights'."""
        return self.size > 1 or self.dtype != torch.float32

    def total(self, *amounts: float) -> list[float]:
        """Sums over all ranks."""
        sums = torch.tensor(amounts, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


def start(device: str | None, dtype: str | None) -> World:
    """Join the process group if torchrun made one; choose device and dtype."""
    names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")  # torchrun sets them
    rank, size, local_rank = (int(os.environ.get(*name)) for name in names)
    place, compute, backend = torch.device("cpu"), "float32", "gloo"
    if device == "cuda" and not torch.cuda.is_available():
        raise MocaError("--device cuda: no CUDA device is visible: use --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        place, compute, backend = torch.device("cuda", local_rank), "bfloat16", "nccl"
        torch.cuda.set_device(place)
    world = World(rank, size, place, getattr(torch, dtype or compute))
    if world.sharded and not dist.is_initialized():  # without torchrun: a group of one
        alone = {} if "RANK" in os.environ else dict(rank=0, world_size=1, store=dist.HashStore())
        dist.init_process_group(backend, **alone)
    return world


def shard(whole: nn.Module, vlm: VLM, world: World) -> nn.Module:
    """FSDP2: each block's parameters are divided among the ranks, and whole only while it runs.

    The root holds what belongs to no block (embeddings, norms, heads). Inputs are not cast: the
    rotary angles have to stay float32. Alone, nothing is divided; but the vision tower sees a blank
    group in a batch without images all the same. Its gradients are then zero, not None, as under
    FSDP: AdamW skips parameters whose gradient is None, and the number of ranks would matter.
    """
    vlm.always_see = True
    if world.sharded:
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for block in [*vlm.visual.blocks, *vlm.language.layers, whole]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return whole


def load_model(flags: CommonFlags, world: World, wrap: Callable[[VLM], nn.Module] = lambda vlm: vlm
               ) -> tuple[nn.Module, Processor]:
    """The checkpoint in float32, wrapped in what a stage adds to it; and its processor.

    It is sharded if there are ranks; parameters that `wrap` adds are left for the caller to fill.
    """
    folder = find_checkpoint(flags.model)
    config = load_config(folder)
    processor = Processor.load(folder, config, flags.min_pixels, flags.max_pixels)
    # a new mask token takes a padded row of the embedding; the embedding grows if none is free
    config = replace(config, vocabulary=max(config.vocabulary, processor.mask_token + 1))
    mask_row = processor.mask_token if processor.mask_is_new else None
    whole = build(folder, config, world.device, torch.float32,
                  lambda vlm: shard(wrap(vlm), vlm, world), mask_row)
    for tower in (module for module in whole.modules() if hasattr(module, "checkpointing")):
        tower.checkpointing = flags.checkpointing
    return whole, processor


def skip_list(flags: CommonFlags, world: World) -> Path | None:
    """The file that lists unusable records, by the main rank; None if the first stops the run."""
    listed = Path(flags.output) / "skipped.jsonl" if world.main else Path(os.devnull)
    return listed if flags.on_error == "skip" else None


def begin(flags: CommonFlags, world: World, model: nn.Module, batches: Any, about: str
          ) -> tuple[torch.optim.Optimizer, "Log", int]:
    """Set up optimiser and log, and restore the checkpoint in --output if --resume finds one.
    Returns both, and the number of steps already done (0 for a new run).

    batches: draws the data; its `state` is a dictionary with, among others, the number of "skipped"
    records. about: describes a step, for the line printed at the start.
    """
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), flags.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    saved = flags.resume and load_checkpoint(output / "checkpoint", world, model, optimizer)
    if saved:
        # other flags would end in what is neither the old run nor a new one
        for name, value in saved["flags"].items():
            if name not in MAY_CHANGE and getattr(flags, name) != value:
                raise MocaError(f"--resume: --{name.replace('_', '-')} was {value}: give the same "
                                "flags, or start anew without --resume")
        before, now = saved["data"]["records"], batches.state["records"]
        if before != now:
            raise MocaError(f"--resume: {flags.data} held {before} records and now {now}: give the "
                            "same data, or start anew without --resume")
        batches.state = saved["data"]
    elif flags.resume and world.main:
        print(f"{output} holds no checkpoint: starting anew", flush=True)
    done = saved["step"] if saved else 0
    if done > flags.steps:
        raise MocaError(f"--resume: {done} steps are done: --steps {flags.steps} is less")
    keep_lines(output / "skipped.jsonl", batches.state["skipped"], world)
    if world.main:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{flags.model} -> {output}: {parameters:,} parameters, steps {done + 1} to "
              f"{flags.steps} of {about}, {world.size} rank(s) on {world.device.type}, products in "
              f"{world.dtype}, all else in float32, seed {flags.seed}", flush=True)
    return optimizer, Log(output / "log.jsonl", world, flags.steps, saved or None), done


def update(step: int, loss: float, flags: CommonFlags, model: nn.Module,
           optimizer: torch.optim.Optimizer, sources: list[str]) -> dict[str, float]:
    """The end of a step: clip the gradients, refuse what is not finite (the records are named), and
    move the weights. Returns what the log says of it: rate and gradient norm."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), flags.clip)  # over all ranks
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise MocaError(f"step {step}: the {name} is {value}; the weights keep their last good "
                            f"state. Lower --learning-rate, or look at {', '.join(sources)}")
    rate = flags.learning_rate * warmup_then_linear(step - 1, flags.steps, flags.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {"lr": rate, "grad_norm": norm}


def warmup_then_linear(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor at a step from 0: up over a share of the steps, then down to 0."""
    rising = max(1, round(steps * warmup))
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def prefetch(make: Callable[[], Any]) -> Iterator[Any]:
    """Call `make` one call ahead, in a thread: data is made ready while the model computes."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make)
        while True:
            made = future.result()
            future = pool.submit(make)
            yield made


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_checkpoint(folder: Path, world: World, model: nn.Module,
                    optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the resumable state beside the old one, each rank its own part, then rename."""
    parameters = list(model.parameters())
    moments = [{key: local(value) for key, value in optimizer.state[p].items()} for p in parameters]
    mine = {"parameters": [local(p.detach()) for p in parameters], "moments": moments,
            "state": state}
    if world.main:
        fresh_folder(folder)
    world.wait()
    with writing(folder):
        torch.save(mine, folder.with_name(folder.name + ".new") / f"rank-{world.rank:05d}.pt")
    world.wait()
    if world.main:
        replace_folder(folder)
    world.wait()


@torch.no_grad()
def load_checkpoint(folder: Path, world: World, model: nn.Module,
                    optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore what `save_checkpoint` wrote, to the bit. Its `state`, or None if there is none."""
    if world.main:
        find_folder(folder)
    world.wait()
    if not folder.exists():
        return None
    if len(list(folder.iterdir())) != world.size:
        raise MocaError(f"{folder} is not of {world.size} ranks: resume with as many as before")
    file, parameters = folder / f"rank-{world.rank:05d}.pt", list(model.parameters())
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        shapes = [tensor.shape for tensor in saved["parameters"]]
    except Exception:  # torch.load and pickle raise many kinds
        shapes = None
    if shapes != [local(parameter).shape for parameter in parameters]:
        raise MocaError(f"{file} is damaged or of another model: start without --resume")
    for parameter, tensor, moments in zip(parameters, saved["parameters"], saved["moments"]):
        local(parameter).copy_(tensor)
        for key, value in moments.items():
            whole = torch.zeros_like(parameter) if value.dim() else value.clone()
            local(whole).copy_(value)
            optimizer.state[parameter][key] = whole
    return saved["state"]


def save_step(step: int, flags: CommonFlags, world: World, model: nn.Module,
              optimizer: torch.optim.Optimizer, data: dict, log: "Log") -> None:
    """The checkpoint of this step, if one is due. data: from which the next step is drawn."""
    if step % flags.save_every == 0 or step == flags.steps:
        state = {"step": step, "data": data, "flags": asdict(flags),
                 "loss": log.lines[-1]["loss"]}  # tells whose log it is
        save_checkpoint(Path(flags.output) / "checkpoint", world, model, optimizer, state)


def end(flags: CommonFlags, world: World, vlm: VLM, processor: Processor, log: "Log",
        loader: Iterator, data: dict) -> None:
    """After the last step: close what was open, and save the model."""
    log.bar.close()
    loader.close()  # the draw that was one ahead has not been learned from: take it back
    keep_lines(Path(flags.output) / "skipped.jsonl", data["skipped"], world)
    if data["skipped"] and world.main:
        print(f"{data['skipped']} times a record could not be used: see skipped.jsonl", flush=True)
    save_model(Path(flags.output) / "model", world, vlm, processor)


def save_model(folder: Path, world: World, vlm: VLM, processor: Processor) -> None:
    """Write what transformers and `nano_moca.load` read, in the dtype of the checkpoint begun with.

    Sharded tensors are gathered one by one, by all ranks; the main rank keeps and writes them.
    """
    tensors, dtype = {}, stored_dtype(vlm.config)
    for name, parameter in vlm.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            # a copy: of unevenly divided rows a whole tensor is a view, which nobody could save
            tensors[name] = tensor.to("cpu", dtype, copy=True)
    if world.main:
        with writing(folder):
            fresh = fresh_folder(folder)
            save_weights(fresh, tensors, vlm.config)
            processor.save(fresh)
            replace_folder(folder)
    world.wait()


def keep_lines(path: Path, count: int, world: World) -> list[bytes]:
    """Cut a file after its first `count` lines, and return them; there may be no file."""
    kept = path.read_bytes().splitlines(keepends=True)[:count] if path.exists() else []
    world.wait()  # all have read before the main rank cuts
    if world.main and path.exists():
        os.truncate(path, sum(map(len, kept)))
    return kept


class Log:
    """log.jsonl, one object a step, and a progress bar that shows the same; by the main rank."""

    def __init__(self, path: Path, world: World, steps: int, saved: dict | None) -> None:
        """saved: the checkpoint's state when a run is resumed. What was logged after it is made
        again: cut it off."""
        done = saved["step"] if saved else 0
        self.lines = [json.loads(line) for line in keep_lines(path, done, world)]
        if saved and [line["loss"] for line in self.lines[-1:]] != [saved["loss"]]:
            raise MocaError(f"{path} and the checkpoint beside it are of two runs: start anew "
                            "without --resume")
        self.file = open(path if world.main else os.devnull, "a", buffering=1)
        hidden = None if world.main else True  # None: shown on a terminal only
        self.bar = tqdm(total=steps, initial=done, disable=hidden, unit="step")

    def write(self, line: dict) -> None:
        """Log one step."""
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        shown = [f"{key} {line[key]:.4g}" for key in line if "loss" in key or key == "accuracy"]
        self.bar.set_postfix_str(" ".join(shown), refresh=False)
        self.bar.update()


def plot_losses(path: Path, lines: list[dict], names: list[str]) -> None:
    """One panel a loss: each step's value, and a running mean over a twentieth of the run."""
    from matplotlib.figure import Figure

    figure = Figure((4.2 * len(names), 3.2), layout="tight")
    axes = figure.subplots(1, len(names), squeeze=False)
    steps, window = [line["step"] for line in lines], max(1, len(lines) // 20)
    for axis, name in zip(axes[0], names, strict=True):
        values = torch.tensor([line[name] for line in lines])
        axis.plot(steps, values, color="#c9d3e6", linewidth=0.8)
        axis.plot(steps[window - 1 :], values.unfold(0, window, 1).mean(1), color="#1f4e9c")
        axis.set(xlabel="step", title=name.replace("_", " "), ylim=(0, None))
    figure.savefig(path, dpi=130)


def run(main: Callable[[], object]) -> None:
    """Run a script's main; errors that the user can fix end as one line and exit code 1."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except MocaError as error:
        message = str(error)
    except OSError as error:  # a full disk, a folder without permission
        message = f"{error.filename or 'writing'}: {error.strerror or error}: fix it and run again"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)  # at once: other ranks may be waiting inside a collective
