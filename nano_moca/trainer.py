"""What both training loops need around them: flags, processes, sharding, checkpoints, log, picture.

Plain functions; the loop itself stands in train_cpt.py. The precision policy, in one place: master
weights, summed gradients and optimiser state are float32; matrix products run in `--dtype`
(bfloat16 on CUDA); norms, softmax and losses are computed in float32 whatever the dtype.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nano_moca.config import MocaError
from nano_moca.model import VLM
from nano_moca.processor import Processor
from nano_moca.weights import (
    find_folder, fresh_folder, replace_folder, save_weights, stored_dtype, writing,
)

Flags = TypeVar("Flags")


def flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf,
         choices: tuple[str, ...] | None = None) -> Any:
    """A field of a flags dataclass: default, help text, and the values that make sense."""
    return dataclasses.field(default=default, metadata=locals())


class Parser(argparse.ArgumentParser):
    """An unknown flag or an impossible value is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parse_flags(kind: type[Flags], argv: list[str] | None, description: str) -> Flags:
    """Fill a flags dataclass from the command line (argv None) or a list of words."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = {field.name: "--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):
        about = dict(default=field.default, help=field.metadata["help"])
        if isinstance(field.default, bool):
            about["action"] = "store_true"
        else:
            about["type"] = str if field.default is None else type(field.default)
            about["choices"] = field.metadata["choices"]
        parser.add_argument(names[field.name], **about)
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
    group in a batch without images here as there, so that its gradients are zeros in both (where
    they were absent, the optimiser would pass its weights over, and the ranks would show).
    """
    vlm.always_see = True
    if world.sharded:
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for block in [*vlm.visual.blocks, *vlm.language.layers, whole]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return whole


def warmup_then_linear(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor at a step from 0: up over a share of the steps, then down to 0."""
    rising = max(1, round(steps * warmup))
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale the gradients so that their norm over all ranks is at most `limit`; the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def require_finite(step: int, values: dict[str, float], sources: list[str]) -> None:
    """Stop before the weights take a step that would spoil them."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise MocaError(f"step {step}: the {name} is {value}; the weights keep their last good "
                            f"state. Lower --learning-rate, or look at {', '.join(sources)}")


def require_same(old: dict, new: dict, may_change: set[str]) -> None:
    """Refuse to go on with other flags: the end would be neither the old run's nor a new one's."""
    for name, value in old.items():
        if name not in may_change and new[name] != value:
            raise MocaError(f"--resume: --{name.replace('_', '-')} was {value} and is {new[name]}: "
                            "give the same flags, or start anew without --resume")


def prefetch(make: Callable[[], Any]) -> Iterator[Any]:
    """Call `make` one call ahead, in a thread: images are decoded while the model computes."""
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
    file = folder / f"rank-{world.rank:05d}.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        kept = list(zip(model.parameters(), saved["parameters"], saved["moments"], strict=True))
        wrong = [p for p, tensor, _ in kept if local(p).shape != tensor.shape]
    except Exception as error:  # torch.load and pickle raise many kinds
        wrong = [error]
    if wrong:
        raise MocaError(f"{file} is damaged or of another model: start without --resume")
    for parameter, tensor, moments in kept:
        local(parameter).copy_(tensor)
        for key, value in moments.items():
            whole = torch.zeros_like(parameter) if value.dim() else value.clone()
            local(whole).copy_(value)
            optimizer.state[parameter][key] = whole
    return saved["state"]


def save_model(folder: Path, world: World, vlm: VLM, processor: Processor) -> None:
    """Write what transformers and `nano_moca.load` read, in the dtype of the checkpoint begun with.

    Sharded tensors are gathered one by one, by all ranks; the main rank keeps and writes them.
    """
    tensors, dtype = {}, stored_dtype(vlm.config)
    for name, parameter in vlm.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            tensors[name] = tensor.to("cpu", dtype)
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

    def __init__(self, path: Path, world: World, steps: int, done: int) -> None:
        """done: steps made before a resume. What was logged after them is made again: cut it
        off."""
        self.lines = [json.loads(line) for line in keep_lines(path, done, world)]
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False, layout="tight")
    steps, window = [line["step"] for line in lines], max(1, len(lines) // 20)
    for axis, name in zip(axes[0], names, strict=True):
        values = torch.tensor([line[name] for line in lines])
        axis.plot(steps, values, color="#c9d3e6", linewidth=0.8)
        axis.plot(steps[window - 1 :], values.unfold(0, window, 1).mean(1), color="#1f4e9c")
        axis.set(xlabel="step", title=name.replace("_", " "), ylim=(0, None))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(main: Callable[[], object]) -> None:
    """Run a script's main: what the user can mend ends as one line and exit code 1."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except MocaError as error:
        message = str(error)
    except OSError as error:  # a full disk, a folder without permission
        message = f"{error.filename or 'writing'}: {error.strerror or error}: mend it and run again"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)  # at once: other ranks may be waiting inside a collective
