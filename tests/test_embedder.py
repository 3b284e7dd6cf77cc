"""A model in use: what `load` takes and checks, and which items `embed` takes."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nano_moca
from nano_moca import MARK, Moca, MocaError, Record, as_records
from nano_moca.evaluate import embedder

LONG = " and many more words" * 30


def trained_with(checkpoint: Path, **said: object) -> Path:
    """Write into config.json what our scripts write."""
    path = checkpoint / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"nano_moca": said}))
    return checkpoint


def test_max_tokens(checkpoint: Path, moca: Moca) -> None:
    """What the caller gives, else what the model was trained with, else no limit."""
    assert moca.max_tokens is None
    assert nano_moca.load(checkpoint, "cpu", max_tokens=9).max_tokens == 9
    trained_with(checkpoint, max_tokens=20, attention="bidirectional", pooling="mean")
    ours = nano_moca.load(checkpoint, "cpu")
    assert ours.max_tokens == 20
    assert nano_moca.load(checkpoint, "cpu", max_tokens=9).max_tokens == 9

    tokens = moca.processor.encode(Record(LONG)).tokens
    text = moca.processor.tokenizer.decode(tokens[:20])
    assert len(tokens) > 20
    torch.testing.assert_close(ours.embed([LONG]), moca.embed([text]))
    assert (ours.embed([LONG]) - moca.embed([LONG])).abs().max() > 1e-3


@pytest.mark.parametrize("limit", ["20", 0, -3, 2.5, True, [20]])
def test_limits_that_are_refused(checkpoint: Path, limit: object) -> None:
    """From config.json or the caller: one line that names it."""
    with pytest.raises(MocaError, match="max_tokens"):
        nano_moca.load(checkpoint, "cpu", max_tokens=limit)
    with pytest.raises(MocaError, match="checkpoint.*max_tokens"):
        nano_moca.load(trained_with(checkpoint, max_tokens=limit), "cpu")


@pytest.mark.parametrize("said", [
    {"attention": ["causal"]}, {"attention": ""}, {"attention": None}, {"pooling": False},
    {"pooling": []}, {"pooling": {"mean": 1}}, {"max_tokens": 1e3}, {"max_tokens": False}])
def test_what_config_json_says_is_looked_at(checkpoint: Path, said: dict) -> None:
    """What a model was trained with, of any type."""
    (key, _), = said.items()
    with pytest.raises(MocaError, match=f"checkpoint.*{key} is "):
        nano_moca.load(trained_with(checkpoint, **said), "cpu")


@pytest.mark.parametrize("device", ["gpu", "CPU ", "xyz:0", "cuda:99"])
def test_devices_that_are_not_there(golden: Path, device: str) -> None:
    with pytest.raises(MocaError, match=f"device {device}"):
        nano_moca.load(golden / "qwen2.5-vl", device)


@pytest.mark.parametrize("factor", [0, 1e37])
def test_vectors_that_are_none(moca: Moca, factor: float) -> None:
    """Finite weights may lead to infinity, or to nothing: the item is named."""
    model = copy.deepcopy(moca.model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor if weight.dim() > 1 or not factor else 1)
    with pytest.raises(MocaError, match="^item 0: its vector is zero or not finite"):
        Moca(model, moca.processor).embed(["a text"])


def test_a_processor_from_elsewhere(checkpoint: Path, moca: Moca, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that come without tokenizer and image processor take another's: a folder's, or
    those of a hub id, of which no weights are fetched."""
    others = tmp_path / "others"
    others.mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.move(checkpoint / name, others / name)
    with pytest.raises(MocaError, match="tokenizer.json.*--processor"):
        nano_moca.load(checkpoint, "cpu")
    expected = moca.embed(["a text"])
    for place in (others, str(others)):
        ours = nano_moca.load(checkpoint, "cpu", processor=place)
        torch.testing.assert_close(ours.embed(["a text"]), expected)

    fetched = []

    def download(name: str, allow_patterns: list[str]) -> str:
        fetched.append((name, *allow_patterns))
        return str(others)

    monkeypatch.setattr("nano_moca.weights.snapshot_download", download)
    ours = nano_moca.load(checkpoint, "cpu", processor="owner/name")
    torch.testing.assert_close(ours.embed(["a text"]), expected)
    assert fetched == [("owner/name", "*.json", "*.jinja", "merges.txt")]


