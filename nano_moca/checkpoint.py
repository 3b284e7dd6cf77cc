"""What a run leaves on disk: a checkpoint to go on from, and a model to use.

A checkpoint restores a run to the bit: weights and both moments of AdamW in float32,
each rank its own part in its own file, and a dictionary with the step, the flags, where
the data stood, and all lines of the log. The model is what others read: config.json,
weights in the original checkpoint's dtype, tokenizer, and what other tools need beside
them (convert/export.py).

Both are written beside the old ones and then renamed, so that a crash at any moment
leaves one that is complete. log.jsonl grows line by line instead, for a reader; after a
crash it is written again from the checkpoint, so the two always fit.

Left out: resuming with another number of ranks, and keeping more than one checkpoint.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nano_moca.distributed import World, local_part
from nano_moca.files import (MocaError, beside, find_folder, fresh_folder, one_line,
                             regular_file, replace_folder, writing)
from nano_moca.model import VLM
from nano_moca.processor import Processor
from nano_moca.weights import save_weights, stored_dtype

# What a report of a run writes beside its model.
REPORT = ("scores.json", "loss.png", "reconstruction.png", "retrieval.png", "similarity.png")


def save_checkpoint(folder: Path, world: World, model: nn.Module,
                    optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write what `load_checkpoint` restores, each rank its own part.

    state: numbers and texts in lists and dictionaries; every rank gives the same. With
    it a "digest" is saved, by which plan.py knows one that was changed.
    """
    # exp_avg and exp_avg_sq have a parameter's shape; its step count is a scalar.
    parameters = []
    moments = []
    for parameter in optimizer.param_groups[0]["params"]:
        parameters.append(local_part(parameter.detach()))
        entries = optimizer.state[parameter].items()
        moments.append({key: local_part(value) for key, value in entries})
    content = {"rank": world.rank, "parameters": parameters, "moments": moments,
               "moment count": sum(map(len, moments)), "state": state | {"digest": digest(state)}}

    # The main rank makes the new folder, all write into it, the main rank renames it.
    if world.main:
        fresh_folder(folder)
    world.wait()
    file = beside(folder, ".new") / f"rank-{world.rank:05d}.pt"
    with writing(file):
        torch.save(content, file)
    world.wait()
    if world.main:
        replace_folder(folder)
    world.wait()


def digest(state: dict) -> str:
    """By which a changed state is known from one that was saved."""
    return hashlib.sha256(ascii(state).encode()).hexdigest()


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
    if len(list(folder.glob("rank-*.pt"))) != world.size:
        raise MocaError(f"{folder} is not of {world.size} ranks: resume with as many as before")

    # Everything is compared before anything is copied. torch.load and pickle raise many
    # kinds of errors, and so does what is no tensor.
    file = folder / f"rank-{world.rank:05d}.pt"
    parameters = optimizer.param_groups[0]["params"]
    try:
        saved = torch.load(regular_file(file), map_location="cpu", weights_only=True)
        state = dict(saved["state"])
        count = sum(map(len, saved["moments"]))
        whole = saved["rank"] == world.rank and saved["moment count"] == count > 0

        # A weight that never had a gradient has no moments.
        parts = zip(parameters, saved["parameters"], saved["moments"], strict=True)
        for parameter, weight, entries in parts:
            shape = local_part(parameter).shape
            usual = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            whole = whole and entries.keys() in (set(), usual.keys())
            for key, value in {"weight": weight, **entries}.items():
                possible = value.isfinite() & ((value >= 0) | (key in ("weight", "exp_avg")))
                whole = whole and value.shape == usual.get(key, shape)
                whole = whole and value.dtype == torch.float32 and bool(possible.all())
    except Exception:
        whole = False
    if not whole:
        raise MocaError(f"{file} is damaged, lacks a part or is of another model: start anew "
                        "without --resume")

    # The optimiser is new and has no moments yet: each is born sharded like its parameter.
    for index, parameter in enumerate(parameters):
        local_part(parameter).copy_(saved["parameters"][index])
        for key, value in saved["moments"][index].items():
            moment = torch.zeros_like(parameter) if value.dim() else value.clone()
            local_part(moment).copy_(value)
            optimizer.state[parameter][key] = moment
    return state


def save_model(folder: Path, world: World, vlm: VLM, processor: Processor,
               trained_with: dict | None = None) -> None:
    """Write what transformers and `nano_moca.load` read, in the dtype of the original
    checkpoint.

    trained_with: {"attention": ..., "pooling": ..., "max_tokens": ...}, which
    `nano_moca.load` takes as its defaults; stage 1 has no pooling.
    """
    # All ranks gather one tensor at a time; only the main rank keeps it, in host memory.
    tensors = {}
    for name, parameter in vlm.named_weights():
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

            # A report on the old model would be taken for one on this one.
            for name in REPORT:
                (folder.parent / name).unlink(missing_ok=True)
            replace_folder(folder)
        print(f"{one_line(folder)}: the model is saved", flush=True)
    world.wait()
