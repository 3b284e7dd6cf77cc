"""What each part of MoCa is worth in miniature: the paper's ablations, built-in data.

    python -m nano_moca.ablate [--arms full,none] [--seeds 5] [--table FILE]

Each arm is both stages with other flags, over some seeds; all are judged by the same
unseen pairs (`nano_moca.evaluate builtin`). Runs go two at a time, one thread each, up
to a quarter of an hour a run. Interrupted ones resume; what stands in the table with the same
recipe is not run again. Writes ablations.json (by arm and seed: recipe, hardware,
minutes, all scores) and ablations.png beside it. Notebook 9 reads them beside the
paper's own table.

Arms that the paper lacks separate the effect of reconstruction from that of more data:
stage 1's records under the next-token loss, with the same and with twice the steps,
then fine-tuned bidirectionally, or kept causal. Where an arm drops tasks, stage 2 is
shorter by their steps, so that the others get as many as ever.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nano_moca.builtin.base import run_python, run_script, train_base
from nano_moca.config import BASE
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


STEPS_1, STEPS_2 = 2000, 290  # of the full recipe; stage 2: ten epochs
EPOCH = 29  # steps of one, and of them those of a kind
PER_EPOCH = {"long-document": 12, "text-only": 3}
UNLABELLED = ("scene-to-caption, unlabelled symbols", "caption-to-scene, unlabelled symbols")
Judge = tuple[tuple[str, ...], str]  # tasks, whose mean of this figure is looked at
SYMBOLS: Judge = (UNLABELLED, "recall@10")


class Arm(NamedTuple):
    """Both stages with other flags."""

    about: str
    stage_1: str | None = ""  # flags; None: no stage 1
    stage_2: str = ""
    small: bool = False  # begins with a smaller base
    steps_1: float = 1.0  # times STEPS_1
    without: str = ""  # a kind of pairs
    paper: float | None = None  # the paper's difference from its full recipe, MMEB or ViDoRe-v2
    judge: Judge = SYMBOLS  # what the arm is about


NEXT = "--objective next-token"
DOCUMENTS: Judge = (("page-retrieval", "long-text"), "recall@10")
TEXTS: Judge = (("text-pairs",), "recall@1")
ARMS: dict[str, Arm] = {
    "full": Arm("both stages"),
    "none": Arm("no stage 1", None, paper=-2.1),
    "mae": Arm("no MLM: patches only", "--text-mask 0", paper=-1.3),
    "mlm": Arm("no MAE: words only", "--image-mask 0", paper=-0.7),
    "no-documents": Arm("no long documents", without="long-document", paper=-14.1,
                        judge=DOCUMENTS),
    "no-text-pairs": Arm("no text-only pairs", without="text-only", paper=-0.4, judge=TEXTS),
    "mixed": Arm("mixed-task batches", stage_2="--task-batches off", paper=-0.3),
    "causal": Arm("no stage 1, kept causal", None, "--attention causal", paper=-1.1),
    "full-causal": Arm("both stages, kept causal", "--attention causal", "--attention causal"),
    "next": Arm("next-token stage 1", NEXT),
    "next-causal": Arm("next-token stage 1, kept causal", NEXT, "--attention causal"),
    "next-double": Arm("next-token stage 1, twice the steps", NEXT, steps_1=2),
    "next-double-causal": Arm("the same, kept causal", NEXT, "--attention causal", steps_1=2),
    "quarter": Arm("a quarter of stage 1's steps", steps_1=0.25),
    "half": Arm("half of stage 1's steps", steps_1=0.5),
    "double": Arm("twice stage 1's steps", steps_1=2),
    "four": Arm("four times stage 1's steps", steps_1=4),
    "lora": Arm("adapters of rank 16 in both stages", "--lora 16",
                "--lora 16 --learning-rate 1e-3"),
    "shelf": Arm("hard negatives of all kinds", stage_2="--data builtin:all-kinds"),
    "small": Arm("smaller model, both stages", small=True),
    "small-none": Arm("smaller model, no stage 1", None, small=True),
}
# In place of the nano base's widths of 128 and 344, and 4 heads.
SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3}
SMALL_VISION = {"hidden_size": 48, "intermediate_size": 128, "out_hidden_size": 96}
Table = dict[str, dict[str, Any]]  # by arm and seed


@dataclass
class Flags:
    """Which arms, and how often."""

    arms: str = flag(",".join(ARMS), "comma-separated arms")
    seeds: int = flag(5, "runs of each arm: seeds 0, 1, ...", low=1)
    output: str = flag("runs/ablations", "folder for all runs")
    table: str = flag(None, "ablations.json to go on with (default: the one in --output)")
    at_once: int = flag(2, "runs side by side, one thread each", low=1, high=64)


def recipe(arm: Arm) -> dict[str, str | None]:
    """All that a run of this arm depends on beside its seed and this code: its flags, and
    the weights and shape that it begins with."""
    digest = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()[:12]
    start = f"{digest} smaller" if arm.small else digest
    steps = STEPS_2
    kind = ""
    if arm.without:
        steps = round(STEPS_2 * (1 - PER_EPOCH[arm.without] / EPOCH))
        kind = f"--without {arm.without}"

    # Of a flag that is given twice the last value counts.
    stage_1 = None
    if arm.stage_1 is not None:
        stage_1 = f"--steps {round(STEPS_1 * arm.steps_1)} {arm.stage_1}".strip()
    stage_2 = f"--steps {steps} {kind} {arm.stage_2}"
    return {"base": start, "stage 1": stage_1, "stage 2": " ".join(stage_2.split())}


def small_base(output: Path) -> Path:
    """A base of half the parameters, made as the nano base was."""
    # Its heads stay 32 wide, as mrope_section in config.json asks.
    folder = output / "base-small"
    if not (folder / "model").is_dir():
        shape = Path(shutil.copytree(BASE, folder / "shape", dirs_exist_ok=True))
        config = read_json(shape / "config.json") | SMALL
        config["vision_config"] |= SMALL_VISION
        write_json(shape / "config.json", config)
        train_base(shape, ["--output", str(folder), "--resume"])
    return folder / "model"


def train(script: str, model: Path, folder: Path, seed: int, words: str) -> float:
    """Run a stage into `folder`, unless it is done; the minutes that its steps took.
    words: flags of the arm."""
    # The model is written once, whole, after the last step. (Scores are written earlier, too.)
    if not (folder / "model").is_dir():
        run = ["--model", str(model), "--output", str(folder), "--seed", str(seed)]
        run_script(script, [*run, "--resume", *words.split()])

    # From its log, so that breaks between its parts do not count.
    seconds = 0.0
    with reading(folder / "log.jsonl"):
        for line in (folder / "log.jsonl").read_text().splitlines():
            step = json.loads(line)
            seconds += step["tokens"] / step["tokens_per_second"]
    return seconds / 60


LOCKS: dict[Path, threading.Lock] = {}  # of what several arms share: made by one, once


def run_arm(name: str, seed: int, output: Path) -> dict[str, Any]:
    """Run what is not done yet of one arm with one seed; its entry in the table."""
    words = recipe(ARMS[name])
    model = BASE
    minutes = [0.0]
    if ARMS[name].small:
        with LOCKS.setdefault(output / "base-small", threading.Lock()):
            model = small_base(output)

    # Stage 1 is called after its flags: arms with the same ones share it.
    if words["stage 1"] is not None:
        given = re.sub("[^a-z0-9]+", "-", f"{model.parent.name} {words['stage 1']}")
        stage_1 = output / f"cpt-{given}-{seed}"
        with LOCKS.setdefault(stage_1, threading.Lock()):
            minutes[0] = train("train_cpt.py", model, stage_1, seed, words["stage 1"])
        model = stage_1 / "model"

    # Stage 2 is the arm's own.
    stage_2 = output / f"cl-{name}-{seed}"
    minutes.append(train("train_cl.py", model, stage_2, seed, words["stage 2"]))

    # Attention and pooling are not said: the model's files say them.
    test = stage_2 / "test.json"
    if not test.exists():
        run_python(["-m", "nano_moca.evaluate", "builtin", "--model", str(stage_2 / "model"),
                    "--output", str(test)])
    with reading(test):
        run = {"recipe": words, "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
               "minutes": [round(part, 1) for part in minutes], "tasks": read_json(test)["tasks"]}
        check({"this seed": run})
    return run


def check(seeds: dict[str, dict]) -> None:
    """Raises one error or another unless these are an arm's seeds, with their scores."""
    measure(seeds, SYMBOLS).astype(float).mean()
    for run in seeds.values():
        run["recipe"].values()


