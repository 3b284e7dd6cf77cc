"""A saved model says what it is: config.json and the files beside it, and the vectors that
transformers and sentence-transformers compute from them, where these are installed."""

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nano_moca
from nano_moca import MARK, Moca, MocaError
from nano_moca.config import BASE
from nano_moca.convert.export import save_model
from nano_moca.distributed import World
from nano_moca.families import load_config
from nano_moca.processor import MASK, Processor

ONE = World(0, 1, torch.device("cpu"), torch.float32)
STARTS = ["base", "qwen2-vl", "qwen2.5-vl", "qwen2.5-vl-untied"]
BIDIRECTIONAL = {"attention": "bidirectional", "pooling": "mean", "max_tokens": 512}
CAUSAL = {"attention": "causal", "pooling": "last", "max_tokens": 512}
TEXTS = ["two red boats", "a", "Find a picture of\nboats, the sea <|im_end|> and the sky.\n"]


def start_folder(name: str, golden: Path) -> Path:
    """A committed checkpoint: flat (base) or nested, tied or not, of either family."""
    return BASE if name == "base" else golden / name


def save(start: Path, folder: Path, trained_with: dict | None) -> dict:
    """Save what was loaded from `start`, with other weights; returns the new config.json."""
    moca = nano_moca.load(start, "cpu")
    with torch.no_grad():
        for parameter in moca.model.parameters():
            parameter.mul_(1.01)
    save_model(folder, ONE, moca.model, moca.processor, trained_with)
    return read(folder / "config.json")


