"""What a trained model is for: vectors of a list of items, and the benchmarks' scores.

    python -m nano_moca.evaluate COMMAND --model DIR|HUB_ID ...

    embed    --input items.jsonl --output vectors.npy [--prompt TEXT]
    builtin  --output scores.json
    mmeb     --data DIR --output scores.json
    vidore   --data DIR --output scores.json

`embed`: items.jsonl holds one object {"text": ..., "images": [...]} per line, the
images beside it. vectors.npy is float32 [lines, D] of unit length, in the file's order:
the best match of a query is the item with the largest dot product. --prompt stands, on
a line of its own, beside each item that is an image without words, such as a page.

`builtin`: the built-in tasks, each query among all answers of its task and their near
twins; then families that differ in one factor alone; then all tasks with one shelf for
all of their answers, the "mixed shelf". `mmeb` and `vidore` read the benchmarks' own
files, parquet or JSON lines: see mmeb.py and vidore.py.

Ties count as wrong: a model that maps everything to one point scores 0. (The released
code counts them as right, and NaN too; here a vector that is not finite is an error
that names its item.) Every score comes with its chance level.

What is done is kept in <output>.vectors, and an interrupted evaluation goes on where it
stopped: see vectors.py.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from nano_moca.batch import MARK
from nano_moca.builtin import builtin_tasks, factor_tasks
from nano_moca.convert.rows import FILE_KINDS
from nano_moca.convert.sources import find_files
from nano_moca.data import Joined, make_record, open_rows
from nano_moca.evaluate import mmeb, vidore
from nano_moca.evaluate.vectors import image_files, make_embedder, save_vectors
from nano_moca.files import MocaError, beside, one_line, regular_file, write_json, writing
from nano_moca.flags import Parser, flag, parse_flags
from nano_moca.model import POOLINGS
from nano_moca.plan.claims import lock
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
            if beside(image, "") == beside(output, ""):
                raise MocaError(f"--output {output} would write over {image}, an image of "
                                f"{record.source}: write elsewhere")
    vectors = make_embedder(flags)(records)  # [N, D]
    save_vectors(output, vectors)
    print(f"{one_line(output)}: {len(vectors)} unit vectors of width {vectors.shape[1]}, "
          f"{prompted} of them with the prompt")


def score_builtin(embed: Embed, flags: BuiltinFlags) -> Scores:
    """The built-in tasks; families of scenes that differ in one factor alone; and all
    tasks once more with one shelf for all of their answers."""
    tasks = builtin_tasks(flags.split)
    own_shelf = []
    for name, task in tasks.items():
        scores = rank_pairs(task, embed).scores()
        own_shelf.append((scores["recall@1"], scores["recall@10"]))
        yield name, scores

    # Each scene stands beside its three twins.
    for name, task in factor_tasks(flags.split).items():
        ranking = rank_pairs(task, embed)
        yield name, ranking.scores() | {"twins beaten": ranking.twins_beaten(4)}

    # Every task counts alike, whatever its size, here as on its own shelf.
    shelf = rank_pairs(Joined(tasks.values()), embed)
    scores = shelf.scores([len(task) for task in tasks.values()])
    own = np.mean(own_shelf, axis=0)
    yield "mixed shelf", scores | {"own shelf recall@1": own[0], "own shelf recall@10": own[1]}


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
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=Path(os.path.realpath(output)).parent).close()

        # What an earlier evaluation wrote has its vectors beside it.
        check_inputs(flags, output, any(kept.glob("*.npy")))
    with writing(kept):
        kept.mkdir(exist_ok=True)
        folder = os.open(kept, os.O_RDONLY)
    try:
        lock(folder, output)
        yield
    finally:
        os.close(folder)


def check_inputs(flags: ModelFlags, output: Path, earlier: bool) -> None:
    """MocaError if a file that is read would be replaced by --output. earlier: it is an
    earlier evaluation's, and may lie in a folder that is read."""
    if not output.exists():
        return
    regular_file(output)
    for name in ("model", "processor", "input", "data", "images"):
        given = Path(getattr(flags, name, None) or os.devnull)
        below = () if earlier else given.rglob("*")
        for file in (given, *below):
            if file.exists() and file.samefile(output):
                raise MocaError(f"--output {output} is a file of --{name} {given}: write elsewhere")


def main(argv: list[str] | None = None) -> None:
    """Choose the command and run it."""
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="nano_moca.evaluate", usage=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(words[:1]).command
    kind = COMMANDS[command]
    flags = parse_flags(kind, words[1:], str(kind.__doc__), f"nano_moca.evaluate {command}")

    flags.output = str(Path(flags.output))  # without a last "/"
    with claim_output(flags):
        if command == "embed":
            embed_file(flags)
        else:
            score(command, flags)