def measure(seeds: dict[str, dict], judge: Judge) -> np.ndarray:
    """The mean of a figure over some tasks for each seed of an arm, [seeds]."""
    tasks, figure = judge
    means = []
    for run in seeds.values():
        means.append(np.mean([run["tasks"][task][figure] for task in tasks]))
    return np.array(means)


# Student's t at 0.975 by degrees of freedom.
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def difference(ours: np.ndarray, full: np.ndarray) -> tuple[float, float]:
    """The difference of two means over seeds, and half the width of its 95 % interval,
    wide rather than narrow: by the degrees of freedom of the arm with fewer seeds. NaN
    for a single one."""
    gap = float(ours.mean() - full.mean())
    fewer = min(len(ours), len(full)) - 1
    if not fewer:
        return gap, float("nan")
    variance = ours.var(ddof=1) / len(ours) + full.var(ddof=1) / len(full)
    return gap, float(T_975[min(fewer, 9)] * np.sqrt(variance))


def print_table(results: Table) -> None:
    """The arms' means, and the paper's signs beside ours."""
    print("recall@10 of unlabelled symbols, both ways: mean over seeds (minimum to maximum)")
    for name, seeds in results.items():
        values = measure(seeds, SYMBOLS)
        print(f"{ARMS[name].about:46s} {values.mean():.3f} ({values.min():.3f} to "
              f"{values.max():.3f}), {len(values)} seeds")

    # Each on the figure that the arm is about.
    print("difference from both stages: the paper's; here, with its 95 % interval")
    for name in results:
        arm = ARMS[name]
        if arm.paper is None or "full" not in results:
            continue
        gap, half = difference(*(measure(results[each], arm.judge) for each in (name, "full")))
        verdict = "clear of zero" if abs(gap) > half else "not clear of zero"
        sign = "same sign" if gap * arm.paper > 0 else "other sign"
        print(f"{arm.about:46s} {arm.paper:+.1f}; {100 * gap:+.1f} +- {100 * half:.1f} points of "
              f"{arm.judge[1]}, {' and '.join(arm.judge[0])}: {sign}, {verdict}")


