"""The plan of a run, looked at before it begins: what it will read and replace, and what
it goes on from.

A run writes a few names into --output, and a finished run's files of these names are
replaced. So a run is refused if what it would replace is what it reads, if somebody
else put it there, if it cannot be written, or if another run is at work in the folder.
`guarded` in trainer.py, above the `train` of both scripts, asks for this. With --resume, a
run is refused that would be neither the old one nor a new one (`check_same_run`). A reader
of the training path need not know more.

Left out: a disk that gets full. files.py keeps what stood there when it does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import TextIO

from nano_moca.checkpoint import REPORT
from nano_moca.data import load_tasks
from nano_moca.files import MARKER, MocaError, beside, first_lines, writing
from nano_moca.flags import CommonFlags

# What a run writes into --output, with the endings that this has for a moment.
FOLDERS = ("checkpoint", "model")
WRITTEN = (*FOLDERS, "log.jsonl", "skipped.jsonl", *REPORT)
ENDINGS = ("", ".new", ".old", ".part")
STRAY = (f"{MARKER}*", ".DS_Store", "._*", ".nfs*")  # what we or systems leave in any folder

# These flags may differ on --resume. Most change nothing that is computed; with other
# --steps the rest of the schedule is another, and a GPU's products are not the CPU's.
MAY_CHANGE = ("output", "steps", "save_every", "resume", "device", "checkpointing", "on_error",
              "held_out", "no_report", "allow_extra")


@contextmanager
def claim_output(flags: CommonFlags) -> Iterator[None]:
    """A run goes on inside it: --output is this run's alone, and what the run reads or
    somebody else put there is safe. MocaError if that cannot be."""
    output = Path(flags.output)
    check_inputs(flags)
    check_output(output)

    # A wrong --held-out would be noticed after the last step only.
    if getattr(flags, "held_out", None):
        load_tasks(flags.held_out, flags.seed, [])
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        marker = open(output / MARKER, "a")
    with marker:
        # The main rank's lock is that of all.
        if os.environ.get("RANK", "0") == "0":
            lock(marker, output)
        yield


def check_inputs(flags: CommonFlags) -> None:
    """MocaError if a flag names what the run replaces in --output, or part of it. Links
    are followed: what counts is where a file is."""
    output = beside(Path(flags.output), "")
    replaced = {beside(output / name, ending) for name, ending in product(WRITTEN, ENDINGS)}

    for name in ("model", "processor", "data", "held_out"):
        # Several, separated by commas, unless a file has this very name.
        value = getattr(flags, name, None) or ""
        for part in [value] if os.path.exists(value) else value.split(","):
            # The weights of a checkpoint may be links to anywhere.
            place = Path(part)
            for file in (place, *place.glob("*.safetensors")):
                file = beside(file, "")
                mixed = file == output and name in ("model", "processor")
                if mixed or replaced & {file, *file.parents}:
                    raise MocaError(f"--output {flags.output} would write over {file}, which "
                                    f"--{name.replace('_', '-')} reads: choose another --output")


def check_output(output: Path) -> None:
    """MocaError if the run would replace what no run wrote, or what may not be written."""
    marked = (output / MARKER).exists()
    for name, ending in product(WRITTEN, ENDINGS):
        path = beside(output / name, ending)

        # A file is a run's in a folder of one, a folder if its own marker says so.
        ours = (*STRAY, *first_lines(path / MARKER).splitlines())
        strange = [file for file in path.glob("*") if not any(map(file.match, ours))]
        is_folder = path.is_dir()
        usable = is_folder == (name in FOLDERS) and os.access(path, os.W_OK)
        if strange or path.exists() and not (usable and (marked or is_folder)):
            raise MocaError(f"{[path, *strange][-1]} is not a run's (no {MARKER} says so), or may "
                            "not be written: move it, or choose another --output")


def lock(marker: TextIO, output: Path) -> None:
    """Keep other runs out of an output folder until its marker is closed, or the process
    dies. MocaError if one is at work there."""
    # Windows has no locks of this kind, nor have some network disks.
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MocaError(f"--output {output}: another run is at work there: wait for its end, "
                            "or choose another --output") from None


def check_same_run(flags: CommonFlags, saved: dict, data: dict) -> None:
    """MocaError if a checkpoint's state is incomplete, or of a run with other flags or
    other data. data: the state of the data that --data names, at its beginning."""
    lacking = {"step", "flags", "data", "log", "skipped"} - saved.keys()
    lacking |= data.keys() - {"fingerprint", *saved.get("data", ())}
    if lacking:
        raise MocaError(f"--resume: the checkpoint says nothing of {', '.join(sorted(lacking))}: "
                        "resume with the stage and version that wrote it, or start anew")
    check_same_flags(flags, saved["flags"])

    # As many records can be others.
    for name in ("records", "fingerprint"):
        before, now = saved["data"].get(name), data.get(name)
        if before and now and before != now:
            raise MocaError(f"--resume: {name} of --data {flags.data}: {before} before, and now "
                            f"{now}: give the same data, or start anew without --resume")
    if saved["step"] > flags.steps:
        raise MocaError(f"--resume: {saved['step']} steps are done: --steps {flags.steps} "
                        "is less")


def check_same_flags(flags: CommonFlags, before: dict) -> None:
    """MocaError if a flag that changes the result differs from the value it had, or is
    no flag of this stage or version.

    A checkpoint that is older than a flag does not name it: nothing to compare.
    """
    for name, value in before.items():
        if name not in MAY_CHANGE and getattr(flags, name, None) != value:
            raise MocaError(f"--resume: --{name.replace('_', '-')} was {value}: give the same "
                            "flags, or start anew without --resume")
