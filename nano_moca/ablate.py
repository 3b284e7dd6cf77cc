"""What each part of MoCa is worth in miniature: the paper's ablations, built-in data.

    python -m nano_moca.ablate [--arms both,none] [--seeds 3] [--output DIR]

Each arm is both stages with other flags, over some seeds; all are judged on the same
unseen scenes (`nano_moca.evaluate builtin`). A run of both stages takes about 15
minutes on one core. Finished runs are skipped, interrupted ones resume. Writes
ablations.json (by arm and seed: minutes of training, and all scores) and ablations.png
into --output. Notebook 6 reads them beside the paper's own table.

Two arms that the paper lacks separate the effect of reconstruction from that of more
data: stage 1's records and steps under the next-token loss, then fine-tuned
bidirectionally, or left causal.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nano_moca.builtin.base import run_script, train_base
from nano_moca.config import BASE
from nano_moca.evaluate.command import main as evaluate
from nano_moca.files import MocaError, read_json, write_json
from nano_moca.flags import flag, main_guard, parse_flags
from nano_moca.report.pictures import panels, picture


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A MocaError that names the file, if its content is not what we left in it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MocaError(f"{path} is not ours, or damaged ({error!r}): move it away") from None


class Arm(NamedTuple):
    """Both stages with other flags."""

    about: str
    stage_1: str | None = ""  # flags; None: no stage 1
    stage_2: str = ""
    small: bool = False  # begins with a smaller base


ARMS: dict[str, Arm] = {
    "both": Arm("both stages"),
    "mlm": Arm("MLM only", "--image-mask 0"),
    "mae": Arm("MAE only", "--text-mask 0"),
    "none": Arm("no stage 1, bidirectional", None),
    "causal": Arm("no stage 1, causal", None, "--attention causal"),
    "control": Arm("next-token stage 1", "--objective next-token"),
    "control-causal": Arm("next-token stage 1, left causal", "--objective next-token",
                          "--attention causal"),
    "no-documents": Arm("no long documents", "", "--without long-document"),
    "no-text-pairs": Arm("no text-only pairs", "", "--without text-only"),
    "mixed": Arm("mixed-task batches", "", "--task-batches off"),
    "quarter": Arm("a quarter of stage 1's steps", "--steps 250"),
    "half": Arm("half of stage 1's steps", "--steps 500"),
    "double": Arm("twice stage 1's steps", "--steps 2000"),
    "small": Arm("smaller model, both stages", small=True),
    "small-none": Arm("smaller model, no stage 1, bidirectional", None, small=True),
    "small-causal": Arm("smaller model, no stage 1, causal", None, "--attention causal", True),
}
# In place of the nano base's widths of 160 and 432, and 5 heads.
SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3}
SMALL_VISION = {"hidden_size": 64, "intermediate_size": 176, "num_heads": 2, "out_hidden_size": 96}
SHOWN = ("scene-to-caption", "caption-to-scene")


@dataclass
class Flags:
    """Which arms, and how often."""

    arms: str = flag(",".join(ARMS), "comma-separated arms")
    seeds: int = flag(3, "runs of each arm: seeds 0, 1, ...", low=1)
    output: str = flag("runs/ablations", "folder for all runs, ablations.json and ablations.png")


def small_base(output: Path) -> Path:
    """A base of 0.4 times the parameters, made as the nano base was (15 minutes on one
    core)."""
    # Its heads stay 32 wide, as mrope_section in config.json asks.
    folder = output / "base-small"
    if not (folder / "scores.json").exists():
        shape = Path(shutil.copytree(BASE, folder / "shape", dirs_exist_ok=True))
        config = read_json(shape / "config.json") | SMALL
        config["vision_config"] |= SMALL_VISION
        write_json(shape / "config.json", config)
        train_base(shape, ["--output", str(folder), "--resume"])
    return folder / "model"


def train(script: str, model: Path, folder: Path, seed: int, more: str) -> float:
    """Run a stage into `folder`, unless it is done; the minutes that its steps took.
    more: flags of the arm."""
    # Its scores are the last thing that a run writes.
    if not (folder / "scores.json").exists():
        words = ["--model", str(model), "--output", str(folder), "--seed", str(seed)]
        run_script(script, [*words, "--resume", *more.split()])

    # From its log, so that breaks between its parts do not count.
    seconds = 0.0
    with reading(folder / "log.jsonl"):
        for line in (folder / "log.jsonl").read_text().splitlines():
            step = json.loads(line)
            seconds += step["tokens"] / step["tokens_per_second"]
    return seconds / 60


def scores(name: str, seed: int, flags: Flags) -> dict[str, Any]:
    """Run what is not done yet of one arm with one seed; its minutes, and its scores
    by task."""
    arm = ARMS[name]
    output = Path(flags.output)
    model = small_base(output) if arm.small else BASE
    minutes = 0.0

    # Stage 1 is called after its flags: arms with the same ones share it.
    if arm.stage_1 is not None:
        size = "-small" if arm.small else ""
        given = re.sub("[^a-z0-9]+", "-", arm.stage_1)
        stage_1 = output / f"cpt{size}{given}-{seed}"
        minutes += train("train_cpt.py", model, stage_1, seed, arm.stage_1)
        model = stage_1 / "model"

    # Stage 2 is the arm's own.
    stage_2 = output / f"cl-{name}-{seed}"
    minutes += train("train_cl.py", model, stage_2, seed, arm.stage_2)

    # Attention and pooling are not said: the model's files say them.
    test = stage_2 / "test.json"
    if not test.exists():
        evaluate(["builtin", "--model", str(stage_2 / "model"), "--output", str(test)])
    with reading(test):
        run = {"minutes": round(minutes, 1), "tasks": read_json(test)["tasks"]}
        check({"this seed": run})
    return run


def check(seeds: dict[str, dict]) -> None:
    """Raises one error or another unless these are an arm's seeds, with their scores."""
    for task in SHOWN:
        recalls(seeds, task).astype(float).mean()


