"""What a run leaves on disk: a checkpoint to go on from, and a model to use.

A checkpoint restores a run to the bit: weights and both moments of AdamW in float32,
each rank its own part in its own file, and a dictionary with the step, the flags, where
the data stood, and all lines of the log. How a run goes on from it, on as many ranks or
on others, is in resume.py. The model is what others read: config.json, weights in the
original checkpoint's dtype, tokenizer, and what other tools need beside them
(convert/export.py).

Training does not wait for the disk. A rank copies its part into host memory, which costs
12 bytes for each parameter of the part until it is written, and goes on with the next
step; a thread writes the copy (see `save_progress` in trainer.py). A model of 3B on 8
ranks takes 45 GB on the disk: at 100 MB/s, seven minutes.

Both are written beside the old ones and then renamed, so that a crash at any moment
leaves one that is complete. log.jsonl grows line by line instead, for a reader; after a
crash it is written again from the checkpoint, so the two always fit.

A model whose config.json says bfloat16 is saved in it, though it was trained in float32:
2^-9 of a weight is rounded away, and with a learning rate of 2e-6 that is what thousands
of steps may move it. So stage 2 begins from rounded weights. A "dtype" of float32 in the
config.json of the model that stage 1 starts from keeps all, in twice the bytes.

Left out: keeping more than one checkpoint.
"""

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from nano_moca.distributed import World, local_part
from nano_moca.files import beside, fresh_folder, one_line, replace_folder, replacing, writing
from nano_moca.model import VLM
from nano_moca.processor import Processor

# What a report of a run writes beside its model.
REPORT = ("scores.json", "loss.png", "reconstruction.png", "retrieval.png", "similarity.png")


def snapshot(world: World, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict
             ) -> dict:
    """A copy in host memory of this rank's part: what `write_checkpoint` writes.

    state: numbers and texts in lists and dictionaries, which nobody changes any more. With
    it a "digest" is saved, by which resume.py knows one that was changed.
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
    """Of this rank's part, also if it is on the CPU already: training changes it in place."""
    return local_part(tensor).to("cpu", copy=True)


def digest(state: dict) -> str:
    """By which a changed state is known from one that was saved."""
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


def save_model(folder: Path, world: World, vlm: VLM, processor: Processor,
               trained_with: dict | None = None) -> None:
    """Write what transformers and `nano_moca.load` read, in the dtype of the original
    checkpoint.

    trained_with: {"attention": ..., "pooling": ..., "max_tokens": ...}, which
    `nano_moca.load` takes as its defaults; stage 1 has no pooling.
    """
    from nano_moca.convert.export import save_weights, write_companions  # beside the road

    # All ranks gather the tensors, the main rank writes them: beside the old model, and
    # renamed when all is complete.
    fresh = fresh_folder(folder) if world.main else None
    tensors = {name: parameter.detach() for name, parameter in vlm.named_weights()}
    save_weights(fresh, tensors, vlm.config, trained_with)
    if world.main:
        with writing(folder):
            processor.save(fresh)
            write_companions(fresh, processor)

            # A report on the old model would be taken for one on this one.
            for name in REPORT:
                (folder.parent / name).unlink(missing_ok=True)
            replace_folder(folder)
        print(f"{one_line(folder)}: the model is saved", flush=True)
    world.wait()
