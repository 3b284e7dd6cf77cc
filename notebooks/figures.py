"""Draw the pictures that the README shows: `python notebooks/figures.py`, from the repository's
root.

stages.png         how the two stages work (stages.py)
search.png         what a caption finds, with the captioner that all starts from and after both
                   stages (notebooks/embedder)
captions.png       what the nano base says to unseen scenes, and how often it is right
reconstruction.png the one that the last `torchrun train_cpt.py` wrote to runs/cpt
retrieval.png      the one that the last `torchrun train_cl.py` wrote to runs/cl, and similarity.png
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt

import nano_moca
from nano_moca.builtin import END, KNOWN, LABELLED, NEW, SPLITS, BuiltinPairs, Palette
from nano_moca.report.ranking import rank_pairs
from stages import draw_stages

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "notebooks" / "figures"


def caption_scores(
    moca: nano_moca.Moca, names: tuple[str, ...], count: int = 500
) -> dict:
    """How the model captions unseen scenes of these symbols: shares of words and of captions."""
    random = np.random.default_rng((0, SPLITS["test"], len(names)))
    palette = Palette(names, LABELLED.colours, part="test")
    scenes = [palette.scene(random) for _ in range(count)]
    items = [{"text": nano_moca.MARK, "images": [scene.image()]} for scene in scenes]
    said = moca.caption(items, 20)
    pairs = [(answer.split(), scene.caption().split()) for answer, scene in zip(said, scenes)]
    words = [sum(a == b for a, b in zip(answer, truth)) / len(truth) for answer, truth in pairs]
    return {"words": float(np.mean(words)), "captions": float(np.mean([a == b for a, b in pairs])),
            "examples": list(zip(scenes, said))}


def draw_captions() -> None:
    """Two rows of scenes: of the symbols the base knows, and of others; wrong words in red."""
    moca = nano_moca.load(ROOT / "nano_moca" / "base", "cpu")
    figure, axes = plt.subplots(2, 6, figsize=(12, 5.6))
    for row, (names, title) in zip(axes, ((KNOWN, "known symbols"), (NEW, "new symbols"))):
        scores = caption_scores(moca, names)
        words, whole = scores["words"], scores["captions"]
        print(f"{title}: {words:.1%} of words, {whole:.1%} of captions right")
        for axis, (scene, said) in zip(row, scores["examples"]):
            axis.imshow(scene.image())
            axis.set(xticks=[], yticks=[])
            truth = scene.caption().split(", ")
            for line, part in enumerate(said.split(", ")):
                right = line < len(truth) and part == truth[line]
                axis.text(0.0, -0.06 - 0.12 * line, part, color="#222222" if right else "#d02020",
                          transform=axis.transAxes, va="top", fontsize=9)
        row[0].set_ylabel(f"{title}\n{scores['words']:.0%} of words right", fontsize=9)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.99, bottom=0.17, hspace=0.62, wspace=0.12)
    figure.savefig(FIGURES / "captions.png", dpi=110)


def draw_search(query: int = 150) -> None:
    """A caption among 600 unseen scenes: the five best, before and after; the right one framed."""
    task = BuiltinPairs("caption-to-scene", "test", 0)
    models = {"before: a captioner,\nas it is": (ROOT / "nano_moca" / "base", "causal", "last"),
              "after both stages": (ROOT / "notebooks" / "embedder", "bidirectional", "mean")}
    figure, axes = plt.subplots(2, 5, figsize=(11, 4.3), layout="constrained")
    figure.suptitle(f"“{task[query].query.text.removesuffix(END)}”", fontsize=17)
    for row, (name, (folder, attention, pooling)) in zip(axes, models.items()):
        moca = nano_moca.load(folder, "cpu", None, attention, pooling)
        ranking = rank_pairs(task, lambda records: moca.embed(records).numpy())
        print(f"{name!r}: recall@1 {ranking.scores()['recall@1']:.3f}")
        place, of = ranking.places()[query], len(ranking.candidates)
        row[0].set_ylabel(f"{name}\nright one: {place} of {of}", fontsize=12)
        for axis, answer in zip(row, np.argsort(-ranking.similarities[query], kind="stable")):
            axis.imshow(ranking.candidates[answer].images[0])
            axis.set(xticks=[], yticks=[])
            right = answer == ranking.right[query]
            axis.spines[:].set(edgecolor="#1a9c3e" if right else "white", linewidth=6)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90)
    Image.open(picture).convert("RGB").quantize(256).save(FIGURES / "search.png", optimize=True)


if __name__ == "__main__":
    draw_stages()
    draw_search()
    draw_captions()
    for run, name in (("cpt", "reconstruction.png"), ("cl", "retrieval.png"),
                      ("cl", "similarity.png")):
        shutil.copy(ROOT / "runs" / run / name, FIGURES / name)
