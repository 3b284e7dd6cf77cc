"""Draw the pictures that README, RESULTS.md and docs/ show, from the repository's root:

    python notebooks/figures.py [names] [--run FOLDER]

stages          how the two stages work (stages.py)
journey         one batch on its way through the model, with the shape of every tensor (journey.py)
search          what a caption finds, with the captioner that all starts from and after both
                stages (notebooks/embedder)
captions        what the nano base says to unseen scenes, and how often it is right
reconstruction  what a run of stage 1 restores: that in FOLDER, by default runs/cpt
tables          no picture: RESULTS.md's two tables, printed from ablations.json

Without names all are made. ablations.png is drawn by `python -m nano_moca.ablate`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from helpers import BLUE, GREY, with_palette
from journey import draw_journey
from matplotlib.figure import Figure
from stages import draw_stages

import nano_moca
import train_cpt
from nano_moca.ablate import ARMS, UNLABELLED, difference, measure
from nano_moca.batches import TokenBatches
from nano_moca.builtin import (
    END,
    KNOWN,
    KNOWN_COLOURS,
    NEW,
    SPLITS,
    BuiltinRecords,
    Palette,
    builtin_tasks,
    factor_tasks,
)
from nano_moca.config import BASE
from nano_moca.distributed import World
from nano_moca.evaluate.embedder import Moca
from nano_moca.model import ReconstructionModel
from nano_moca.report import stage1
from nano_moca.report.ranking import rank_pairs

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "notebooks" / "figures"
EMBEDDER = ROOT / "notebooks" / "embedder"
INK = "#222222"


def save(figure: Figure, name: str) -> None:
    """In 256 colours, a third of the bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    small = with_palette(Image.open(picture).convert("RGB"))
    small.save(FIGURES / f"{name}.png", optimize=True)
    plt.close(figure)


# --- what the base says ---------------------------------------------------------------------------


def caption_scores(moca: Moca, names: Sequence[str], count: int = 500) -> dict:
    """How the model captions unseen scenes of these symbols: shares of words and of captions."""
    random = np.random.default_rng((0, SPLITS["test"], len(names)))
    palette = Palette(names, KNOWN_COLOURS, part="test")
    scenes = [palette.scene(random) for _ in range(count)]
    items = [{"text": nano_moca.MARK, "images": [scene.image()]} for scene in scenes]
    said = moca.caption(items, 20)

    # Word by word, at the same place.
    pairs = [(answer.split(), scene.caption().split())
             for answer, scene in zip(said, scenes, strict=True)]
    words = [sum(a == b for a, b in zip(answer, truth)) / len(truth) for answer, truth in pairs]
    return {"words": float(np.mean(words)), "captions": float(np.mean([a == b for a, b in pairs])),
            "examples": list(zip(scenes, said, strict=True))}


def judged(said: str, truth: str) -> stage1.Words:
    """A caption word by word, those in red that another one should stand in place of."""
    cells, parts = truth.split(", "), said.split(", ")
    words = []
    for number, part in enumerate(parts):
        expected = cells[number].split() if number < len(cells) else []
        spoken = part.split()
        for place, word in enumerate(spoken):
            right = expected[place : place + 1] == [word]
            comma = "," if place == len(spoken) - 1 and number < len(parts) - 1 else ""
            words.append((f" {word}{comma}", stage1.SEEN if right else stage1.WRONG))
    return words


def draw_captions() -> Figure:
    """Two rows of scenes: of the symbols that the base knows, and of others; wrong words in red."""
    moca = nano_moca.load(BASE, "cpu")
    figure, axes = plt.subplots(2, 4, figsize=(10.4, 3.5))
    rows = {"symbols that it knows": KNOWN, "the 24 others": NEW}
    for row, (title, names) in zip(axes, rows.items(), strict=True):
        scores = caption_scores(moca, names)
        print(f"{title}: {scores['words']:.1%} of words, {scores['captions']:.1%} of captions right")
        for axis, (scene, said) in zip(row, scores["examples"], strict=False):
            axis.imshow(scene.image())
            axis.set(xticks=[], yticks=[])
            stage1.show_words(axis, judged(said, scene.caption()))
        row[0].set_title(f"{title}: {scores['words']:.1%} of words right", loc="left", fontsize=12)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.16, hspace=0.75, wspace=0.06)
    return figure


