"""The command line of `python -m nano_moca.evaluate`, which __init__.py describes."""

import argparse
from pathlib import Path

import numpy as np

from nano_moca.builtin import NEW, BuiltinPairs, builtin_tasks
from nano_moca.data import make_record, open_rows
from nano_moca.evaluate import mmeb, vidore
from nano_moca.evaluate.vectors import make_embedder, save_vectors
from nano_moca.files import write_json
from nano_moca.flags import Parser, main_guard
from nano_moca.model import POOLINGS
from nano_moca.report.ranking import Embed, Scores, rank_pairs


def embed_file(args: argparse.Namespace) -> None:
    """The command `embed`."""
    # A wrong line is an error before the model is loaded.
    records = [make_record(*row) for row in open_rows(args.input)]
    embed = make_embedder(args)
    vectors = embed(records)  # [N, D]
    save_vectors(Path(args.output), vectors)
    print(f"{args.output}: {len(vectors)} unit vectors of width {vectors.shape[1]}")


def score_builtin(embed: Embed, args: argparse.Namespace) -> Scores:
    """The built-in tasks, and scenes of symbols that the nano base never met."""
    # In a scene of both kinds of symbols the known ones may be enough.
    tasks = builtin_tasks(args.split)
    for name in ("scene-to-caption", "caption-to-scene"):
        tasks[f"{name}, new symbols"] = BuiltinPairs(name, args.split, 0, NEW)
    for name, task in tasks.items():
        yield name, rank_pairs(task, embed).scores()


SCORERS = {"builtin": score_builtin, "mmeb": mmeb.score_tasks, "vidore": vidore.score_tasks}


def score(args: argparse.Namespace) -> None:
    """The commands that score. What is done stands in the file after each task."""
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, dict[str, float]] = {}
    for name, scores in SCORERS[args.command](make_embedder(args), args):
        tasks[name] = scores
        figures = [f"{key} {value:.4g}" for key, value in scores.items()]
        print(f"{name:32s}", *figures, flush=True)

        # A task's first figure is the one that its benchmark reports.
        metric = next(iter(scores))
        means = averages(metric, tasks)
        content = {"model": args.model, "tasks": tasks, f"average {metric}": means}
        write_json(output, content)

    # Tasks of another name are in the file, but in no mean of MMEB's.
    shown = "; ".join(f"{name}: {mean:.3f}" for name, mean in means.items())
    print(f"average {metric}:", shown or "no task has a name that the benchmark knows")


def averages(metric: str, tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over tasks as the benchmark reports them. The count of tasks found is part
    of each name."""
    groups = mmeb.meta_tasks() if metric == "precision@1" else {"overall": list(tasks)}

    # Not all tasks have to be there.
    means = {}
    for group, members in groups.items():
        scores = [tasks[name][metric] for name in members if name in tasks]
        if scores:
            label = f"{group} ({len(scores)} of {len(members)} tasks)"
            means[label] = float(np.mean(scores))
    return means


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

    # And on what, which each command says in its own flags.
    shared = {"parents": [common], "allow_abbrev": False}
    command = commands.add_parser("embed", help="items.jsonl to vectors.npy", **shared)
    command.add_argument("--input", required=True, help="JSON lines of text and images")
    command = commands.add_parser("builtin", help="score on the built-in tasks", **shared)
    command.add_argument("--split", choices=("test", "development"), default="test")
    command = commands.add_parser("mmeb", help="score on MMEB", **shared)
    command.add_argument("--data", required=True, help="folder with one subfolder per task")
    command.add_argument("--images", help="the images' folder (default: --data)")
    command = commands.add_parser("vidore", help="score on ViDoRe", **shared)
    command.add_argument("--data", required=True, help="folder with one subfolder per task")
    command.add_argument("--prompt", default="Represent the given document image.",
                         help="put beside each page")

    # Argparse knows no ranges.
    args = parser.parse_args(argv)
    for limit in (args.min_pixels, args.max_pixels):
        if limit is not None and limit < 1:
            parser.error(f"{limit} pixels are too few for an image")
    run = embed_file if args.command == "embed" else score
    run(args)


if __name__ == "__main__":
    main_guard(main)