def test_a_processor_of_another_model(checkpoint: Path, golden: Path) -> None:
    """It is compared with the weights that it shall serve."""
    path = checkpoint / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"image_token_id": content["image_token_id"] - 1}))
    with pytest.raises(MocaError, match="<.image_pad.>"):
        nano_moca.load(checkpoint, "cpu", processor=golden / "qwen2.5-vl")


@pytest.mark.parametrize("asked", [{}, {"allow_extra": False}, {"allow_extra": True}])
def test_extra_tensors_are_allowed_only_if_asked(golden: Path, asked: dict,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` hands the wish on."""
    wishes = []

    def load_weights(model: object, folder: Path, allow_extra: bool = False) -> None:
        wishes.append(allow_extra)

    monkeypatch.setattr(embedder, "load_weights", load_weights)
    nano_moca.load(golden / "qwen2.5-vl", "cpu", **asked)
    assert wishes == [asked.get("allow_extra", False)]


def test_items_of_every_kind(moca: Moca) -> None:
    """A text, an object, a record; an image as an array among others."""
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    image = Image.fromarray(pixels)
    items = ["a", {"text": "a"}, Record("a"), {"text": MARK, "images": [pixels]},
             Record(MARK, [torch.from_numpy(pixels)]), {"text": MARK, "images": (image,)}]
    vectors = moca.embed(items)
    torch.testing.assert_close(vectors[:3], vectors[:1].expand(3, -1))
    torch.testing.assert_close(vectors[3:], vectors[3:4].expand(3, -1))


@pytest.mark.parametrize("item", [
    None, 7, b"bytes", ["a"], {}, {"text": 5}, Record(None), Record("a", "a.png"), Record(""),
    {"text": MARK, "images": "a.png"}, {"text": MARK, "images": b"bytes"},
    {"text": MARK, "images": np.zeros((56, 56, 3), np.uint8)},
    {"text": MARK, "images": Image.new("RGB", (56, 56))}, {"text": MARK, "images": [b"no image"]},
    {"text": MARK, "images": [None]}, {"text": MARK, "images": [torch.zeros(3, 56, 56)]},
    {"text": MARK, "images": ["absent.png"]}, {"text": "a", "images": [b"one too many"]},
    {"text": "half of a pair: \ud800"}, {"text": "a", "image": Image.new("RGB", (56, 56))},
    {"text": "a", "Images": []}, {"text": "a", 5: None}, Record(None, [], "item 1: a file"),
    Record(MARK, "a.png", "item 1: a file")])
def test_items_that_are_refused(moca: Moca, item: object) -> None:
    """One line each, with the item's number."""
    with pytest.raises(MocaError, match="^item 1: ") as caught:
        moca.embed(["fine", item, "fine"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("items", [list, "", "a", b"a", {"text": "a"}, Record("a"), None, 5,
                                   Path("a.png"), Image.new("RGB", (56, 56))])
def test_one_item_is_no_list(moca: Moca, items: object) -> None:
    with pytest.raises(MocaError, match="list of items"):
        moca.embed(items)


def test_a_record_s_own_source_stays() -> None:
    """Only a record without one is called by its number."""
    sources = [record.source for record in as_records([Record("a", [], "line 7"), Record("b")])]
    assert sources == ["line 7", "item 1"]


def test_captions_are_greedy(moca: Moca) -> None:
    """`caption` says what `greedy` predicts, of all items at once."""
    items = ["a cat", {"text": MARK, "images": [Image.new("RGB", (56, 56), "red")]}]
    batch = moca.processor.batch(as_records(items))
    tokens = embedder.greedy(moca.model, batch, 5, moca.processor.end_token)
    decode = moca.processor.tokenizer.decode
    said = [decode(ids, skip_special_tokens=False) for ids in tokens]
    assert moca.caption(items, 5) == said and len(tokens) == 2
    assert moca.caption([]) == []
