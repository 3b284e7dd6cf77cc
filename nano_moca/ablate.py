"""What each part of MoCa is worth in miniature: the paper's ablations on the built-in data.

    python -m nano_moca.ablate [--arms both,none] [--seeds 3] [--output runs/ablations]

Each arm is both stages with other flags, over some seeds; all are judged on the same unseen scenes
(`nano_moca.evaluate builtin`). A run of both stages takes about 15 minutes on one core. Finished
runs are skipped, interrupted ones resume. Writes ablations.json (by arm and seed: minutes of
training, and all scores) and ablations.png into --output. Notebook 6 reads them beside the paper's
own table.

Two arms that the paper lacks separate the effect of reconstruction from that of more data: stage
1's records and steps under the next-token loss, then fine-tuned bidirectionally, or left causal.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import train_cl
import train_cpt
from nano_moca import evaluate
from nano_moca.builtin import train_base
from nano_moca.config import BASE, MocaError, write_json
from nano_moca.trainer import flag, parse_flags, run


class Arm(NamedTuple):
    """Both stages with other flags."""

    about: str
    stage_1: str | None = ""  # flags; None: no stage 1
    stage_2: str = ""
    small: bool = False  # begins with a smaller base


ARMS = {
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
SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3}  # for 160, 432, 5
SMALL_VISION = {"hidden_size": 64, "intermediate_size": 176, "num_heads": 2, "out_hidden_size": 96}
SHOWN = ("scene-to-caption", "caption-to-scene")


@dataclass
class Flags:
    """Which arms, and how often."""

    arms: str = flag(",".join(ARMS), "comma-separated arms")
    seeds: int = flag(3, "runs of each arm: seeds 0, 1, ...", low=1)
    output: str = flag("runs/ablations", "folder for all runs, ablations.json and ablations.png")


def small_base(output: Path) -> Path:
    """A base of 0.4 times the parameters, made as the nano base was (15 minutes on one core)."""
    folder = output / "base-small"
    if not (folder / "scores.json").exists():
        shape = Path(shutil.copytree(BASE, folder / "shape", dirs_exist_ok=True))
        config = json.loads((shape / "config.json").read_text())
        vision = config["vision_config"] | SMALL_VISION
        write_json(shape / "config.json", config | SMALL | {"vision_config": vision})
        train_base(shape, ["--output", str(folder), "--resume"])
    return folder / "model"


def minutes(run: Path) -> float:
    """What the steps of a run took, from its log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return sum(line["tokens"] / line["tokens_per_second"] for line in lines) / 60


def scores(arm: str, seed: int, flags: Flags) -> dict[str, Any]:
    """Run what is not done yet of one arm with one seed; its minutes, and its scores by task."""
    _, first, second, small = ARMS[arm]
    output, common, took = Path(flags.output), ["--seed", str(seed), "--resume"], 0.0
    model, size = (small_base(output), "-small") if small else (BASE, "")
    if first is not None:  # arms with the same stage 1 share it
        stage_1 = output / f"cpt{size}{re.sub('[^a-z0-9]+', '-', first)}-{seed}"
        if not (stage_1 / "scores.json").exists():
            words = ["--model", str(model), "--output", str(stage_1), *common, *first.split()]
            train_cpt.train(parse_flags(train_cpt.Flags, words, ""))
        model, took = stage_1 / "model", minutes(stage_1)
    stage_2 = output / f"cl-{arm}-{seed}"
    if not (stage_2 / "scores.json").exists():
        words = ["--model", str(model), "--output", str(stage_2), *common, *second.split()]
        train_cl.train(parse_flags(train_cl.Flags, words, ""))
    test = stage_2 / "test.json"
    if not test.exists():
        evaluate.main(["builtin", "--model", str(stage_2 / "model"), "--output", str(test)])
    took += minutes(stage_2)
    return {"minutes": round(took, 1), "tasks": json.loads(test.read_text())["tasks"]}


def recalls(seeds: dict[str, dict], task: str) -> np.ndarray:
    """Recall@1 of each seed of an arm, [seeds]."""
    return np.array([run["tasks"][task]["recall@1"] for run in seeds.values()])


def plot(path: Path, results: dict[str, dict[str, dict]]) -> None:
    """One row per arm: the mean of recall@1 over seeds as a bar, minimum to maximum as an error
    bar, each seed as a dot; both ways."""
    from matplotlib.figure import Figure

    figure = Figure((11, 1 + 0.42 * len(results)), layout="constrained")
    axes, names = figure.subplots(1, len(SHOWN), sharey=True), [ARMS[arm].about for arm in results]
    for axis, task in zip(axes, SHOWN, strict=True):
        for row, seeds in enumerate(results.values()):
            values = recalls(seeds, task)
            mean = values.mean()
            axis.barh(row, mean, xerr=[[mean - values.min()], [values.max() - mean]], capsize=4,
                      color="#9db4d8" if row else "#1f4e9c")
            axis.plot(values, [row] * len(values), "o", color="#222222", markersize=4)
        axis.set(title=f"{task}: recall@1", xlim=(0, 1), yticks=range(len(names)))
        axis.set_yticklabels(names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def ablate(flags: Flags) -> None:
    """All arms and seeds; the table and the picture are whole after each. Arms and seeds that an
    earlier call with this output had are kept in both."""
    arms, output = flags.arms.split(","), Path(flags.output)
    if not {*arms} <= ARMS.keys():
        raise MocaError(f"--arms {flags.arms}: the arms are {', '.join(ARMS)}")
    table, results = output / "ablations.json", {}
    if table.exists():
        results = json.loads(table.read_text())
    for seed in range(flags.seeds):  # every arm once before any a second time
        for number, arm in enumerate(arms, 1 + seed * len(arms)):
            print(f"run {number} of {len(arms) * flags.seeds}: {ARMS[arm].about}, seed {seed}")
            results.setdefault(arm, {})[f"seed {seed}"] = scores(arm, seed, flags)
            results = {arm: results[arm] for arm in ARMS if arm in results}  # in their order
            write_json(table, results)
            plot(output / "ablations.png", results)
    print(f"recall@1, {' and '.join(SHOWN)}: mean over seeds (minimum to maximum)")
    for arm, seeds in results.items():
        columns = [recalls(seeds, task) for task in SHOWN]
        print(f"{ARMS[arm].about:42s}", *(f"{values.mean():.3f} ({values.min():.3f} to "
                                          f"{values.max():.3f})  " for values in columns))


if __name__ == "__main__":
    run(lambda: ablate(parse_flags(Flags, None, __doc__)))
