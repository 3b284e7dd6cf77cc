"""What a run goes on from after a break: its checkpoint.

A checkpoint restores a run to the bit: weights and both moments of AdamW in float32,
each rank its own part in its own file, and a dictionary with the step, the flags, where
the data stood, and all lines of the log. How a run goes on from it, on as many ranks or
on others, is in plan/resume.py. The model that a run leaves at its end is another folder, for
others to read: see convert/export.py.

Training does not wait for the disk. A rank copies its part into host memory, which costs
12 bytes for each parameter of the part until it is written, and goes on with the next
step; a thread writes the copy (see `save_progress` in trainer.py). A model of 3B on 8
ranks takes 45 GB on the disk: at 100 MB/s, seven minutes.

It is written beside the old one and then renamed, so that a crash at any moment leaves
one that is complete. log.jsonl grows line by line instead, for a reader; after a crash it
is written again from the checkpoint, so the two always fit.

Left out: keeping more than one checkpoint.
"""

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from nano_moca.distributed import World, local_part
from nano_moca.files import beside, replace_folder, replacing


def snapshot(world: World, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict
             ) -> dict:
    """A copy in host memory of this rank's part: what `write_checkpoint` writes.

    state: numbers and texts in lists and dictionaries, which must not change until
    it is written. A "digest" is saved with it: by it plan/resume.py sees whether a
    file was changed.
    """
    # exp_avg and exp_avg_sq have a parameter's shape; its step count is a scalar.
    parameters = []
    moments = []
    for parameter in optimizer.param_groups[0]["params"]:
        parameters.append(host_copy(parameter.detach()))
        entries = optimizer.state[parameter].items()
        moments.append({key: host_copy(value) for key, value in entries})
    return {"rank": world.rank, "ranks": world.size, "parameters": parameters, "moments": moments,
            "moment count": sum(map(len, moments)), "state": state | {"digest": digest(state)}}


def host_copy(tensor: Tensor) -> Tensor:
    """A copy of this rank's part in host memory, even if it lies there already:
    training changes the tensor in place."""
    return local_part(tensor).to("cpu", copy=True)


def digest(state: dict) -> str:
    """The SHA-256 of a state, as text."""
    return hashlib.sha256(ascii(state).encode()).hexdigest()


def write_checkpoint(folder: Path, world: World, content: dict) -> None:
    """Write a rank's `snapshot` into the folder that `fresh_folder` made; the main rank
    gives it its name once the files of all ranks are there.

    This runs in a thread, while the ranks train. So they do not wait for each other over
    the network here, where two threads would mix their messages, but look into the folder.
    """
    # A file has its name only when it is complete and on the disk.
    fresh = beside(folder, ".new")
    with replacing(fresh / f"rank-{world.rank:05d}.pt") as file:
        torch.save(content, file)

    # A rank whose disk is full raises its error at the next save, and torchrun ends all.
    if world.main:
        while len(list(fresh.glob("rank-*.pt"))) < world.size:
            time.sleep(0.05)
        replace_folder(folder)
