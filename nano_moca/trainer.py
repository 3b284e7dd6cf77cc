"""What both training loops need around them: flags, processes, sharding, checkpoints, logs, the loss's picture.

Plain functions; the loops themselves stand in train_cpt.py and train_cl.py. The precision policy, in one place:
master weights, gradients and optimiser state are float32; matrix products run in `--dtype` (bfloat16 on CUDA); norms,
softmax, similarities and losses are computed in float32 whatever the dtype.
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
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nano_moca.config import MocaError
from nano_moca.model import VLM
from nano_moca.processor import Processor
from nano_moca.weights import find_folder, fresh_folder, replace_folder, save_weights, stored_dtype

Flags = TypeVar("Flags")


def flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf, choices: tuple = ()) -> Any:
    """A field of a flags dataclass: its default, help text, and the values that make sense."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def parse_flags(kind: type[Flags], argv: list[str] | None, description: str) -> Flags:
    """Command-line flags from a dataclass. An unknown flag or an impossible value: one line, exit code 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: (print(f"error: {message} (see --help)", file=sys.stderr), sys.exit(2))
    for field in dataclasses.fields(kind):
        name, meta = "--" + field.name.replace("_", "-"), field.metadata
        assert field.default is not MISSING, f"{name} needs a default"
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true", help=meta["help"])
        else:
            value = str if field.default is None else type(field.default)
            parser.add_argument(name, type=value, default=field.default, help=meta["help"],
                                choices=meta["choices"] or None)
    values = vars(parser.parse_args(argv))
    for field in dataclasses.fields(kind):
        value, low, high = values[field.name], field.metadata["low"], field.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            parser.error(f"--{field.name.replace('_', '-')} {value} is not from {low} to {high}")
    return kind(**values)


@dataclass(frozen=True)
class World:
    """This process among the ranks that torchrun started (one, without torchrun), and its device."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """FSDP2 whenever there is more than one rank, or compute in another dtype than the weights'."""
        return self.size > 1 or self.dtype != torch.float32

    def total(self, *amounts: float) -> list[float]:
        """Sums over all ranks."""
        sums = torch.tensor(amounts, dtype=torch.float64)
        if self.size > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return sums.tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        self.total(0.0)


def start(device: str | None, dtype: str | None, seed: int) -> World:
    """Join the process group if torchrun made one, and choose device and compute dtype."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MocaError("--device cuda: no CUDA device is visible; use --device cpu")
    compute = getattr(torch, dtype or ("bfloat16" if kind == "cuda" else "float32"))
    where = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
    torch.manual_seed(seed)
    world = World(int(os.environ.get("RANK", 0)), size, where, compute)
    if world.sharded and not dist.is_initialized():
        if "RANK" not in os.environ:  # alone, and without torchrun
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return world


def shard(whole: nn.Module, vlm: VLM, world: World) -> nn.Module:
    """FSDP2: each block's parameters are divided among the ranks, and whole only while the block runs.

    The root holds what belongs to no block (embeddings, norms, heads). Inputs are not cast, because the rotary
    angles have to stay float32.
    """
    if world.sharded:
        policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        vlm.always_see = world.size > 1
        for block in [*vlm.visual.blocks, *vlm.language.layers]:
            fully_shard(block, mp_policy=policy)
        fully_shard(whole, mp_policy=policy)
    return whole


def warmup_then_linear(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor at a step (from 0): up linearly over a fraction of the steps, then down to 0."""
    rising = max(1, round(steps * warmup))
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients so that their norm, over all ranks, is at most `limit`. Returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def require_finite(step: int, values: dict[str, float], sources: list[str]) -> None:
    """Stop before the weights take a step that would spoil them."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise MocaError(f"step {step}: the {name} is {value}; the weights keep their last good state. "
                            f"This rank's records: {', '.join(sources)}. Look at them, or lower --learning-rate")


def prefetch(make: Callable[[], Any]) -> Iterator[Any]:
    """Call `make` for ever, one call ahead, in a thread: images are decoded while the model computes."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make)
        while True:
            made = future.result()
            future = pool.submit(make)
            yield made


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_checkpoint(folder: Path, world: World, model: nn.Module, optimizer: torch.optim.Optimizer,
                    state: dict) -> None:
    """Write the resumable state beside the old one, then rename: each rank its own part."""
    world.wait()
    tensors = [local(p.detach()) for p in model.parameters()]
    moments = [{key: local(value) for key, value in optimizer.state[p].items()} for p in model.parameters()]
    mine = {"parameters": tensors, "moments": moments, "state": state | {"world": world.size}}
    if world.main:
        fresh_folder(folder)
    world.wait()
    torch.save(mine, folder.with_name(folder.name + ".new") / f"rank-{world.rank:05d}.pt")
    world.wait()
    if world.main:
        replace_folder(folder)
    world.wait()