def read(path: Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def picture(width: int, height: int) -> Image.Image:
    """Waves and some noise."""
    y, x = np.mgrid[0:height, 0:width]
    random = np.random.default_rng(width * height)
    waves = np.stack([np.sin(x / 5), np.sin(y / 9), np.sin((x + y) / 17)], -1) * 100 + 127
    return Image.fromarray((waves + random.normal(0, 9, waves.shape)).clip(0, 255).astype(np.uint8))


OWN = [picture(112, 84), picture(56, 140)]  # whole groups, within every start's limits
OTHER = [picture(113, 97), picture(301, 199), picture(20, 33)]  # these are resized


def shown(image: Image.Image, before: str = "", after: str = "") -> dict:
    """An item of one image between two texts."""
    return {"text": before + MARK + after, "images": [image]}


def assert_close(theirs, ours) -> None:
    """Unit vectors, to 1e-5."""
    torch.testing.assert_close(torch.as_tensor(theirs), ours, rtol=0, atol=1e-5)


# ---- config.json


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("trained_with", [BIDIRECTIONAL, CAUSAL, {"attention": "bidirectional"}])
def test_config_says_what_was_trained(name: str, trained_with: dict, golden: Path, tmp_path: Path
                                      ) -> None:
    """Nested, with is_causal where others read it; and all that the start's file said."""
    start = start_folder(name, golden)
    raw, before = save(start, tmp_path / "model", trained_with), read(start / "config.json")
    text = raw["text_config"]
    assert text["is_causal"] is (trained_with["attention"] == "causal")
    assert "is_causal" not in raw and raw["nano_moca"] == trained_with
    assert raw["tie_word_embeddings"] is text["tie_word_embeddings"]
    assert text["model_type"] == before["model_type"] + "_text"
    assert {key: raw[key] for key in ("architectures", "vision_config", "image_token_id")} == {
        key: before[key] for key in ("architectures", "vision_config", "image_token_id")}
    assert raw | text == raw | text | before | before.get("text_config", {}) | {
        "text_config": text, "model_type": text["model_type"]}
    assert not {"hidden_size", "vocab_size", "rope_scaling", "rms_norm_eps"} & raw.keys()


def test_rotary_positions_in_both_forms(golden: Path, tmp_path: Path) -> None:
    """A start of transformers 5 says rope_parameters; what is saved, older readers' keys too."""
    raw = save(golden / "qwen2.5-vl", tmp_path / "model", CAUSAL)
    before = read(golden / "qwen2.5-vl" / "config.json")["text_config"]["rope_parameters"]
    assert raw["text_config"]["rope_parameters"] == before
    assert raw["text_config"]["rope_scaling"]["mrope_section"] == before["mrope_section"]
    assert raw["text_config"]["rope_theta"] == before["rope_theta"]


@pytest.mark.parametrize("name", STARTS)
def test_saved_again(name: str, golden: Path, tmp_path: Path) -> None:
    """The same model, trained further and saved again, says the same but for what it was
    trained with: nothing is lost, doubled or nested twice."""
    start = start_folder(name, golden)
    first = save(start, tmp_path / "first", {"attention": "bidirectional"})
    second = save(tmp_path / "first", tmp_path / "second", CAUSAL)
    assert second["text_config"] == first["text_config"] | {"is_causal": True}
    assert second == first | {"nano_moca": CAUSAL, "text_config": second["text_config"]}
    configs = [load_config(folder) for folder in (start, tmp_path / "first", tmp_path / "second")]
    assert replace(configs[0], raw={}) == replace(configs[1], raw={}) == replace(configs[2], raw={})


@pytest.mark.parametrize("said", [True, False, None])
def test_untold_it_says_what_the_start_said(said: bool | None, checkpoint: Path, tmp_path: Path
                                            ) -> None:
    """A start that says is_causal without our entry, and a model saved without one."""
    raw = read(checkpoint / "config.json")
    if said is not None:
        raw["text_config"]["is_causal"] = said
    (checkpoint / "config.json").write_text(json.dumps(raw))
    assert save(checkpoint, tmp_path / "model", None)["text_config"].get("is_causal") is said
    pooling = read(tmp_path / "model" / "1_Pooling" / "config.json")["pooling_mode"]
    assert pooling == ("mean" if said is False else "lasttoken")


# ---- the files beside it


@pytest.mark.parametrize(("trained_with", "pooling"), [
    (BIDIRECTIONAL, "mean"), (CAUSAL, "lasttoken"), ({"attention": "bidirectional"}, "mean"),
    ({"attention": "causal"}, "lasttoken"), ({"attention": "causal", "pooling": "mean"}, "mean")])
def test_steps_of_sentence_transformers(trained_with: dict, pooling: str, golden: Path,
                                        tmp_path: Path) -> None:
    """Three modules, with the pooling and the limit that the model was trained with."""
    save(golden / "qwen2-vl", tmp_path / "model", trained_with)
    modules = read(tmp_path / "model" / "modules.json")
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    assert read(tmp_path / "model" / "1_Pooling" / "config.json") == {
        "embedding_dimension": 64, "pooling_mode": pooling}
    settings = read(tmp_path / "model" / "sentence_bert_config.json")["processing_kwargs"]
    assert settings["text"] == {"max_length": trained_with.get("max_tokens")}


def test_carried_over(checkpoint: Path, tmp_path: Path) -> None:
    """What belongs to the tokenizer and to generation comes along, byte for byte, through two
    runs; what is none of ours does not."""
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "model_max_length": 131072,
        "chat_template": "{{ 'a dialogue' }}", "added_tokens_decoder": {}}))
    carried = {"generation_config.json": b'{"temperature": 0.1}', "vocab.json": b'{"a": 0}',
               "chat_template.jinja": "{{ 'caf\u00e9' }}\r\n".encode(), "merges.txt": b"a b\n",
               "special_tokens_map.json": b"{}", "added_tokens.json": b"{}",
               "chat_template.json": b'{"chat_template": "{}"}'}
    for name, content in {**carried, "README.md": b"theirs", "optimizer.pt": b"?"}.items():
        (checkpoint / name).write_bytes(content)
    save(checkpoint, tmp_path / "first", {"attention": "bidirectional"})
    save(tmp_path / "first", tmp_path / "second", BIDIRECTIONAL)
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert {name: (folder / name).read_bytes() for name in carried} == carried
        assert not (folder / "README.md").exists() and not (folder / "optimizer.pt").exists()
        settings = read(folder / "tokenizer_config.json")
        assert settings["model_max_length"] == 131072 and settings["mask_token"] == MASK
        assert settings["chat_template"] == "{{ 'a dialogue' }}"
        listed = {token["id"]: token for token in read(folder / "tokenizer.json")["added_tokens"]}
        decoder = settings["added_tokens_decoder"]
        assert {int(number) for number in decoder} == listed.keys()
        assert all(listed[int(number)] == token | {"id": int(number)}
                   for number, token in decoder.items())
        assert MASK in [token["content"] for token in decoder.values()]