def recalls(seeds: dict[str, dict], task: str) -> np.ndarray:
    """Recall@1 of each seed of an arm, [seeds]."""
    return np.array([run["tasks"][task]["recall@1"] for run in seeds.values()])


@picture
def plot(figure: Any, results: dict[str, dict[str, dict]]) -> None:
    """One row per arm: the mean of recall@1 over seeds as a bar, minimum to maximum as
    an error bar, each seed as a dot; both ways."""
    axes = panels(figure, 1, len(SHOWN), 5.5, 1 + 0.42 * len(results))[0]
    for axis, task in zip(axes, SHOWN, strict=True):
        for row, seeds in enumerate(results.values()):
            values = recalls(seeds, task)
            mean = values.mean()
            spread = [[mean - values.min()], [values.max() - mean]]

            # The first bar is dark, since the others are compared with it.
            colour = "#9db4d8" if row else "#1f4e9c"
            axis.barh(row, mean, xerr=spread, capsize=4, color=colour)
            axis.plot(values, [row] * len(values), "o", color="#222222", markersize=4)
        axis.set(title=f"{task}: recall@1", xlim=(0, 1), yticks=[])
        axis.invert_yaxis()

    # The arms are named on the left.
    axes[0].set_yticks(range(len(results)), [ARMS[name].about for name in results])


def ablate(flags: Flags) -> None:
    """All arms and seeds; the table and the picture are complete after each. Arms and
    seeds that an earlier call with this output had are kept in both."""
    arms = flags.arms.split(",")
    if not set(arms) <= ARMS.keys():
        raise MocaError(f"--arms {flags.arms}: the arms are {', '.join(ARMS)}")
    table = Path(flags.output) / "ablations.json"
    with reading(table):
        results = read_json(table) if table.exists() else {}
        for name in results:
            check(results[ARMS[name] and name])

    # Every arm once before any a second time.
    for seed in range(flags.seeds):
        for number, name in enumerate(arms, 1 + seed * len(arms)):
            run = f"run {number} of {len(arms) * flags.seeds}"
            print(f"{run}: {ARMS[name].about}, seed {seed}", flush=True)
            results.setdefault(name, {})[f"seed {seed}"] = scores(name, seed, flags)
            results = {arm: results[arm] for arm in ARMS if arm in results}  # in their order

            # Kept at once: the next arm takes minutes, and may be interrupted.
            write_json(table, results)
            plot(table.with_suffix(".png"), results)

    # The same as text.
    print(f"recall@1, {' and '.join(SHOWN)}: mean over seeds (minimum to maximum)")
    for name, seeds in results.items():
        columns = []
        for task in SHOWN:
            values = recalls(seeds, task)
            columns.append(f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})  ")
        print(f"{ARMS[name].about:42s}", *columns)


if __name__ == "__main__":
    main_guard(lambda: ablate(parse_flags(Flags, None, __doc__)))