# --- what a caption finds -------------------------------------------------------------------------


def draw_search(queries: tuple[int, int] = (158, 140)) -> Figure:
    """Two captions, each among 600 unseen scenes: one of labelled symbols, one of symbols that
    only stage 1 saw. The five nearest scenes before and after training, the right one framed."""
    tasks = {"symbols of the labelled pairs": builtin_tasks("test")["caption-to-scene"],
             "symbols that no labelled pair showed": factor_tasks("test")[UNLABELLED[1]]}
    models = {"before: a captioner": nano_moca.load(BASE, "cpu", None, "causal", "last"),
              "after both stages": nano_moca.load(EMBEDDER, "cpu")}
    figure = plt.figure(figsize=(11, 4.9))
    for half, ((what, task), query) in enumerate(zip(tasks.items(), queries, strict=True)):
        asked = task[query].query.text.removeprefix("Find a picture: ").removesuffix(END)
        top = 1 - half / 2
        figure.text(0.01, top - 0.045, f"“{asked}”", fontsize=16, color=INK, va="center")
        figure.text(0.99, top - 0.045, what, fontsize=11.5, color=GREY, ha="right", va="center")
        for line, (name, moca) in enumerate(models.items()):
            ranking = rank_pairs(task, lambda records, moca=moca: moca.embed(records).numpy())
            places, of = ranking.places(), len(ranking.candidates)
            found = ranking.scores()["recall@10"]
            print(f"{what}, {name}: recall@10 {found:.3f}, query {query}: {places[query]} of {of}")

            # Beside the pictures: where the right one stands, and how often it is among the first.
            bottom = top - 0.245 - 0.19 * line
            figure.text(0.01, bottom + 0.06, f"{name}\nright one: {places[query]} of {of}\n"
                        f"in the first ten:\n{found:.0%} of {len(places)} captions",
                        fontsize=10.5, color=INK, va="center")
            nearest = np.argsort(-ranking.similarities[query], kind="stable")
            for number, answer in enumerate(nearest[:5]):
                axis = figure.add_axes((0.185 + 0.164 * number, bottom, 0.152, 0.12))
                axis.imshow(ranking.candidates[answer].images[0], aspect="auto")
                axis.set(xticks=[], yticks=[])
                right = answer == ranking.right[query]
                axis.spines[:].set(edgecolor=BLUE if right else "white", linewidth=5)
    return figure


# --- what stage 1 restores ------------------------------------------------------------------------


def restorations_of(run: Path) -> list[list[stage1.View]]:
    """What `stage1.restorations` shows of the records that follow a run of stage 1 on the
    built-in data. The run's checkpoint is read: it still has the patch decoder."""
    saved = torch.load(run / "checkpoint" / "rank-00000.pt", weights_only=True)
    moca = nano_moca.load(BASE, "cpu")
    model = ReconstructionModel(moca.model)
    with torch.no_grad():
        for own, value in zip(model.parameters(), saved["parameters"], strict=True):
            own.copy_(value)

    # The records that would have come next: the run's seed and its place in the data.
    flags = train_cpt.Flags(**{name: value for name, value in saved["state"]["flags"].items()
                               if name in train_cpt.Flags.__dataclass_fields__})
    unseen = TokenBatches(BuiltinRecords("train", flags.seed), moca.processor,
                          stage1.REPORT_TOKENS, flags.max_tokens, flags.seed,
                          state=saved["state"]["data"])
    items = [item for item in next(unseen).micro_batches[0] if len(item[1].grids) == 1][:4]
    world = World(0, 1, torch.device("cpu"), torch.float32)
    return stage1.restorations(model, moca.processor, items, flags.text_mask, flags.image_mask,
                               flags.seed, world, causal=False)