def test_a_start_without_tokenizer_config(golden: Path, tmp_path: Path) -> None:
    """Others would take <|endoftext|> for the end, and know of no mask token."""
    save(BASE, tmp_path / "model", CAUSAL)
    settings = read(tmp_path / "model" / "tokenizer_config.json")
    assert (settings["eos_token"], settings["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert settings["mask_token"] == MASK


def test_a_tokenizer_from_no_file(moca: Moca, tmp_path: Path, monkeypatch) -> None:
    """Nothing is carried over from wherever the process happens to run."""
    (tmp_path / "chat_template.jinja").write_text("of somebody else")
    monkeypatch.chdir(tmp_path)
    processor = Processor(moca.processor.tokenizer, moca.model.config, moca.processor.image)
    save_model(tmp_path / "model", ONE, moca.model, processor, CAUSAL)
    assert not (tmp_path / "model" / "chat_template.jinja").exists()
    nano_moca.load(tmp_path / "model", "cpu")


def test_what_lies_beside_the_start_and_is_no_file(checkpoint: Path, tmp_path: Path) -> None:
    """A folder, a pipe and an endless device are left where they are; a link is followed."""
    (checkpoint / "vocab.json").mkdir()
    (checkpoint / "merges.txt").symlink_to("/dev/zero")
    os.mkfifo(checkpoint / "chat_template.jinja")
    (tmp_path / "elsewhere.json").write_text("{}")
    (checkpoint / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    save(checkpoint, tmp_path / "model", CAUSAL)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert not {"vocab.json", "merges.txt", "chat_template.jinja"} & names
    assert read(tmp_path / "model" / "generation_config.json") == {}
    assert not (tmp_path / "model" / "generation_config.json").is_symlink()


def test_a_malformed_tokenizer_config(checkpoint: Path, tmp_path: Path) -> None:
    """The start's file is named, and an older model stays."""
    save(checkpoint, tmp_path / "model", CAUSAL)
    (checkpoint / "tokenizer_config.json").write_text("[1, 2")
    with pytest.raises(MocaError, match="checkpoint/tokenizer_config.json"):
        save(checkpoint, tmp_path / "model", BIDIRECTIONAL)
    assert read(tmp_path / "model" / "config.json")["nano_moca"] == CAUSAL


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_rights(mask: int, rights: int, golden: Path, tmp_path: Path) -> None:
    """Whoever may read one file of a model may read all, as the user's umask says."""
    before = os.umask(mask)
    try:
        save(golden / "qwen2.5-vl", tmp_path / "model", BIDIRECTIONAL)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) == 9  # with the marker
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {rights}


# ---- transformers


def transformers_vectors(folder: Path, texts: list[str], images: list[Image.Image]):
    """Unit vectors as the README's lines compute them: each text has as many marks as images."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_transformers_computes_our_vectors(name: str, attention: str, golden: Path, tmp_path: Path
                                           ) -> None:
    """With no code of ours: texts padded beside each other, and images, resized or not."""
    pytest.importorskip("torchvision")  # AutoProcessor needs it
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    save(start_folder(name, golden), folder, {"attention": attention, "pooling": "mean"})
    moca = nano_moca.load(folder, "cpu")
    assert_close(transformers_vectors(folder, TEXTS, []), moca.embed(TEXTS))
    items = [shown(image, "see ", " here") for image in OWN + OTHER]
    texts = [item["text"] for item in items]
    assert_close(transformers_vectors(folder, texts, OWN + OTHER), moca.embed(items))


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_transformers_opens_it_as_what_it_is(name: str, attention: str, golden: Path,
                                             tmp_path: Path) -> None:
    """No key is missing or unexpected; the first hidden state sees the last token, or does not;
    the tokenizer reads the same ids, and knows the mask token and the end."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    raw = save(start_folder(name, golden), folder, {"attention": attention})
    kind = getattr(transformers, raw["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first = [model.model(input_ids=torch.tensor([[5, 6, 7, last]])).last_hidden_state[0, 0]
             for last in (8, 9)]
    assert torch.equal(*first) == (attention == "causal")

    processor = nano_moca.load(folder, "cpu").processor
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token_id == processor.mask_token
    assert tokenizer.eos_token_id == processor.end_token
    for text in [*TEXTS, f"{MARK} caf\u00e9  12\n\n{MASK}"]:
        ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer(text)["input_ids"] == ids


def test_a_checkpoint_with_a_dialogue(golden: Path, tmp_path: Path) -> None:
    """The start's own chat template stays the one that transformers uses; and slow and fast
    tokenizers of a start that has vocab.json read the ids of tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    start = Path(shutil.copytree(golden / "qwen2.5-vl", tmp_path / "start"))
    transformers.AutoTokenizer.from_pretrained(start).save_pretrained(tmp_path / "start")
    shutil.copy(golden / "qwen2.5-vl" / "tokenizer.json", start)
    model = read(start / "tokenizer.json")["model"]
    (start / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (start / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    (start / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}<|im_end|>")
    save(start, tmp_path / "model", BIDIRECTIONAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "<|im_start|>hello<|im_end|>"
    ours = nano_moca.load(tmp_path / "model", "cpu").processor
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text).ids
    assert tokenizer.mask_token_id == ours.mask_token


# ---- sentence-transformers


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("trained_with", [BIDIRECTIONAL, CAUSAL, CAUSAL | {"pooling": "mean"}])
def test_sentence_transformers_computes_our_vectors(name: str, trained_with: dict, golden: Path,
                                                    tmp_path: Path) -> None:
    """Texts, images at their own size and resized, both in either order, and all in one list."""
    pytest.importorskip("torchvision")
    library = pytest.importorskip("sentence_transformers")
    start = Path(shutil.copytree(start_folder(name, golden), tmp_path / "start"))
    (start / "chat_template.jinja").write_text("<|im_start|>a dialogue<|im_end|>")
    save(start, tmp_path / "model", trained_with)
    moca = nano_moca.load(tmp_path / "model", "cpu")
    model = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")

    assert_close(model.encode(TEXTS), moca.embed(TEXTS))
    for images in (OWN, OTHER):
        assert_close(model.encode(images), moca.embed([shown(image) for image in images]))
    prompt = "\nRepresent the given image.\n"
    assert_close(model.encode([{"image": OWN[0], "text": prompt}, {"text": prompt, "image": OWN[1]},
                               TEXTS[2], OTHER[0]]),
                 moca.embed([shown(OWN[0], "", prompt), shown(OWN[1], prompt), TEXTS[2],
                             shown(OTHER[0])]))
    assert_close(model.encode([[{"role": "user", "content": TEXTS[2]}]]), moca.embed(TEXTS[2:]))


def test_sentence_transformers_shortens_as_we_do(golden: Path, tmp_path: Path) -> None:
    """Beyond the limit that the model was trained with, the end of a text is cut."""
    pytest.importorskip("torchvision")
    library = pytest.importorskip("sentence_transformers")
    save(BASE, tmp_path / "model", BIDIRECTIONAL | {"max_tokens": 24})
    moca = nano_moca.load(tmp_path / "model", "cpu")
    moca.max_tokens = 24
    items = ["a boat and " * 30, shown(picture(56, 56), "", " a boat" * 30)]
    model = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    theirs = model.encode([items[0], {"image": items[1]["images"][0], "text": " a boat" * 30}])
    assert_close(theirs, moca.embed(items))


def test_sentence_transformers_saves_it_again(golden: Path, tmp_path: Path) -> None:
    """What it saves itself, without further training, still gives our vectors (its image
    processor, though, then resizes by torchvision)."""
    pytest.importorskip("torchvision")
    library = pytest.importorskip("sentence_transformers")
    save(BASE, tmp_path / "model", BIDIRECTIONAL)
    library.SentenceTransformer(str(tmp_path / "model"), device="cpu").save(str(tmp_path / "again"))
    model = library.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    moca = nano_moca.load(tmp_path / "model", "cpu")
    assert_close(model.encode([TEXTS[0], {"image": OWN[0], "text": "x"}]),
                 moca.embed([TEXTS[0], shown(OWN[0], "", "x")]))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen2-vl"])
def test_what_a_start_left_out_is_written(name: str, golden: Path, tmp_path: Path) -> None:
    """A config.json of old versions leaves out what has the class's default value; what is saved
    from it can be read again, here and elsewhere."""
    start = Path(shutil.copytree(golden / name, tmp_path / "start"))
    raw = json.loads((start / "config.json").read_text())
    for part in (raw, raw.get("text_config") or {}):
        for place in (part, part.get("rope_scaling") or {}, part.get("rope_parameters") or {}):
            place.pop("rope_theta", None)
    (start / "config.json").write_text(json.dumps(raw))
    save(start, tmp_path / "model", BIDIRECTIONAL)
    first, second = load_config(start), load_config(tmp_path / "model")
    assert replace(first, raw={}) == replace(second, raw={})
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["text_config"]["rope_theta"] == 1e6
