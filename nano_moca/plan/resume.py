"""Going on after a break, to the bit, on as many ranks as before or on others (`--resume`).

What a step computes does not depend on the number of ranks: they divide the records of
one global batch, and the rows of each parameter. FSDP2 cuts a parameter of n rows into
W parts of ceil(n / W) rows; the last ones may have fewer, or none. Each rank saved the
rows that it kept, of the weight and of both moments, so that the files of all ranks, one
below the other, are the whole:

    7 rows, saved by 2 ranks    0 1 2 3 | 4 5 6
            read by 3 ranks     0 1 2 | 3 4 5 | 6

So a rank takes its rows from wherever they are. The files are mapped into memory (mmap)
and not read: of 45 GB, a rank of eight reads its 5.6.

A run that goes on has to be the same run. Files that are damaged, missing, of two runs or
of two steps are refused, and so are other flags or other data.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nano_moca.checkpoint import digest
from nano_moca.distributed import World, local_part
from nano_moca.files import MocaError, find_folder, one_line, regular_file
from nano_moca.flags import CommonFlags

# These flags may differ on --resume. Most change nothing that is computed; with other
# --steps the rest of the schedule is another, and a GPU's products are not the CPU's.
MAY_CHANGE = ("output", "steps", "save_every", "resume", "device", "checkpointing", "on_error",
              "held_out", "no_report", "allow_extra")


def go_on(flags: CommonFlags, world: World, model: nn.Module, optimizer: Optimizer,
          batches: Any) -> dict | None:
    """Make model, optimiser and batches what they were when the checkpoint in the output
    folder was saved, and return its state; None if there is no checkpoint.

    batches: draws the data; its `state` says how many "records" the data holds, their
    "fingerprint", and where the next step begins. MocaError if flags or data differ from
    those of the run that saved it, or a part of it is missing.
    """
    # With --resume and no checkpoint yet, a run begins: one command serves for both.
    output = Path(flags.output)
    saved = load_checkpoint(output / "checkpoint", world, model, optimizer)
    if saved is None:
        if world.main:
            print(f"{one_line(output)} holds no checkpoint: starting anew", flush=True)
        return None

    # Other flags or other data would end in what is neither the old run nor a new one.
    check_same_run(flags, saved, batches.state)
    batches.state |= saved["data"]
    before = saved["flags"].get("steps")
    if before != flags.steps and world.main:
        print(f"--steps was {before} and is {flags.steps}: so is the schedule", flush=True)
    return saved


@torch.no_grad()
def load_checkpoint(folder: Path, world: World, model: nn.Module, optimizer: Optimizer
                    ) -> dict | None:
    """Restore model and optimiser to the bit, and return the `state` that was saved.

    None if there is no checkpoint. MocaError, and nothing is changed, if it is damaged,
    not complete, or of another model.
    """
    # A crash may have left it under another name for a moment.
    if world.main:
        find_folder(folder)
    world.wait()
    if not folder.exists():
        return None

    # Everything is looked at before anything is copied. torch.load and pickle raise many
    # kinds of errors, and so does what is no tensor.
    parameters = optimizer.param_groups[0]["params"]
    files = []
    suspect = folder / "rank-00000.pt"
    try:
        for suspect in sorted(folder.glob("rank-*.pt")):
            files.append(torch.load(regular_file(suspect), "cpu", mmap=True, weights_only=True))
        fits = same_moment(files, len(parameters))
        for number, parameter in enumerate(parameters):
            fits = fits and possible(own_rows(files, number, parameter, world), parameter)
    except Exception:
        fits = False
    if not fits:
        raise MocaError(f"{suspect} is damaged, lacks a part or is of another model, or a file "
                        "beside it is of another run: start anew without --resume")

    # The optimiser is new and has no moments yet: each is born sharded like its parameter.
    for number, parameter in enumerate(parameters):
        rows = own_rows(files, number, parameter, world)
        local_part(parameter).copy_(rows.pop("weight"))
        for key, value in rows.items():
            moment = torch.zeros_like(parameter) if value.dim() else value.to(parameter.device)
            local_part(moment).copy_(value)
            optimizer.state[parameter][key] = moment
    return dict(files[0]["state"])


def same_moment(files: list[dict], parameter_count: int) -> bool:
    """Whether the files are those of all ranks, each complete, at one step of one run."""
    for rank, file in enumerate(files):
        # Older files do not say of how many ranks they are.
        facts = [file["rank"], file.get("ranks", len(files)), len(file["parameters"]),
                 len(file["moments"]), file["moment count"]]
        count = sum(map(len, file["moments"]))
        if facts != [rank, len(files), parameter_count, parameter_count, count] or not count:
            return False

        # The rest of the state differs: each rank measures its own tokens a second.
        for name in ("step", "flags", "data"):
            if file["state"].get(name) != files[0]["state"].get(name):
                return False
    return True


def own_rows(files: list[dict], number: int, parameter: Tensor, world: World
             ) -> dict[str, Tensor]:
    """What this rank keeps of a parameter: rows of its "weight" and of both moments, and
    their "step". The rows of a file follow those of the file before."""
    parts = [{"weight": file["parameters"][number], **file["moments"][number]} for file in files]
    share = -(-len(parameter) // world.size)  # rows of a rank: rounded up, as FSDP2 does
    rows = {}
    for key, value in parts[0].items():
        if not value.dim():
            rows[key] = value.clone()
            continue

        # A slice ends where the part ends, and may be empty: only our rows are read.
        found = []
        first = world.rank * share  # of our rows, counted from the part's first one
        for part in parts:
            found.append(part[key][max(0, first) : max(0, first + share)])
            first -= len(part[key])
        rows[key] = torch.cat(found)
        if world.rank * share - first != len(parameter):
            raise ValueError("more rows or fewer than the parameter has")
    return rows


def possible(rows: dict[str, Tensor], parameter: Tensor) -> bool:
    """Whether these may be a parameter's weight and moments. A weight that never had a
    gradient has no moments."""
    shape = local_part(parameter).shape
    usual = {"weight": shape, "step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
    whole = rows.keys() in (usual.keys(), {"weight"})
    for key, value in rows.items():
        sound = value.isfinite() & ((value >= 0) | (key in ("weight", "exp_avg")))
        whole = whole and value.shape == usual[key] and value.dtype == torch.float32
        whole = whole and bool(sound.all())
    return whole


def check_same_run(flags: CommonFlags, saved: dict, data: dict) -> None:
    """MocaError if a checkpoint's state is incomplete or was changed, or is of a run with
    other flags or other data. data: the state of the data that --data names, at its
    beginning."""
    usual = {"step": 0, "flags": {}, "data": {}, "log": [], "skipped": "", "digest": ""}
    lacking = {name for name, value in usual.items() if type(saved.get(name)) is not type(value)}
    lacking = lacking or data.keys() - saved["data"].keys()
    if lacking:
        raise MocaError(f"--resume: the checkpoint says nothing of {', '.join(sorted(lacking))}: "
                        "resume with the stage and version that wrote it, or start anew")

    # A checkpoint that is older than a flag does not name it: it ran with what is the default,
    # but that all masked words were hidden before there was --unhidden.
    unnamed = {field.name: field.default for field in fields(flags)}
    if "unhidden" in unnamed:
        unnamed["unhidden"] = 0.0
    for name, before in (unnamed | saved["flags"]).items():
        if name not in MAY_CHANGE and getattr(flags, str(name), None) != before:
            raise MocaError(f"--resume: --{str(name).replace('_', '-')} was {before}: give the "
                            "same flags, or start anew without --resume")

    # As many records can be others.
    for name in ("records", "fingerprint"):
        before, now = saved["data"][name], data[name]
        if before != now:
            raise MocaError(f"--resume: {name} of --data {flags.data}: {before} before, and now "
                            f"{now}: give the same data, or start anew without --resume")
    if saved["step"] > flags.steps:
        raise MocaError(f"--resume: {saved['step']} steps are done, more than {flags.steps}: "
                        "raise --steps")
    if saved.pop("digest") != digest(saved):
        raise MocaError("--resume: the checkpoint's state is not as it was saved: start anew")