def draw_reconstruction(run: Path) -> None:
    """As the run itself draws it at its end, by the code as it is now."""
    path = FIGURES / "reconstruction.png"
    stage1.plot_restorations(path, restorations_of(run))
    with_palette(Image.open(path).convert("RGB")).save(path, optimize=True)


# --- RESULTS.md's two tables ----------------------------------------------------------------------

COLUMNS = {  # of the table of arms: tasks, and the figure of which the mean is shown
    "unlabelled symbols": (UNLABELLED, "recall@10"), "twins beaten": (UNLABELLED, "twins beaten"),
    "labelled symbols": (("scene-to-caption, labelled symbols",
                          "caption-to-scene, labelled symbols"), "recall@10"),
    "pages": (("page-retrieval",), "recall@10"), "passages": (("long-text",), "recall@10"),
    "text pairs": (("text-pairs",), "recall@10"), "mixed shelf": (("mixed shelf",), "recall@10")}


def arms_table(results: dict) -> str:
    """A row for each arm: the mean over its runs of each figure, and of the first the least and
    the largest as well."""
    lines = [f"| arm | runs | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name, seeds in results.items():
        cells = []
        for number, judge in enumerate(COLUMNS.values()):
            values = measure(seeds, judge)
            wide = f" ({values.min():.2f} to {values.max():.2f})" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{'' if number else wide}")
        lines.append(f"| {ARMS[name].about} | {len(seeds)} | {' | '.join(cells)} |")

    # What guessing gives does not depend on the arm.
    some = next(iter(results.values()))
    chances = [0.5 if figure == "twins beaten" else measure(some, (tasks, f"chance {figure}")).mean()
               for tasks, figure in COLUMNS.values()]
    lines.append(f"| *guessing* | | {' | '.join(f'{chance:.3f}' for chance in chances)} |")
    return "\n".join(lines)


def signs_table(results: dict) -> str:
    """A row for each arm that the paper has: both differences from the full recipe, in points."""
    lines = ["| arm | the paper | here | runs | of | verdict |", "| --- " * 6 + "|"]
    for name, seeds in results.items():
        arm = ARMS[name]
        if arm.paper is None or "full" not in results:
            continue
        gap, half = difference(measure(seeds, arm.judge), measure(results["full"], arm.judge))
        told = f"{100 * gap:+.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")
        verdict = "same sign" if gap * arm.paper > 0 else "other sign"
        if np.isnan(half):
            verdict += ", one run: no interval"
        elif abs(gap) <= half:
            verdict = "not clear of zero"
        tasks = " and ".join(arm.judge[0])
        lines.append(f"| {arm.about} | {arm.paper:+.1f} | {told} | {len(seeds)} and "
                     f"{len(results['full'])} | {arm.judge[1]}, {tasks} | {verdict} |")
    return "\n".join(lines)


def with_tables(text: str, results: dict) -> str:
    """RESULTS.md's text with both tables made anew, each between its two marks."""
    for name, table in (("arms", arms_table(results)), ("signs", signs_table(results))):
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->" + rest.split(
            f"<!-- end of {name} -->")[1]
    return text


def write_tables() -> None:
    """From ablations.json into RESULTS.md."""
    results = json.loads((FIGURES / "ablations.json").read_text(encoding="utf-8"))
    path = ROOT / "RESULTS.md"
    path.write_text(with_tables(path.read_text(encoding="utf-8"), results), encoding="utf-8")


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ("stages", "journey", "search", "captions", "reconstruction", "tables")
    parser.add_argument("names", nargs="*", help="of pictures; default: all")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "cpt",
                        help="a folder of stage 1")
    asked = parser.parse_args()
    for name in asked.names or everything:
        if name not in everything:
            parser.error(f"no picture {name}: there are {', '.join(everything)}")
        match name:
            case "stages":
                draw_stages()
            case "reconstruction":
                draw_reconstruction(asked.run)
            case "tables":
                write_tables()
            case "journey":
                save(draw_journey(), name)
            case "search":
                save(draw_search(), name)
            case "captions":
                save(draw_captions(), name)


if __name__ == "__main__":
    main()
