"""Errors in one line, JSON, and folders that a crash cannot leave half written.

Whatever the user can fix is a `MocaError`: one line that names the file and says
what to do. Anything else that goes wrong is a bug and keeps its traceback.

A checkpoint takes minutes to write and replaces the only one there is. So it is not
written under its own name:

    folder.new    is written, and flushed to the disk
    folder        is renamed to folder.old
    folder.new    is renamed to folder; then folder.old is removed

A rename happens completely or not at all. So whenever the process dies, a complete
folder is left as `folder` or as `folder.old`, and `find_folder` finds it.

Left out: locks. Two runs that write into one folder spoil each other's files.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MocaError(Exception):
    """An error that the user can fix: one line with a file's name and what to do."""


def read_json(path: Path) -> dict:
    """One JSON object from a file; MocaError if absent, malformed or no object."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}  # TypeError if no object
    except (OSError, ValueError, TypeError) as error:
        # An OSError's text repeats the path; its strerror is the reason alone.
        reason = getattr(error, "strerror", None) or error
        advice = "give the folder of a Qwen-VL checkpoint"
        raise MocaError(f"{path} cannot be read ({reason}): {advice}") from None


def write_json(path: Path, content: dict) -> None:
    """A JSON file that a person can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a MocaError of whatever is raised when a disk is full or read-only."""
    try:
        yield
    # OSError, RuntimeError, SafetensorError, and the tokenizer's plain Exception.
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MocaError(f"{folder} cannot be written ({reason}): make room on the disk") from None


def find_folder(folder: Path) -> Path:
    """`folder`, put back from its `.old` if a crash fell between the two renames of
    `replace_folder`."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    return folder


def fresh_folder(folder: Path) -> Path:
    """An empty `<folder>.new` to write into; once it is complete, `replace_folder`
    gives it its name."""
    fresh = folder.with_name(folder.name + ".new")

    # A crash while it was written left it half full: start again.
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def replace_folder(folder: Path) -> None:
    """Put `<folder>.new` in the place of `folder`. A crash at any moment leaves the
    old or the new one complete, for `find_folder` to find."""
    fresh = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")

    # A rename may reach the disk before the content does: flush the content first.
    for file in fresh.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())

    # After an earlier crash .old may be the only complete one: put it back first.
    find_folder(folder)
    shutil.rmtree(old, ignore_errors=True)

    # Between the two renames nothing has the name, but .old and .new are complete.
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
