"""The command line of `python -m nano_moca.evaluate`, which __init__.py describes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nano_moca import evaluate
from nano_moca.batch import MARK
from nano_moca.builtin import NEW, BuiltinPairs, builtin_tasks
from nano_moca.convert.sources import find_files
from nano_moca.data import FILE_KINDS, make_record, open_rows
from nano_moca.evaluate import mmeb, vidore
from nano_moca.evaluate.vectors import image_files, make_embedder, save_vectors
from nano_moca.files import (
    MARKER, MocaError, beside, one_line, regular_file, write_json, writing,
)
from nano_moca.flags import Parser, flag, main_guard, parse_flags
from nano_moca.model import POOLINGS
from nano_moca.plan import lock
from nano_moca.report.ranking import Embed, Scores, rank_pairs

BENCHMARKS = {"mmeb": mmeb, "vidore": vidore}
MOST = 2**31 - 1  # of pixels or tokens


@dataclass
class ModelFlags:
    """Which model, and how it is run: flags of all commands."""

    model: str = flag("", "checkpoint: a folder or a hub id (needed)")
    output: str = flag("", "the file to write (needed)")
    attention: str = flag(None, "default: as trained; bidirectional if unknown",
                          choices=("bidirectional", "causal"))
    pooling: str = flag(None, "default: as trained; mean, or last if causal", choices=POOLINGS)
    dtype: str = flag(None, "default: float32 on cpu, the checkpoint's own on cuda",
                      choices=("float32", "bfloat16"))
    device: str = flag(None, "default: cuda if there is one", choices=("cpu", "cuda"))
    min_pixels: int = flag(None, "smallest image area (default: the checkpoint's)", 1, MOST)
    max_pixels: int = flag(None, "largest image area (default: the checkpoint's)", 1, MOST)
    max_tokens: int = flag(None, "longer texts are shortened (default: as trained)", 1, MOST)
    processor: str = flag(None, "checkpoint whose tokenizer and image processor to take "
                          "(default: --model's)")
    allow_extra: bool = flag(False, "accept tensors in --model that no part of it wants")


@dataclass
class EmbedFlags(ModelFlags):
    """Of the command `embed`."""

    input: str = flag("", "JSON lines of text and images (needed)")
    prompt: str = flag(None, "put beside images without words")


@dataclass
class BuiltinFlags(ModelFlags):
    """Of the command `builtin`."""

    split: str = flag("test", "which of the built-in pairs", choices=("test", "development"))


@dataclass
class MmebFlags(ModelFlags):
    """Of the command `mmeb`."""

    data: str = flag("", "folder with one subfolder per task (needed)")
    images: str = flag(None, "the images' folder (default: --data)")


@dataclass
class VidoreFlags(ModelFlags):
    """Of the command `vidore`."""

    data: str = flag("", "folder with one subfolder per task (needed)")
    prompt: str = flag("Represent the given document image.", "put beside each page")


COMMANDS = {"embed": EmbedFlags, "builtin": BuiltinFlags, "mmeb": MmebFlags,
            "vidore": VidoreFlags}


def embed_file(flags: EmbedFlags) -> None:
    """The command `embed`."""
    # A wrong line is an error before the model is loaded.
    output = Path(flags.output)
    records = [make_record(*row) for row in open_rows(flags.input, columns=("text", "images"))]

    # The prompt stands beside what has no words of its own, such as pages.
    prompted = 0
    for record in records:
        words = record.text.replace(MARK, "").strip()
        if flags.prompt and record.images and not words:
            record.text += f"\n{flags.prompt}"
            prompted += 1
        for image in image_files(record):
            if beside(image, "") in (beside(output, ""), beside(output, ".new")):
                raise MocaError(f"--output {output} would write over {image}, an image of "
                                f"{record.source}: write elsewhere")
    vectors = make_embedder(flags)(records)  # [N, D]
    save_vectors(output, vectors)
    print(f"{one_line(output)}: {len(vectors)} unit vectors of width {vectors.shape[1]}, "
          f"{prompted} of them with the prompt")


def score_builtin(embed: Embed, flags: BuiltinFlags) -> Scores:
    """The built-in tasks, and scenes of symbols that the nano base never met."""
    # In a scene of both kinds of symbols the known ones may be enough.
    tasks = builtin_tasks(flags.split)
    for name in ("scene-to-caption", "caption-to-scene"):
        tasks[f"{name}, new symbols"] = BuiltinPairs(name, flags.split, 0, NEW)
    for name, task in tasks.items():
        yield name, rank_pairs(task, embed).scores()


def score_folders(benchmark: Any, embed: Embed, flags: Any) -> Scores:
    """A benchmark's tasks: the folders in DATA that hold files of data."""
    for folder in sorted(Path(flags.data).glob("[!.]*")):
        if folder.is_dir() and find_files(folder, "*", FILE_KINDS):
            yield from benchmark.score_folder(folder, embed, flags)