@torch.no_grad()
def load_checkpoint(folder: Path, world: World, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore what `save_checkpoint` wrote, to the bit. Returns its `state`, or None if there is none yet."""
    file = find_folder(folder) / f"rank-{world.rank:05d}.pt"
    if not folder.exists():
        return None
    try:
        saved = torch.load(file, map_location=world.device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise MocaError(f"{file} cannot be read ({str(error).splitlines()[0]}): start without --resume") from None
    if saved["state"]["world"] != world.size:
        raise MocaError(f"{folder} is of {saved['state']['world']} ranks, not {world.size}: use as many to resume")
    for parameter, tensor, moments in zip(model.parameters(), saved["parameters"], saved["moments"], strict=True):
        local(parameter).copy_(tensor)
        state = optimizer.state[parameter]
        for key, value in moments.items():
            whole = torch.zeros_like(parameter) if value.dim() else value.clone()
            local(whole).copy_(value)
            state[key] = whole
    return saved["state"]


def save_model(folder: Path, world: World, vlm: VLM, processor: Processor) -> None:
    """Write model/: what transformers and `nano_moca.load` read. Sharded tensors are gathered one at a time."""
    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in vlm.named_parameters():
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if world.main:
                yield name, tensor

    if not world.main:
        list(gathered())  # take part in the gathering
    else:
        fresh = fresh_folder(folder)
        save_weights(fresh, gathered(), vlm.config, stored_dtype(vlm.config))
        processor.save(fresh)
        replace_folder(folder)
    world.wait()


class Log:
    """log.jsonl, one object a step, and a progress bar that shows the same. Only the main rank writes."""

    def __init__(self, path: Path, world: World, steps: int, done: int) -> None:
        """done: steps already made before a resume. What was logged after them is made again, so it is cut off."""
        self.main, self.lines = world.main, []
        if done and path.exists():
            self.lines = [line for line in map(parse_line, path.read_text().splitlines())
                          if line and line["step"] <= done]
        if self.main:
            fresh = path.with_suffix(".new")
            fresh.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            fresh.replace(path)
            self.file = open(path, "a", buffering=1)
        self.bar = tqdm(total=steps, initial=done, disable=None if self.main else True, unit="step")

    def write(self, line: dict) -> None:
        """Log one step."""
        self.lines.append(line)
        if self.main:
            self.file.write(json.dumps(line) + "\n")
        shown = {key: f"{value:.4g}" for key, value in line.items() if "loss" in key or key == "accuracy"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()


class Skipped:
    """Counts the records that were left out and lists why, in skipped.jsonl."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.main, self.count = path, world.main, 0

    def __call__(self, reason: str) -> None:
        self.count += 1
        if self.main:
            with open(self.path, "a") as file:
                file.write(json.dumps({"skipped": self.count, "reason": reason}) + "\n")


def parse_line(line: str) -> dict | None:
    """A logged object; None for a line cut short when a run was killed."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def plot_losses(path: Path, lines: list[dict], names: list[str]) -> None:
    """One panel a loss: each step's value, and a running mean over a twentieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False)
    steps, window = [line["step"] for line in lines], max(1, len(lines) // 20)
    for axis, name in zip(axes[0], names, strict=True):
        values = np.array([line[name] for line in lines])
        axis.plot(steps, values, color="#c9d3e6", linewidth=0.8)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(steps[window - 1 :], smooth, color="#1f4e9c", linewidth=1.8)
        axis.set(xlabel="step", title=name.replace("_", " "), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(main: Callable[[], None]) -> None:
    """Run a script's main: what the user can mend ends as one line and exit code 1, without a traceback."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except MocaError as error:
        message = str(error)
    except OSError as error:  # a full disk, a folder without permission
        message = f"{error.filename or 'writing'}: {error.strerror or error}: free or correct it, then --resume"
    except KeyboardInterrupt:
        message = "interrupted: go on with --resume"
    else:
        return
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)  # at once: the other ranks may be waiting inside a collective
