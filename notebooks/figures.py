"""Draw the pictures that README, RESULTS.md and docs/ show, from the repository's root:

    python notebooks/figures.py [names] [--run FOLDER]

stages          how the two stages work (stages.py)
journey         one batch on its way through the model, with the shape of every tensor (journey.py)
search          what a caption finds, with the captioner that all starts from, after stage 2 alone
                (notebooks/embedder_without_stage_1) and after both (notebooks/embedder)
captions        what the nano base says to unseen scenes, and how often it is right
reconstruction  what a run of stage 1 restores: that in FOLDER, by default runs/cpt
tables          no picture: RESULTS.md's tables are made anew from ablations.json

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
from nano_moca.ablate import ARMS, SYMBOLS, T_975, UNLABELLED, Judge, difference, measure
from nano_moca.batches import TokenBatches
from nano_moca.builtin import (
    END,
    KNOWN,
    KNOWN_COLOURS,
    NEW,
    SPLITS,
    BuiltinRecords,
    Palette,
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
STAGE_2_ALONE = ROOT / "notebooks" / "embedder_without_stage_1"
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
        print(f"{title}: {scores['words']:.1%} of words and {scores['captions']:.1%} of captions",
              "right")
        for axis, (scene, said) in zip(row, scores["examples"], strict=False):
            axis.imshow(scene.image())
            axis.set(xticks=[], yticks=[])
            stage1.show_words(axis, judged(said, scene.caption()))
        row[0].set_title(f"{title}: {scores['words']:.1%} of words right", loc="left", fontsize=12)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.16, hspace=0.75, wspace=0.06)
    return figure


# --- what a caption finds -------------------------------------------------------------------------


def draw_search(query: int = 18) -> Figure:
    """A caption of symbols that only stage 1 saw, among 593 unseen scenes: the five nearest
    before training, after stage 2 alone and after both stages, the right one framed."""
    task = factor_tasks("test")[UNLABELLED[1]]
    models = {"a captioner": nano_moca.load(BASE, "cpu", None, "causal", "last"),
              "stage 2 alone": nano_moca.load(STAGE_2_ALONE, "cpu", processor=BASE),
              "both stages": nano_moca.load(EMBEDDER, "cpu")}
    figure = plt.figure(figsize=(11, 3.7))
    asked = task[query].query.text.removeprefix("Find a picture: ").removesuffix(END)
    figure.text(0.01, 0.93, f"“{asked}”", fontsize=18, color=INK, va="center")
    for line, (name, moca) in enumerate(models.items()):
        ranking = rank_pairs(task, lambda records, moca=moca: moca.embed(records).numpy())
        places, of = ranking.places(), len(ranking.candidates)
        found = ranking.scores()["recall@10"]
        print(f"{name}: recall@10 {found:.3f}, query {query}: {places[query]} of {of}")

        # Beside the pictures: where the right one stands, and how often it is among the first.
        bottom = 0.62 - 0.29 * line
        figure.text(0.01, bottom + 0.165, name, fontsize=14, color=INK, va="center")
        figure.text(0.01, bottom + 0.055, f"right one: place {places[query]}\n"
                    f"in the first ten: {found:.0%} of {len(places)}",
                    fontsize=11, color=GREY, va="center")
        nearest = np.argsort(-ranking.similarities[query], kind="stable")
        for number, answer in enumerate(nearest[:5]):
            axis = figure.add_axes((0.235 + 0.155 * number, bottom, 0.143, 0.2))
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


# --- RESULTS.md's tables --------------------------------------------------------------------------

LABELLED = ("scene-to-caption, labelled symbols", "caption-to-scene, labelled symbols")
PLACES = ("scene-to-caption, places", "caption-to-scene, places")
COLUMNS: dict[str, Judge] = {  # of the table of arms: tasks, and the figure whose mean is shown
    "unlabelled symbols": SYMBOLS, "twins beaten": (SYMBOLS[0], "twins beaten"),
    "labelled symbols": (LABELLED, "recall@10"), "pages": (("page-retrieval",), "recall@10"),
    "passages": (("long-text",), "recall@10"),
    "places (twins beaten)": (PLACES, "twins beaten"),
    "text pairs (recall@1)": (("text-pairs",), "recall@1"),
    "mixed shelf": (("mixed shelf",), "recall@10")}

# What both stages together are compared with, and on which figure.
CLAIMS: dict[str, tuple[str, str]] = {
    "Stage 1 teaches symbols that no labelled pair shows.": ("none", "unlabelled symbols"),
    "Stage 1 helps with symbols of the labelled pairs, too.": ("none", "labelled symbols"),
    "Stage 1 helps with pages.": ("none", "pages"),
    "Stage 1 helps with passages.": ("none", "passages"),
    "Both stages beat a causal model that is only fine-tuned.": ("causal", "unlabelled symbols"),
    "Bidirectional attention helps where stage 1 is the same.": ("full-causal",
                                                                 "unlabelled symbols"),
    "It is the reconstruction: as many steps of next-token training give less.":
        ("next", "unlabelled symbols"),
    "They give less if the model stays causal, too.": ("next-causal", "unlabelled symbols"),
    "Words and patches teach more than words alone.": ("mlm", "unlabelled symbols"),
    "Words and patches teach more than patches alone.": ("mae", "unlabelled symbols"),
    "Half of stage 1's steps teach less.": ("half", "unlabelled symbols"),
    "Pages are found by what pairs of long documents taught.": ("no-documents", "pages"),
    "Passages are found by what pairs of long documents taught.": ("no-documents", "passages"),
    "Other wordings are found by what text-only pairs taught.": ("no-text-pairs",
                                                                 "text pairs (recall@1)"),
    "Batches of one task teach more than mixed ones.": ("mixed", "unlabelled symbols"),
    "Batches of one task serve the mixed shelf better.": ("mixed", "mixed shelf"),
    "Candidates of other kinds among the negatives would serve the mixed shelf worse.":
        ("shelf", "mixed shelf")}


def compared(ours: np.ndarray, others: np.ndarray) -> tuple[str, bool]:
    """The difference of two means in points, with its 95 % interval if there are two runs of each;
    and whether that is clear of zero, by at least three standard errors."""
    gap, half = difference(ours, others)
    if np.isnan(half):
        return f"{100 * gap:+.1f}", False
    error = half / T_975[min(len(ours), len(others), 10) - 1]
    return f"{100 * gap:+.1f} ± {100 * half:.1f}", abs(gap) > max(half, 3 * error)


def findings_table(results: dict) -> str:
    """A row for each claim whose arm was run: both means, the runs, and the verdict."""
    lines = ["| claim | recall@10 of | both stages | the other arm | runs | difference | verdict |",
             "| --- " * 7 + "|"]
    for claim, (name, column) in CLAIMS.items():
        if name not in results or "full" not in results:
            continue
        full, other = (measure(results[arm], COLUMNS[column]) for arm in ("full", name))
        told, clear = compared(full, other)
        verdict = ("shown" if full.mean() > other.mean() else "the opposite") if clear else (
            "not shown" if min(len(full), len(other)) > 1 else "one run: a hint")
        if verdict == "one run: a hint" and full.mean() < other.mean():
            verdict = "one run: a hint of the opposite"
        lines.append(f"| {claim} | {column} | {full.mean():.2f} | {other.mean():.2f} "
                     f"({ARMS[name].about}) | {len(full)} and {len(other)} | {told} | {verdict} |")
    return "\n".join(lines)


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
    chances = []
    for tasks, figure in COLUMNS.values():
        half = figure == "twins beaten"
        chances.append(0.5 if half else measure(some, (tasks, f"chance {figure}")).mean())
    lines.append(f"| *guessing* | | {' | '.join(f'{chance:.3f}' for chance in chances)} |")
    return "\n".join(lines)


def signs_table(results: dict) -> str:
    """A row for each arm that the paper has: both differences from the full recipe, in points."""
    lines = ["| arm | the paper | here | of | runs | verdict |", "| --- " * 6 + "|"]
    for name, seeds in results.items():
        arm = ARMS[name]
        if arm.paper is None or "full" not in results:
            continue
        ours, full = measure(seeds, arm.judge), measure(results["full"], arm.judge)
        told, clear = compared(ours, full)
        verdict = "same sign" if (ours.mean() - full.mean()) * arm.paper > 0 else "other sign"
        if not clear:
            verdict = "not clear of zero" if min(len(ours), len(full)) > 1 else (
                f"one run: a hint of the {verdict}")
        lines.append(f"| {arm.about} | {arm.paper:+.1f} | {told} | {judged_by(arm.judge)} | "
                     f"{len(ours)} and {len(full)} | {verdict} |")
    return "\n".join(lines)


def judged_by(judge: Judge) -> str:
    """In short, what an arm is judged by."""
    for column, known in COLUMNS.items():
        if known == judge:
            return column
    return " and ".join(judge[0])


def with_tables(text: str, results: dict) -> str:
    """RESULTS.md's text with its tables made anew, each between its two marks."""
    tables = {"findings": findings_table, "arms": arms_table, "signs": signs_table}
    for name, make in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- end of {name} -->")
        text = f"{before}<!-- {name} -->\n{make(results)}\n<!-- end of {name} -->{after}"
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