def score(command: str, flags: Any) -> None:
    """The commands that score. What is done stands in the file after each task."""
    embed = make_embedder(flags)
    if command == "builtin":
        scored = score_builtin(embed, flags)
    else:
        scored = score_folders(BENCHMARKS[command], embed, flags)

    tasks: dict[str, dict[str, float]] = {}
    for name, scores in scored:
        # A task's first figure is the one that its benchmark reports.
        tasks[name] = scores
        metric = next(iter(scores))
        means = averages(command, metric, tasks)
        content = {"model": flags.model, "tasks": tasks, f"average {metric}": means}
        write_json(Path(flags.output), content)

        figures = [f"{key} {value:.4g}" for key, value in scores.items()]
        print(f"{one_line(name):32s}", *figures, flush=True)

    if not tasks:
        raise MocaError(f"--data {flags.data} holds no task: give a folder with one subfolder "
                        "per task")

    # Tasks of another name are in the file, but in no mean of MMEB's.
    shown = "; ".join(f"{name}: {mean:.3f}" for name, mean in means.items())
    print(f"average {metric}:", shown or "no task has a name that the benchmark knows")


def averages(command: str, metric: str, tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over tasks as the benchmark reports them. The count of tasks found is part
    of each name."""
    groups = {"overall": list(tasks)}
    if command in BENCHMARKS:
        groups = BENCHMARKS[command].meta_tasks(list(tasks))

    # Not all tasks have to be there.
    means = {}
    for group, members in groups.items():
        scores = [tasks[name][metric] for name in members if name in tasks]
        if scores:
            label = f"{group} ({len(scores)} of {len(members)} tasks)"
            means[label] = float(np.mean(scores))
    return means


@contextmanager
def claim_output(flags: ModelFlags) -> Iterator[None]:
    """The work goes on inside it: --output can be written, is no file that is read, and
    belongs to this evaluation alone. MocaError if that cannot be."""
    output = Path(flags.output)
    kept = Path(flags.output + ".vectors")
    fresh = beside(output, ".new")
    with writing(output):
        # What an earlier evaluation wrote has its vectors beside it.
        earlier = any(kept.glob("*.npy"))
        check_inputs(flags, output, fresh, earlier)
        if output.exists():
            regular_file(output)
        if not fresh.exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            fresh.touch()
            fresh.unlink()
    with writing(kept):
        kept.mkdir(exist_ok=True)
        marker = open(kept / MARKER, "a")
    with marker:
        lock(marker, output)
        yield


def check_inputs(flags: ModelFlags, output: Path, fresh: Path, earlier: bool) -> None:
    """MocaError if what is read, or somebody else's, would be replaced by --output, or by
    the file `fresh` that becomes it. earlier: --output is an earlier evaluation's, and
    may lie in a folder that is read."""
    if fresh.exists() and not earlier:
        raise MocaError(f"--output {output} is written as {fresh} first, which is there: move it, "
                        "or write elsewhere")
    places = [place for place in (output, fresh) if place.exists()]
    for name in ("model", "processor", "input", "data", "images"):
        given = Path(getattr(flags, name, None) or os.devnull)
        below = given.rglob("*") if fresh in places or places and not earlier else ()
        for file in (given, *below):
            for place in places:
                ours = earlier and place == output and file != given
                if not ours and file.exists() and file.samefile(place):
                    raise MocaError(f"--output {output} is a file of --{name} {given}, or would "
                                    "write over one: write elsewhere")


def main(argv: list[str] | None = None) -> None:
    """Choose the command and run it."""
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="nano_moca.evaluate", usage=evaluate.__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(words[:1]).command
    flags = parse_flags(COMMANDS[command], words[1:], f"nano_moca.evaluate {command}")

    flags.output = str(Path(flags.output))  # without a last "/"
    with claim_output(flags):
        if command == "embed":
            embed_file(flags)
        else:
            score(command, flags)


if __name__ == "__main__":
    main_guard(main)
