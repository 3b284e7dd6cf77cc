"""What each part of MoCa is worth in miniature: the paper's ablations on the embedded default.

    python -m nano_moca.ablate [--arms both,none] [--seeds 3] [--output runs/ablations]

Each arm is both stages with other flags, over some seeds; all are judged on the same unseen scenes
(`nano_moca.evaluate builtin`). A run of both stages takes about 15 minutes of one core. What is
done is not done again, and what was interrupted goes on where it stopped. Writes ablations.json
(all scores, by arm and seed) and ablations.png into --output.

Two arms that the paper lacks tell the worth of restoring from the worth of more data: stage 1's
records and steps under the causal next-token loss, fine-tuned as the others are, or staying causal.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train_cl
import train_cpt
from nano_moca import evaluate
from nano_moca.config import BASE, MocaError, write_json
from nano_moca.trainer import flag, parse_flags, run

# arm: (what it is, flags of stage 1 or None for no stage 1, flags of stage 2)
ARMS = {
    "both": ("both stages", "", ""),
    "mlm": ("words only are restored", "--image-mask 0", ""),
    "mae": ("patches only are restored", "--text-mask 0", ""),
    "none": ("no stage 1, bidirectional", None, ""),
    "causal": ("no stage 1, causal", None, "--attention causal"),
    "control": ("stage 1 by the causal loss", "--objective next-token", ""),
    "control-causal": ("the same, staying causal", "--objective next-token", "--attention causal"),
    "no-documents": ("no long documents", "", "--without long-document"),
    "no-text-pairs": ("no text-only pairs", "", "--without text-only"),
    "mixed": ("batches of mixed tasks", "", "--task-batches off"),
    "quarter": ("a quarter of stage 1's steps", "--steps 250", ""),
    "half": ("half of stage 1's steps", "--steps 500", ""),
    "double": ("twice stage 1's steps", "--steps 2000", ""),
}
SHOWN = ("scene-to-caption", "caption-to-scene")


@dataclass
class Flags:
    """Which arms, and how often."""

    arms: str = flag(",".join(ARMS), "which, by commas")
    seeds: int = flag(3, "runs of each arm: seeds 0, 1, ...", low=1)
    steps: int = flag(300, "of stage 2", low=1)
    output: str = flag("runs/ablations", "folder for all runs, ablations.json and ablations.png")


def scores(arm: str, seed: int, flags: Flags) -> dict[str, dict[str, float]]:
    """Run what is not done yet of one arm with one seed; its scores by task."""
    _, first, second = ARMS[arm]
    output, model, common = Path(flags.output), BASE, ["--seed", str(seed), "--resume"]
    if first is not None:  # arms with the same stage 1 share it
        stage_1 = output / f"cpt{re.sub('[^a-z0-9]+', '-', first)}-{seed}"
        if not (stage_1 / "scores.json").exists():
            words = ["--output", str(stage_1), *common, *first.split()]
            train_cpt.train(parse_flags(train_cpt.Flags, words, ""))
        model = stage_1 / "model"
    stage_2 = output / f"cl-{arm}-{seed}"
    if not (stage_2 / "scores.json").exists():
        words = ["--model", str(model), "--output", str(stage_2), "--steps", str(flags.steps)]
        train_cl.train(parse_flags(train_cl.Flags, [*words, *common, *second.split()], ""))
    test = stage_2 / "test.json"
    if not test.exists():
        causal = ["--attention", "causal", "--pooling", "last"] if "causal" in second else []
        words = ["builtin", "--model", str(stage_2 / "model"), "--output", str(test), *causal]
        evaluate.main(words)
    return json.loads(test.read_text())["tasks"]


def plot(path: Path, results: dict[str, dict[str, dict]]) -> None:
    """A row an arm: the mean of recall@1 over seeds as a bar, each seed as a dot; both ways."""
    from matplotlib.figure import Figure

    figure = Figure((11, 1 + 0.42 * len(results)), layout="constrained")
    axes, names = figure.subplots(1, len(SHOWN), sharey=True), [ARMS[arm][0] for arm in results]
    for axis, task in zip(axes, SHOWN, strict=True):
        for row, seeds in enumerate(results.values()):
            values = [tasks[task]["recall@1"] for tasks in seeds.values()]
            axis.barh(row, np.mean(values), color="#9db4d8" if row else "#1f4e9c")
            axis.plot(values, [row] * len(values), "o", color="#222222", markersize=4)
        axis.set(title=f"{task}: recall@1", xlim=(0, 1), yticks=range(len(names)))
        axis.set_yticklabels(names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def ablate(flags: Flags) -> None:
    """All arms and seeds; the table and the picture are whole after each."""
    arms, output = flags.arms.split(","), Path(flags.output)
    if not {*arms} <= ARMS.keys():
        raise MocaError(f"--arms {flags.arms}: the arms are {', '.join(ARMS)}")
    results: dict[str, dict[str, dict]] = {}
    for seed in range(flags.seeds):  # every arm once before any a second time
        for arm in arms:
            results.setdefault(arm, {})[f"seed {seed}"] = scores(arm, seed, flags)
            write_json(output / "ablations.json", results)
            plot(output / "ablations.png", results)
    print(f"recall@1, {' and '.join(SHOWN)}: mean over seeds (least to most)")
    for arm, seeds in results.items():
        columns = [[tasks[task]["recall@1"] for tasks in seeds.values()] for task in SHOWN]
        print(f"{ARMS[arm][0]:32s}", *(f"{np.mean(values):.3f} ({min(values):.3f} to "
                                       f"{max(values):.3f})  " for values in columns))


if __name__ == "__main__":
    run(lambda: ablate(parse_flags(Flags, None, __doc__)))
