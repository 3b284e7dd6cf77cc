"""Errors in one line, JSON, and folders that a crash cannot leave half written.

Whatever the user can fix is a `MocaError`: one line that names the file and says
what to do. Anything else that goes wrong is a bug and keeps its traceback.

A checkpoint takes minutes to write and replaces the only one there is. So it is not
written under its own name:

    folder.new    is written, and flushed to the disk
    folder        is renamed to folder.old
    folder.new    is renamed to folder; then folder.old is removed

A rename happens completely or not at all. So whenever the process dies, a complete
folder is left as `folder` or as `folder.old`, and `find_folder` finds it. A file in it,
`.nano_moca`, says what we put there: plan/claims.py keeps a run from replacing anything else.

A single file is written as `.nano_moca.` and some random letters, which two programs that
write it at once do not share, and renamed. A kill may leave that, and no data folder takes
it for data; the next run in the folder removes it.

Left out: flushing a folder after a rename, which only a loss of power could show.
"""

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

MARKER = ".nano_moca"  # in a folder that we wrote: patterns of the names that we put there


class MocaError(Exception):
    """An error that the user can fix: one line with a file's name and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: object) -> str:
    """A text as one line to print: what is written in data, or a file is called, may
    hold line ends and control characters, and could forge a line of ours; or be a
    megabyte long, and is shortened."""
    text = str(text)
    text = text if len(text) <= 5000 else f"{text[:4000]} ... {text[-900:]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# --- files ------------------------------------------------------------------------


def regular_file(path: Path, most: int = 10**15) -> Path:
    """The path itself; MocaError unless it is an ordinary file of at most so many bytes,
    or a link to one. To read a pipe or a device may never end."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise MocaError(f"{path} cannot be read ({reason(error)}): correct the path") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise MocaError(f"{path} is not an ordinary file of at most {most} bytes: give a file")
    return path


def reason(error: Exception) -> str:
    """What went wrong, without the path that the text of an OSError repeats."""
    return getattr(error, "strerror", None) or str(error).strip() or repr(error)


def read_json(path: Path, advice: str = "give the folder of a Qwen-VL checkpoint") -> dict:
    """One JSON object from a file; MocaError if absent, malformed or no object."""
    try:
        return {**json.loads(regular_file(path, 10**8).read_text(encoding="utf-8"))}
    # TypeError if it is no object, RecursionError if it is nested too deep.
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MocaError(f"{path} cannot be read ({reason(error)}): {advice}") from None


def write_json(path: Path, content: dict) -> None:
    """A JSON file that a person can read. An existing one stays until this one is
    complete."""
    put_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make a MocaError that names the path of what is raised when a disk is full or
    may not be written."""
    try:
        yield
    # What the file system, torch.save and safetensors raise.
    except (OSError, RuntimeError, SafetensorError) as error:
        what = reason(error).splitlines()[0]
        raise MocaError(f"{path} cannot be written ({what}): make room on the disk, or choose "
                        "a place that may be written") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. After the block it takes the name, complete
    and on the disk; until then, and whatever fails, what had the name stays."""
    # A link stays one: the file that it points to is replaced; a device never is.
    target = Path(os.path.realpath(path))
    fresh = target.with_name(f"{MARKER}.{secrets.token_hex(8)}")
    try:
        with writing(path):
            if target.exists():
                regular_file(target)
            yield fresh
            flush(fresh)
            fresh.replace(target)
    finally:
        with suppress(OSError):
            fresh.unlink()  # there is one only if something failed


def flush(file: Path) -> None:
    """Return when the content of a file is on the disk: a rename may get there before
    it."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def first_lines(path: Path, count: int | None = None) -> str:
    """The first `count` lines of a text file (None: all); no line if there is no file."""
    if not path.exists():
        return ""
    text = regular_file(path).read_text(encoding="utf-8", errors="replace")
    return "".join(text.splitlines(keepends=True)[:count])


def put_text(path: Path, text: str) -> None:
    """Replace a file, at once, by one of this text; by none if there is no text."""
    if not text:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


# --- folders ----------------------------------------------------------------------


def beside(path: Path, ending: str) -> Path:
    """The path with this ending, where links lead: a link stays one, and the two are on
    one disk, so that one can be renamed to the other."""
    return Path(os.path.realpath(path) + ending)


def discard(folder: Path) -> None:
    """Remove a folder of ours, if there is one. Its marker goes last: by it a later run
    knows what a crash has left."""
    for file in folder.glob("[!.]*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def find_folder(folder: Path) -> Path:
    """`folder`, put back from its `.old` if a crash fell between the two renames of
    `replace_folder`; an `.old` that is left over goes."""
    old = beside(folder, ".old")
    if old.exists() and not folder.exists():
        old.rename(beside(folder, ""))
    discard(old)
    return folder


def fresh_folder(folder: Path) -> Path:
    """An empty `<folder>.new` to write into; once it is complete, `replace_folder`
    gives it its name."""
    fresh = beside(folder, ".new")

    # A crash while it was written left it half full: start again.
    discard(fresh)
    fresh.mkdir(parents=True)
    put_text(fresh / MARKER, "*")  # until it is complete
    return fresh


def replace_folder(folder: Path) -> None:
    """Put `<folder>.new` in the place of `folder`. A crash at any moment leaves the
    old or the new one complete, for `find_folder` to find."""
    fresh = beside(folder, ".new")
    old = beside(folder, ".old")
    put_text(fresh / MARKER, "\n".join(file.name for file in fresh.iterdir()))

    # A rename may reach the disk before the content does: flush the content first.
    for file in filter(Path.is_file, fresh.rglob("*")):
        with writing(file):
            flush(file)

    # After an earlier crash .old may be the only complete one: put it back first.
    find_folder(folder)

    # Between the two renames nothing has the name, but .old and .new are complete.
    if folder.exists():
        beside(folder, "").rename(old)
    fresh.rename(beside(folder, ""))
    discard(old)
