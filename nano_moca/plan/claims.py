"""What a run claims: what it will read, and what it will replace.

A run writes a few names into --output, and a finished run's files of these names are
replaced. So a run is refused if what it would replace is what it reads, if somebody
else put it there, if it cannot be written, or if another run is at work in the folder.
`guarded` in trainer.py, above the `train` of both scripts, asks for this. A reader of the
training path need not know more.

Left out: a disk that gets full. files.py keeps what stood there when it does.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from fnmatch import fnmatchcase
from io import TextIOBase
from itertools import product
from pathlib import Path
from typing import TextIO

from nano_moca.convert.export import REPORT
from nano_moca.convert.sources import split_sources
from nano_moca.data import load_tasks
from nano_moca.files import MARKER, MocaError, beside, first_lines, writing
from nano_moca.flags import CommonFlags

# What a run writes into --output, with the endings that this has for a moment.
FOLDERS = ("checkpoint", "model")
WRITTEN = (*FOLDERS, "log.jsonl", "skipped.jsonl", *REPORT)
ENDINGS = ("", ".new", ".old", ".part")
STRAY = (f"{MARKER}*", ".DS_Store", "._*", ".nfs*")  # what we or systems leave in any folder


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
    with marker, redirect_stdout(Unheard(sys.stdout)):
        # The main rank's lock is that of all.
        if os.environ.get("RANK", "0") == "0":
            lock(marker, output)
            for left in output.glob(f"{MARKER}.*"):  # by a kill
                left.unlink()
        yield


class Unheard(TextIOBase):
    """Standard output to which nobody has to listen: if it cannot be written, as after
    `| head -1`, that costs a run nothing."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Print it, as far as that can be done."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            # What was not printed would be tried again at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def check_inputs(flags: CommonFlags) -> None:
    """MocaError if a flag names what the run replaces in --output, or part of it. Links
    are followed: what counts is where a file is."""
    output = beside(Path(flags.output), "")
    replaced = {beside(output / name, ending) for name, ending in product(WRITTEN, ENDINGS)}

    for name in ("model", "processor", "data", "held_out"):
        flag, value = f"--{name.replace('_', '-')}", getattr(flags, name, None)
        for place in map(Path, split_sources(value, flag) if value else ()):
            # What lies in a checkpoint or a folder of data may be a link to anywhere.
            for file in (place, *filter(Path.is_symlink, place.glob("*"))):
                file = beside(file, "")
                mixed = file == output and name in ("model", "processor")
                if mixed or replaced & {file, *file.parents}:
                    raise MocaError(f"--output {flags.output} would write over {file}, which "
                                    f"{flag} reads: choose another --output")


def check_output(output: Path) -> None:
    """MocaError if the run would replace what no run wrote, or what may not be written."""
    if first_lines(output / MARKER):
        raise MocaError(f"--output {output} is itself what a run or a conversion wrote (see its "
                        f"{MARKER}): choose another --output")

    # A file is a run's in a folder of one, a folder if its own marker says so.
    marked = (output / MARKER).exists()
    for name, ending in product(WRITTEN, ENDINGS):
        path = beside(output / name, ending)
        check_ours(path, path.is_dir() if name in FOLDERS else marked and path.is_file())

        # What is not there yet has to find a place.
        place = path if path.exists() else path.parent
        if output.exists() and not os.access(place, os.R_OK | os.W_OK):
            raise MocaError(f"{place} may not be read and written: allow it, or write elsewhere")


def check_ours(path: Path, usual: bool) -> None:
    """MocaError unless what stands at a path, if anything does, was put there by us: it is
    of the usual kind, and its marker lists all that it holds."""
    ours = (*STRAY, *first_lines(path / MARKER).splitlines())
    strange = [file.name for file in path.glob("*")]
    for pattern in ours:
        strange = [name for name in strange if not fnmatchcase(name, pattern)]
    if os.path.lexists(path) and (strange or path.is_symlink() or not usual):
        raise MocaError(f"{path.joinpath(*strange[:1])} was put there by no run of this version "
                        f"(no {MARKER} names it): move it away, or choose another --output")


def lock(marker: TextIO | int, output: Path) -> None:
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
