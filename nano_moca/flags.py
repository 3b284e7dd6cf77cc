"""Command lines from dataclasses: what both scripts take, and how a mistake ends.

A script's flags are a dataclass. Each field is one flag, with its type, default, help
text and range, so `--help` cannot disagree with the code. A flag that is unknown or
out of range ends the program with one line and exit code 2; any other error that the
user can fix ends it with one line and exit code 1.

Left out: configuration files and flags that depend on each other.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from nano_moca.config import BASE
from nano_moca.files import MocaError, one_line


def flag(default: Any, help: str, low: float = -math.inf, high: float = 2**63 - 1,
         choices: tuple[str, ...] | None = None) -> Any:
    """A field of a flags dataclass: default, help text, and the values that make sense."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without argparse's listing of all flags."""

    def error(self, message: str) -> None:
        """Print the line and end with exit code 2."""
        self.exit(2, f"error: {one_line(message)[:400]} (--help lists the flags)\n")


@dataclass
class CommonFlags:
    """Flags of both scripts. The defaults suit the built-in data on a CPU; a script may
    change them."""

    # What is read and written.
    model: str = flag(str(BASE), "checkpoint to start from: a folder or a hub id")
    data: str = flag("builtin", ".jsonl, .parquet or .arrow file, a folder, or several: a,b")
    cap: int = flag(None, "rows of each file or folder in --data, or task, at most", low=1)
    processor: str = flag(None, "whose tokenizer and image settings to take (default: --model's)")
    allow_extra: bool = flag(False, "accept tensors in --model that no part of it wants")
    output: str = flag("runs/cpt", "folder for log, checkpoint, model and pictures")
    steps: int = flag(2000, "optimiser steps", low=1)
    min_pixels: int = flag(None, "smallest image area (default: the checkpoint's)", low=1)
    max_pixels: int = flag(None, "largest image area (default: the checkpoint's)", low=1)

    # How it is learned.
    attention: str = flag("bidirectional", "of the decoder", choices=("bidirectional", "causal"))
    learning_rate: float = flag(2e-3, "peak value; 2e-6 for 3B and 7B", low=0, high=1)
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises", low=0, high=1)
    clip: float = flag(5.0, "largest gradient norm; inf for no limit", low=1e-9, high=math.inf)
    seed: int = flag(0, "for data order, masks and new weights", low=0)

    # How it runs, and what happens when something breaks.
    device: str = flag(None, "default: cuda if there is one", choices=("cpu", "cuda"))
    dtype: str = flag(None, "default: bfloat16 if the GPU has it", choices=("float32", "bfloat16"))
    lora: int = flag(0, "width of adapters (see lora.py); 0: train all weights", low=0, high=4096)
    checkpointing: bool = flag(False, "recompute activations in backward to save memory")
    save_every: int = flag(100, "steps between checkpoints", low=1)
    resume: bool = flag(False, "continue from the checkpoint in --output")
    on_error: str = flag("stop", "what to do with an unusable record", choices=("stop", "skip"))
    plan: str = flag(None, "say what the run needs on a card of so many GB (80; eight: 80x8)")
    no_report: bool = flag(False, "skip the reports, their scores and pictures")


def parse_flags(kind: type, argv: list[str] | None, description: str, prog: str = "") -> Any:
    """A flags dataclass from the command line (argv None) or from a list of words.

    prog: what --help calls the program, if not by the script's name.
    """
    parser = Parser(prog=prog or None, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {}

    for field in dataclasses.fields(kind):
        names[field.name] = "--" + field.name.replace("_", "-")

        # None and False would tell a reader of --help nothing: the help text does.
        about = field.metadata["help"]
        if field.default not in (None, "") and field.type is not bool:
            about += " (default: %(default)s)"

        # A bool is a switch; any other flag takes a value of the field's type.
        takes = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            takes = {"action": "store_true"}
        parser.add_argument(names[field.name], default=field.default, help=about, **takes)

    # Ends here with exit code 0 (--help) or 2 (a mistake).
    flags = parser.parse_args(argv)

    for field in dataclasses.fields(kind):
        # An unset variable of the shell: a path "" would mean the current folder.
        value = getattr(flags, field.name)
        if isinstance(value, str) and not value.strip():
            parser.error(f"{names[field.name]} is empty: give a value")

        # Argparse knows no ranges; asked this way round, nan is refused too.
        low, high = field.metadata["low"], field.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            parser.error(f"{names[field.name]} {str(value)[:40]} is not from {low} to {high}")
    return kind(**vars(flags))


def main_guard(main: Callable[[], object]) -> None:
    """Run a script's main; an error that the user can fix is one line and exit code 1."""
    # Either may be closed. A character that a terminal lacks is escaped.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")

    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except MocaError as error:
        message = str(error)
    except OSError as error:
        # A full disk, a folder without permission.
        message = f"{error.filename or 'writing'}: {error.strerror or error}: mend it, run again"
    except KeyboardInterrupt:
        message = "interrupted"
    except RuntimeError as error:
        # Another rank has ended, and said why; or torch raises this for a bug of ours.
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if os.environ.get("WORLD_SIZE", "1") == "1" or not lost:
            raise
        message = f"rank {os.environ['RANK']} stops, as another rank has ended or cannot be reached"

    # At once, without cleaning up: other ranks may be waiting for us in a collective.
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    os._exit(1)