LENGTH = "How long should stage 1 be?"
# Read off the paper's curve: steps of stage 1, and MMEB of the 3B model.
PAPER_LENGTH = [200, 500, 1000, 2000, 3311], [65.7, 66.0, 66.5, 67.0, 67.5]
# Titles of the picture's panels, the arms of each, and its figure.
PANELS: dict[str, tuple[str, Judge]] = {
    "What is each part of stage 1 worth?": ("none mlm mae full-causal full", SYMBOLS),
    "Is it reconstruction, or only more data?":
        ("none causal next next-causal next-double next-double-causal full", SYMBOLS),
    LENGTH: ("quarter half full double four", SYMBOLS),
    "Long documents: pages and passages": ("no-documents full", DOCUMENTS),
    "Text-only pairs: other wordings": ("no-text-pairs full", TEXTS),
    "What else can be changed?": ("mixed shelf lora small-none small full", SYMBOLS)}


def plot_length(axis: Any, shown: list[str], results: Table) -> None:
    """Stage 1's steps on a logarithmic axis: ours as line and dots, the paper's dashed beside
    it, on a scale of its own."""
    steps = [STEPS_1 * ARMS[arm].steps_1 for arm in shown]
    values = [measure(results[arm], SYMBOLS) for arm in shown]
    axis.plot(steps, [seeds.mean() for seeds in values], color="#1f4e9c")
    for step, seeds in zip(steps, values, strict=True):
        axis.plot([step] * len(seeds), seeds, "o", color="#222222", markersize=4)
    axis.set(title=LENGTH, xscale="log", xlabel="steps of stage 1", ylim=(0, 1.02))
    ticks = [200, 500, 1000, 2000, 4000, 8000]
    axis.set_xticks(ticks, [f"{step:,}" for step in ticks])
    axis.minorticks_off()

    other = axis.twinx()
    other.plot(*PAPER_LENGTH, "--s", color="#8a8a8a", markersize=3)
    other.set_ylabel("the paper's MMEB (grey)", color="#8a8a8a")
    other.tick_params("y", colors="#8a8a8a")


