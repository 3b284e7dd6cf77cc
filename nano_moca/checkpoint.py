"""What a run leaves on disk: a checkpoint to go on from, and a model to use.

A checkpoint restores a run to the bit: weights and both moments of AdamW in float32,
each rank its own part in its own file, and a small dictionary with the step, the
flags, and where the data stood. The model is what others read: config.json, weights in
the original checkpoint's dtype, tokenizer.

Both are written beside the old ones and then renamed, so that a crash at any moment
leaves one that is complete. The log and the list of skipped records grow line by line
instead; after a crash they are cut back to the checkpoint's step (`keep_lines`).

Left out: resuming with another number of ranks, and keeping more than one checkpoint.
"""

import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nano_moca.distributed import World, local_part
from nano_moca.files import (MocaError, find_folder, fresh_folder, replace_folder, writing)
from nano_moca.model import VLM
from nano_moca.processor import Processor
from nano_moca.weights import save_weights, stored_dtype


def save_checkpoint(folder: Path, world: World, model: nn.Module,
                    optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write what `load_checkpoint` restores, each rank its own part.

    state: numbers and texts in lists and dictionaries; every rank gives the same.
    """
    # exp_avg and exp_avg_sq have a parameter's shape; its step count is a scalar.
    parameters = []
    moments = []
    for parameter in model.parameters():
        parameters.append(local_part(parameter.detach()))
        entries = optimizer.state[parameter].items()
        moments.append({key: local_part(value) for key, value in entries})
    content = {"parameters": parameters, "moments": moments, "state": state}

    # The main rank makes the new folder, all write into it, the main rank renames it.
    if world.main:
        fresh_folder(folder)
    world.wait()
    with writing(folder):
        fresh = folder.with_name(folder.name + ".new")
        torch.save(content, fresh / f"rank-{world.rank:05d}.pt")
    world.wait()
    if world.main:
        replace_folder(folder)
    world.wait()


@torch.no_grad()
def load_checkpoint(folder: Path, world: World, model: nn.Module,
                    optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore model and optimiser to the bit, and return the `state` that was saved.

    None if there is no checkpoint. MocaError, and nothing is changed, if it is damaged,
    of another model, or of another number of ranks.
    """
    # A crash may have left it under another name for a moment.
    if world.main:
        find_folder(folder)
    world.wait()
    if not folder.exists():
        return None
    if len(list(folder.iterdir())) != world.size:
        raise MocaError(f"{folder} is not of {world.size} ranks: resume with as many as before")

    # torch.load and pickle raise many kinds of errors; a damaged file has no shapes.
    file = folder / f"rank-{world.rank:05d}.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        shapes = [tensor.shape for tensor in saved["parameters"]]
    except Exception:
        shapes = None

    # Every shape is compared before anything is copied.
    parameters = list(model.parameters())
    if shapes != [local_part(parameter).shape for parameter in parameters]:
        raise MocaError(f"{file} is damaged or of another model: start without --resume")

    # The optimiser is new and has no moments yet: each is born sharded like its parameter.
    for index, parameter in enumerate(parameters):
        local_part(parameter).copy_(saved["parameters"][index])
        for key, value in saved["moments"][index].items():
            moment = torch.zeros_like(parameter) if value.dim() else value.clone()
            local_part(moment).copy_(value)
            optimizer.state[parameter][key] = moment
    return saved["state"]


def save_model(folder: Path, world: World, vlm: VLM, processor: Processor,
               trained_with: dict | None = None) -> None:
    """Write what transformers and `nano_moca.load` read, in the dtype of the original
    checkpoint.

    trained_with: {"attention": ..., "pooling": ...}, which `nano_moca.load` takes as
    its defaults.
    """
    # All ranks gather one tensor at a time; only the main rank keeps it, in host memory.
    tensors = {}
    for name, parameter in vlm.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

        # A copy: if W does not divide the first dimension, full_tensor returns a view
        # of a longer tensor, and views cannot be saved.
        if world.main:
            tensors[name] = tensor.to("cpu", stored_dtype(vlm.config), copy=True)

    # Beside the old model, and renamed when it is complete.
    if world.main:
        from nano_moca.convert.export import write_companions  # stands beside the road

        with writing(folder):
            fresh = fresh_folder(folder)
            save_weights(fresh, tensors, vlm.config, trained_with)
            processor.save(fresh)
            write_companions(fresh, processor)
            replace_folder(folder)
        print(f"{folder}: the model is saved", flush=True)
    world.wait()


def keep_lines(path: Path, count: int, world: World) -> list[bytes]:
    """Cut a file after its first `count` lines, and return them; there may be no file."""
    lines = path.read_bytes().splitlines(keepends=True)[:count] if path.exists() else []

    # The main rank cuts only when all ranks have read.
    world.wait()
    if world.main and path.exists():
        os.truncate(path, sum(map(len, lines)))
    return lines
