"""mteb 2 scores a trained model by an adapter of a few lines, which the docs quote; its figures
are ours.

Needs `pip install mteb sentence-transformers`, and torchvision as conftest.py takes it.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

mteb = pytest.importorskip("mteb")

import numpy as np
from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta

import nano_moca
from nano_moca.builtin import END, BuiltinPairs
from nano_moca.evaluate.command import main

ROOT = Path(__file__).resolve().parents[1]
EMBEDDER = ROOT / "notebooks" / "embedder"
PROMPT = "Represent the given document image."
FOUND = {"english": 12, "french": 5}  # queries of each language


class NanoMoca(AbsEncoder):
    def __init__(self, model: str, page: str = "\nRepresent the given document image.") -> None:
        self.moca, self.page = nano_moca.load(model), page
        about = {"name": "me/my-moca", "revision": "1", "modalities": ["image", "text"]}
        self.mteb_model_meta = ModelMeta.create_empty(about)

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **more):
        vectors = []
        for batch in inputs:
            images = batch.get("image")
            items = batch.get("text") or [""] * len(images)
            if images:  # pages stand beside the prompt, queries alone
                items = [{"text": nano_moca.MARK + (text or self.page), "images": [image]}
                         for text, image in zip(items, images)]
            vectors.append(self.moca.embed(items).numpy())
        return np.concatenate(vectors)


@pytest.fixture(scope="module")
def pages() -> tuple[list, list[tuple[str, int]]]:
    """Built-in pages, each followed by its near page; questions, each with its page's number."""
    images, questions = [], []
    pairs = BuiltinPairs("page-retrieval", "test", 0)
    for number in range(sum(FOUND.values())):
        pair = pairs[number]
        questions.append((pair.query.text.removesuffix(END), len(images)))
        images += [record.images[0] for record in (pair.positive, *pair.negatives)]
    return images, questions


def languages() -> list[str]:
    """The language of each question."""
    return [language for language, count in FOUND.items() for _ in range(count)]


class Pages(AbsTaskRetrieval):
    """A task of mteb's kind, of data that are here."""

    metadata = TaskMetadata(
        name="LocalPages", description="-", reference=None, type="DocumentUnderstanding",
        dataset={"path": "local/pages", "revision": "1"}, category="t2i", eval_splits=["test"],
        eval_langs={"english": ["eng-Latn"], "french": ["fra-Latn"]}, main_score="ndcg_at_5",
        modalities=["text", "image"], date=None, domains=None, task_subtypes=None, license=None,
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation="")

    def fill(self, images: list, questions: list[tuple[str, int]]) -> None:
        """Take the data as `load_data` would."""
        features = Features(id=Value("string"), image=Image())
        ids = [f"page {number}" for number in range(len(images))]
        corpus = Dataset.from_dict({"id": ids, "image": images}, features)
        self.dataset = {}
        for language in FOUND:
            asked = [(f"query {number}", text, page) for number, (text, page) in
                     enumerate(questions) if languages()[number] == language]
            queries = {"id": [key for key, *_ in asked], "text": [text for _, text, _ in asked]}
            right = {key: {f"page {page}": 1} for key, _, page in asked}
            self.dataset[language] = {"test": {
                "corpus": corpus, "queries": Dataset.from_dict(queries), "relevant_docs": right,
                "top_ranked": None}}
        self.data_loaded = True


def our_figures(folder: Path, images: list, questions: list[tuple[str, int]]) -> dict:
    """What `evaluate vidore` writes of the same pages and questions."""
    task = folder / "data" / "pages"
    rows = {"corpus": [], "queries": [], "qrels": []}
    task.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(task / f"{number}.png")
        rows["corpus"].append({"corpus-id": number, "image": f"{number}.png"})
    for number, (text, page) in enumerate(questions):
        rows["queries"].append({"query-id": number, "query": text, "language": languages()[number]})
        rows["qrels"].append({"query-id": number, "corpus-id": page, "score": 1})
    for part, lines in rows.items():
        (task / part).mkdir()
        (task / part / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    output = folder / "scores.json"
    main(["vidore", "--model", str(EMBEDDER), "--device", "cpu", "--data", str(folder / "data"),
          "--output", str(output), "--prompt", PROMPT])
    return json.loads(output.read_text())


def test_its_figures_are_ours(tmp_path: Path, pages: tuple[list, list]) -> None:
    """To five digits: all languages as mteb averages them, and English alone."""
    task = Pages()
    task.fill(*pages)
    (result,) = mteb.evaluate(NanoMoca(str(EMBEDDER)), task, cache=None,
                              co2_tracker=False).task_results
    theirs = {scores["hf_subset"]: scores["ndcg_at_5"] for scores in result.scores["test"]}
    ours = our_figures(tmp_path, *pages)["tasks"]
    assert {name: task["ndcg@5"] for name, task in ours.items()} == {
        "pages": pytest.approx(result.get_score(), abs=5e-6),
        "pages, english": pytest.approx(theirs["english"], abs=5e-6)}
    assert 0.05 < theirs["english"] < 1 and theirs["english"] != theirs["french"]


def test_the_docs_quote_the_adapter() -> None:
    """Word for word, so that what is tested here is what is copied from there."""
    docs = (ROOT / "docs" / "other_tools.md").read_text(encoding="utf-8")
    assert inspect.getsource(NanoMoca) in docs