@picture
def plot(figure: Any, results: Table) -> None:
    """A panel for each question, an arm a row: the mean over seeds as a bar, each seed as a
    dot; guessing and the full recipe as lines."""
    axes = panels(figure, 3, 2, 6.5, 2.6).flat
    for axis, (title, (arms, judge)) in zip(axes, PANELS.items(), strict=True):
        shown = [arm for arm in arms.split() if arm in results]
        if title == LENGTH:
            plot_length(axis, shown, results)
            continue
        for row, arm in enumerate(shown):
            values = measure(results[arm], judge)
            axis.barh(row, values.mean(), color="#1f4e9c" if arm == "full" else "#9db4d8")
            axis.plot(values, [row] * len(values), "o", color="#222222", markersize=4)
            if arm == "full":
                axis.axvline(values.mean(), color="#1f4e9c", linestyle="--")

            # The same for all arms.
            chance = measure(results[arm], (judge[0], f"chance {judge[1]}")).mean()
            axis.axvline(chance, color="#c8452c", linestyle=":")
        axis.set_yticks(range(len(shown)), [ARMS[arm].about for arm in shown])
        axis.set(title=title, xlim=(0, 1.02))
        axis.invert_yaxis()
    figure.supxlabel("recall@10 (of text-only pairs: recall@1) of unlabelled symbols, or as "
                     "titled; dashed: both stages; dotted: chance")


def ablate(flags: Flags) -> None:
    """All arms and seeds; the table and the picture are complete after each. Arms and
    seeds that the table has beside these are kept in both."""
    arms = flags.arms.split(",")
    if not set(arms) <= ARMS.keys():
        raise MocaError(f"--arms {flags.arms}: the arms are {', '.join(ARMS)}")
    table = Path(flags.table or Path(flags.output) / "ablations.json")
    with reading(table):
        results = read_json(table) if table.exists() else {}
        for name in results:
            check(results[ARMS[name] and name])

    # Every arm once before any a second time; what is there by the same recipe is done.
    missing = []
    for seed in range(flags.seeds):
        for name in arms:
            run = results.get(name, {}).get(f"seed {seed}")
            if run is None or run["recipe"] != recipe(ARMS[name]):
                missing.append((name, seed))
    print(f"{len(missing)} of {len(arms) * flags.seeds} runs to do", flush=True)

    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs, which are processes of their own
    started = time.time()
    with ThreadPoolExecutor(flags.at_once) as pool:
        running = {}
        for name, seed in missing:
            running[pool.submit(run_arm, name, seed, Path(flags.output))] = name, seed
        try:
            for done, finished in enumerate(as_completed(running), 1):
                name, seed = running[finished]
                results.setdefault(name, {})[f"seed {seed}"] = finished.result()
                results = {arm: results[arm] for arm in ARMS if arm in results}  # in their order

                # Kept at once: the next run takes minutes, and may be interrupted.
                write_json(table, results)
                plot(table.with_suffix(".png"), results)
                left = (time.time() - started) / done * (len(missing) - done) / 60
                print(f"{ARMS[name].about}, seed {seed}: done; {len(missing) - done} runs to go, "
                      f"about {left:.0f} minutes", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    plot(table.with_suffix(".png"), results)
    print_table(results)


if __name__ == "__main__":
    main_guard(lambda: ablate(parse_flags(Flags, None, __doc__)))
