"""The command line of `python -m nano_moca.evaluate`, which __init__.py describes."""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from nano_moca.batch import MARK
from nano_moca.builtin import NEW, BuiltinPairs, builtin_tasks
from nano_moca.convert.sources import find_files
from nano_moca.data import FILE_KINDS, make_record, open_rows
from nano_moca.evaluate import mmeb, vidore
from nano_moca.evaluate.vectors import image_files, make_embedder, save_vectors
from nano_moca.files import MocaError, one_line, regular_file, write_json, writing
from nano_moca.flags import Parser, main_guard
from nano_moca.model import POOLINGS
from nano_moca.report.ranking import Embed, Scores, rank_pairs

BENCHMARKS = {"mmeb": mmeb, "vidore": vidore}


def embed_file(args: argparse.Namespace) -> None:
    """The command `embed`."""
    # A wrong line is an error before the model is loaded.
    records = [make_record(*row) for row in open_rows(args.input, columns=("text", "images"))]

    # The prompt stands beside what has no words of its own, such as pages.
    prompted = 0
    for record in records:
        words = record.text.replace(MARK, "").strip()
        if args.prompt and record.images and not words:
            record.text += f"\n{args.prompt}"
            prompted += 1
        if os.path.realpath(args.output) in map(os.path.realpath, image_files(record)):
            raise MocaError(f"--output {args.output} is an image of {record.source}: write "
                            "elsewhere")
    embed = make_embedder(args)
    vectors = embed(records)  # [N, D]
    save_vectors(Path(args.output), vectors)
    print(f"{one_line(args.output)}: {len(vectors)} unit vectors of width {vectors.shape[1]}, "
          f"{prompted} of them with the prompt")


def score_builtin(embed: Embed, args: argparse.Namespace) -> Scores:
    """The built-in tasks, and scenes of symbols that the nano base never met."""
    # In a scene of both kinds of symbols the known ones may be enough.
    tasks = builtin_tasks(args.split)
    for name in ("scene-to-caption", "caption-to-scene"):
        tasks[f"{name}, new symbols"] = BuiltinPairs(name, args.split, 0, NEW)
    for name, task in tasks.items():
        yield name, rank_pairs(task, embed).scores()


def task_folders(data: str) -> list[Path]:
    """A benchmark's tasks: the folders in DATA that hold files of data."""
    folders = []
    for folder in sorted(Path(data).glob("[!.]*")):
        if folder.is_dir() and find_files(folder, "*", FILE_KINDS):
            folders.append(folder)
    if not folders:
        raise MocaError(f"--data {data} holds no task: give a folder with one subfolder per task")
    return folders


def score_tasks(embed: Embed, args: argparse.Namespace) -> Scores:
    """The scores of all tasks, as each is done."""
    if args.command == "builtin":
        yield from score_builtin(embed, args)
        return
    for folder in task_folders(args.data):
        yield from BENCHMARKS[args.command].score_folder(folder, embed, args)


def score(args: argparse.Namespace) -> None:
    """The commands that score. What is done stands in the file after each task."""
    tasks: dict[str, dict[str, float]] = {}
    for name, scores in score_tasks(make_embedder(args), args):
        # A task's first figure is the one that its benchmark reports.
        tasks[name] = scores
        metric = next(iter(scores))
        means = averages(args.command, metric, tasks)
        content = {"model": args.model, "tasks": tasks, f"average {metric}": means}
        write_json(Path(args.output), content)

        figures = [f"{key} {value:.4g}" for key, value in scores.items()]
        print(f"{one_line(name):32s}", *figures, flush=True)

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


def check_output(args: argparse.Namespace) -> None:
    """MocaError, before the work, unless --output can be written and is no file that is
    read."""
    output = Path(args.output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=Path(os.path.realpath(output)).parent).close()

    # What an earlier evaluation wrote has its vectors beside it.
    if output.exists():
        regular_file(output)
    if not output.exists() or Path(args.output + ".vectors").is_dir():
        return
    for name in ("model", "processor", "input", "data", "images"):
        given = Path(vars(args).get(name) or os.devnull)
        for file in (given, *given.rglob("*")):
            if file.exists() and file.samefile(output):
                raise MocaError(f"--output {output} is a file of --{name} {given}: write elsewhere")


def main(argv: list[str] | None = None) -> None:
    """Choose the command and run it."""
    parser = Parser(prog="nano_moca.evaluate", allow_abbrev=False,
                    description="Embed and score with a trained model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    # Which model, and how it is run.
    common = Parser(add_help=False)
    common.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
    common.add_argument("--output", required=True, help="the file to write")
    common.add_argument("--attention", choices=("bidirectional", "causal"),
                        help="default: as the model was trained; bidirectional if unknown")
    common.add_argument("--pooling", choices=POOLINGS,
                        help="default: as the model was trained; else mean, or last if causal")
    common.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="default: float32 on cpu, the checkpoint's own on cuda")
    common.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if any")
    for limit in ("--min-pixels", "--max-pixels"):
        common.add_argument(limit, type=int, metavar="N", help="default: the checkpoint's")
    common.add_argument("--max-tokens", type=int, metavar="N",
                        help="longer texts are shortened; default: as the model was trained")
    common.add_argument("--processor", metavar="DIR|HUB_ID",
                        help="whose tokenizer and image limits; default: the model's own")
    common.add_argument("--allow-extra", action="store_true",
                        help="leave out tensors that no part of the model wants")

    # And on what, which each command says in its own flags.
    shared = {"parents": [common], "allow_abbrev": False}
    command = commands.add_parser("embed", help="items.jsonl to vectors.npy", **shared)
    command.add_argument("--input", required=True, help="JSON lines of text and images")
    command.add_argument("--prompt", help="put beside images without words")
    command = commands.add_parser("builtin", help="score on the built-in tasks", **shared)
    command.add_argument("--split", choices=("test", "development"), default="test")
    command = commands.add_parser("mmeb", help="score on MMEB", **shared)
    command.add_argument("--data", required=True, help="folder with one subfolder per task")
    command.add_argument("--images", help="the images' folder (default: --data)")
    command = commands.add_parser("vidore", help="score on ViDoRe", **shared)
    command.add_argument("--data", required=True, help="folder with one subfolder per task")
    command.add_argument("--prompt", default="Represent the given document image.",
                         help="put beside each page (default: %(default)s)")

    # Argparse knows no ranges, and takes "" for the current folder.
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if not str(value).strip():
            parser.error(f"{flag} is empty: give a value")
        if type(value) is int and not 1 <= value < 2**31:
            parser.error(f"{flag} {str(value)[:20]} is not from 1 to {2**31 - 1}")
    args.output = str(Path(args.output))  # without a last "/"
    check_output(args)
    run = embed_file if args.command == "embed" else score
    run(args)


if __name__ == "__main__":
    main_guard(main)
