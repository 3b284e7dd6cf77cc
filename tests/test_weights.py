"""Checkpoints: read strictly in every layout, written so that the same bits come back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nano_moca
from nano_moca import Moca, MocaError, Record, weights
from nano_moca.config import grow_vocabulary
from nano_moca.convert import export
from nano_moca.convert.configs import parse_config
from nano_moca.convert.export import save_model
from nano_moca.distributed import World
from nano_moca.families import load_config
from nano_moca.files import MARKER
from nano_moca.processor import Processor

ONE = World(0, 1, torch.device("cpu"), torch.float32)
NORM, NEWER_NORM = "model.norm.weight", "model.language_model.norm.weight"


def refusal(folder: Path) -> str:
    """The one-line error with which a checkpoint is refused."""
    with pytest.raises(MocaError) as caught:
        nano_moca.load(folder, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the stored tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def reconfigure(folder: Path, change: Callable[[dict], None]) -> None:
    """Change config.json."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def equal_models(ours: Moca, theirs: Moca) -> bool:
    ours, theirs = ours.model.state_dict(), theirs.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ---- what does not fit


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(NORM), ("missing", NORM)),
    (lambda t: t.update({"model.extra": torch.zeros(1)}), ("unexpected", "model.extra")),
    (lambda t: t.update({"rest": torch.zeros(1)}), ("unexpected", "rest")),
    (lambda t: t.update({NORM: torch.zeros(63)}), (NORM, "63", "64")),
    (lambda t: t.update({NORM: torch.zeros(1, 64)}), (NORM, "[1, 64]")),
    (lambda t: t.update({NEWER_NORM: t[NORM] + 0}), (NEWER_NORM, f" {NORM}")),
    (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(703, 64)}), ("embed", "703")),
    (lambda t: t.update({"visual.patch_embed.proj.weight": torch.zeros(48, 3, 14, 14)}),
     ("visual.patch_embed.proj.weight",)),
    (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
     ("lm_head.weight", "tie_word_embeddings")),
    (lambda t: t.clear(), ("missing",)),
], ids=["missing", "extra", "foreign", "length", "rank", "twice", "rows", "kernel", "head", "none"])
def test_tensors_that_do_not_fit(checkpoint: Path, change: Callable, words: tuple[str, ...]
                                 ) -> None:
    """A missing, unexpected, doubled or misshapen tensor, or a head that is not tied, is named."""
    rewrite(checkpoint, change)
    message = refusal(checkpoint)
    assert all(word in message for word in words) and str(checkpoint) in message


def test_untied_without_head(checkpoint: Path) -> None:
    """A config that unties the head asks for its weight."""
    reconfigure(checkpoint, lambda raw: raw.update(tie_word_embeddings=False))
    assert "missing lm_head.weight" in refusal(checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_truncated_weights(checkpoint: Path, kept: int) -> None:
    """A file cut anywhere is named."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(checkpoint)


def test_absent_files(checkpoint: Path) -> None:
    """Each file that is not there is named."""
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        assert name in refusal(checkpoint)
        (checkpoint / name).write_bytes(content)
    nano_moca.load(checkpoint, "cpu")


def in_shards(moca: Moca, folder: Path, monkeypatch) -> Path:
    """Save the model in several shards; returns the index."""
    monkeypatch.setattr(export, "SHARD_SIZE", 300_000)
    save_model(folder, ONE, moca.model, moca.processor)
    return folder / "model.safetensors.index.json"


def test_shards_that_do_not_fit(moca: Moca, tmp_path: Path, monkeypatch) -> None:
    """A missing or cut shard is named, and so is what an index leaves out."""
    index = in_shards(moca, tmp_path / "model", monkeypatch)
    content = index.read_text()
    promised = json.loads(content)
    left_out = promised["weight_map"][NORM]
    promised["weight_map"] = {k: v for k, v in promised["weight_map"].items() if v != left_out}
    index.write_text(json.dumps(promised))
    assert "missing" in refusal(index.parent)
    index.write_text(json.dumps({"weight_map": [left_out]}))
    assert index.name in refusal(index.parent)
    index.write_text(content[: len(content) // 2])
    assert index.name in refusal(index.parent)
    index.write_text(content)
    shard = index.parent / json.loads(content)["weight_map"][NORM]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refusal(index.parent)
    shard.unlink()
    assert shard.name in refusal(index.parent)


@pytest.mark.parametrize("change, word", [
    (lambda raw: raw.update(model_type="qwen3_vl_moe"), "model_type"),
    (lambda raw: raw.pop("model_type"), "model_type"),
    (lambda raw: raw["text_config"].update(use_sliding_window=True), "use_sliding_window"),
    (lambda raw: raw["text_config"].update(hidden_act="gelu"), "hidden_act"),
    (lambda raw: raw["text_config"].pop("num_hidden_layers"), "layer_types"),  # of 80 then
    (lambda raw: raw["text_config"].update(num_attention_heads=5), "heads"),
    (lambda raw: raw["text_config"].update(num_key_value_heads=3), "heads"),
    (lambda raw: raw["text_config"]["rope_parameters"].update(mrope_section=[2, 3, 4]), "mrope"),
    (lambda raw: raw["text_config"]["rope_parameters"].pop("mrope_section"), "mrope_section"),
    (lambda raw: raw.pop("vision_config"), "vision_config.out_hidden_size"),
    (lambda raw: raw["vision_config"].update(hidden_act="relu"), "hidden_act"),
    (lambda raw: raw["vision_config"].update(num_heads=5), "heads"),
    (lambda raw: raw["vision_config"].update(window_size=50), "window"),
    (lambda raw: raw["vision_config"].update(out_hidden_size=32), "width"),
    (lambda raw: raw["vision_config"].update(fullatt_block_indexes=[7]), "fullatt_block_indexes"),
    (lambda raw: raw.update(nano_moca="causal"), "nano_moca"),
    (lambda raw: [raw.clear(), raw.update(model_type="llama")], "model_type"),
    (lambda raw: raw.update(text_config="none"), "text_config"),
    (lambda raw: raw["text_config"].update(hidden_size="64"), "hidden_size"),
    (lambda raw: raw["text_config"].update(num_attention_heads=0), "num_attention_heads"),
])
def test_configs_that_are_refused(checkpoint: Path, change: Callable, word: str) -> None:
    """What is inconsistent in config.json, or not implemented, is named. (What is left out has
    a default, which may not fit to the rest.)"""
    reconfigure(checkpoint, change)
    message = refusal(checkpoint)
    assert word in message and "config.json" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\udcff"])
def test_broken_config(checkpoint: Path, content: str) -> None:
    """A config.json that is no JSON object is named."""
    path = checkpoint / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(path) in refusal(checkpoint)


def test_no_folder(tmp_path: Path, monkeypatch) -> None:
    """A path that is no folder is named; a hub id goes to the hub, whose refusal is one line."""
    assert str(tmp_path / "absent") in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(tmp_path / "file")
    assert "not a folder" in refusal("./absent") and "not a folder" in refusal("absent")

    for error in (OSError("offline\nand more"), RuntimeError()):
        def refuse(*_, error: Exception = error, **__) -> str:
            raise error

        monkeypatch.setattr(weights, "snapshot_download", refuse)
        assert "owner/name" in refusal("owner/name")


def test_hub_id(golden: Path, moca: Moca, monkeypatch) -> None:
    """A hub id is downloaded, without what is no part of a model, and loaded like a folder."""
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(golden / "qwen2.5-vl")

    monkeypatch.setattr(weights, "snapshot_download", download)
    assert equal_models(nano_moca.load("owner/name", "cpu"), moca)
    assert asked == {"owner/name": ["*.json", "*.jinja", "merges.txt", "*.safetensors"]}


def test_wrong_choices(golden: Path) -> None:
    """An unknown attention or pooling is named."""
    for choice in (dict(attention="both"), dict(pooling="max")):
        with pytest.raises(MocaError, match=next(iter(choice.values()))):
            nano_moca.load(golden / "qwen2.5-vl", "cpu", **choice)


# ---- what fits


def test_layouts_are_the_same_model(moca: Moca, newer_layout: Path) -> None:
    """Both key layouts, in one file and in shards, give the same bits."""
    assert equal_models(nano_moca.load(newer_layout, "cpu"), moca)


def test_extra_mae_and_equal_head_are_read_over(checkpoint: Path, moca: Moca) -> None:
    """MoCa's mae_* tensors are ignored, and so is a stored head that equals the embedding."""
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {"mae_decoder.weight": torch.zeros(3, 4), "model.mae_head.bias": torch.zeros(3)}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(checkpoint, change)
    assert equal_models(nano_moca.load(checkpoint, "cpu"), moca)


def test_flat_and_nested_config_are_the_same(golden: Path) -> None:
    """The older flat form and the newer nested one give one Config."""
    raw = json.loads((golden / "qwen2.5-vl" / "config.json").read_text())
    text = dict(raw["text_config"])
    flat = {key: value for key, value in raw.items() if key != "text_config"}
    rope = text.pop("rope_parameters")
    flat |= text | {"model_type": raw["model_type"]}
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    nested, flat = parse_config(raw), parse_config(flat)
    assert replace(nested, raw={}) == replace(flat, raw={})
    untied = load_config(golden / "qwen2.5-vl-untied")  # written flat by transformers 4.50
    assert replace(untied, raw={}, tied=True) == replace(nested, raw={})


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen2.5-vl-untied", "qwen2-vl"])
@pytest.mark.parametrize("shard_size", ["5GB", 300_000, 1])
def test_saved_and_reloaded(golden: Path, tmp_path: Path, records: list[Record], name: str,
                            shard_size: str | int, monkeypatch) -> None:
    """A saved model comes back bit for bit, in one file or shards, with the keys it had."""
    monkeypatch.setattr(export, "SHARD_SIZE", shard_size)
    source, folder = golden / name, tmp_path / "model"
    moca = nano_moca.load(source, "cpu")
    save_model(folder, ONE, moca.model, moca.processor)
    again = nano_moca.load(folder, "cpu")
    assert equal_models(again, moca)
    assert torch.equal(again.embed(records), moca.embed(records))
    assert replace(load_config(folder), raw={}) == replace(load_config(source), raw={})
    files, saved = sorted(folder.glob("*.safetensors")), {}
    assert (len(files) > 1) == (shard_size != "5GB")
    for file in files:
        saved |= load_file(file)
    stored = load_file(source / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in stored)
    assert {file.name for file in tmp_path.iterdir()} == {"model"}  # nothing half-written remains


def test_saving_over_an_older_model(moca: Moca, tmp_path: Path, monkeypatch) -> None:
    """A model saved in the place of another leaves none of its files behind."""
    index = in_shards(moca, tmp_path / "model", monkeypatch)
    monkeypatch.undo()
    save_model(index.parent, ONE, moca.model, moca.processor)
    assert {file.name for file in index.parent.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "modules.json", "sentence_bert_config.json", "1_Pooling", MARKER}


def test_saved_with_what_it_was_trained_with(moca: Moca, tmp_path: Path) -> None:
    """config.json says how a model was trained; a model saved from it says the same, unless told
    otherwise; the model in memory is not changed."""
    folder, again = tmp_path / "model", tmp_path / "again"
    causal = {"attention": "causal", "pooling": "last"}
    mean = {"attention": "causal", "pooling": "mean"}
    save_model(folder, ONE, moca.model, moca.processor, causal)
    trained = nano_moca.load(folder, "cpu")
    assert (trained.attention, trained.pooling) == ("causal", "last")
    for trained_with, expected in ((None, causal), (mean, mean)):
        save_model(again, ONE, trained.model, trained.processor, trained_with)
        assert load_config(again).raw["nano_moca"] == expected
    assert "nano_moca" not in moca.model.config.raw
    assert trained.model.config.raw["nano_moca"] == causal


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_bfloat16(checkpoint: Path, moca: Moca, tmp_path: Path, key: str) -> None:
    """A model is saved in the dtype of the checkpoint that it came from."""
    def change(raw: dict) -> None:
        del raw["dtype"]
        raw[key] = "bfloat16"

    reconfigure(checkpoint, change)
    from_bfloat16, folder = nano_moca.load(checkpoint, "cpu"), tmp_path / "model"
    save_model(folder, ONE, from_bfloat16.model, from_bfloat16.processor)
    saved = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())[key] == "bfloat16"
    rounded = nano_moca.load(folder, "cpu").model.state_dict()
    for name, tensor in moca.model.state_dict().items():
        assert torch.equal(rounded[name], tensor.bfloat16().float())
    half = nano_moca.load(folder, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen2.5-vl-untied"])
@pytest.mark.parametrize("padded", [True, False])
def test_mask_token_row(golden: Path, tmp_path: Path, records: list[Record], name: str, padded: bool
                        ) -> None:
    """The mask row is the mean of the rows before it; the vocabulary grows only if it has to."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    stored = load_file(golden / name / "model.safetensors")
    tables = [key for key in ("model.embed_tokens.weight", "lm_head.weight") if key in stored]
    for file in (golden / name).glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    last = Processor.load(folder, load_config(folder)).mask_token  # one after the tokenizer's
    if not padded:
        stored |= {key: stored[key][:last].contiguous() for key in tables}
        reconfigure(folder, lambda raw: raw.get("text_config", raw).update(vocab_size=last))
    save_file(stored, folder / "model.safetensors")

    config = load_config(folder)
    processor = Processor.load(folder, config)
    assert processor.mask_token == last and (last < config.vocabulary) == padded
    grown = grow_vocabulary(config, last)
    assert grown == (config if padded else replace(config, vocabulary=last + 1))
    model = weights.empty_model(grown)
    model.to_empty(device="cpu")
    weights.load_weights(model, folder, new_mask_token=last)
    ours = [model.language.embed_tokens.weight] + ([] if config.tied else [model.head])
    for key, table in zip(tables, ours, strict=True):
        theirs = stored[key]
        assert len(table) == max(len(theirs), last + 1)
        assert torch.equal(table[:last], theirs[:last])
        torch.testing.assert_close(table[last], theirs[:last].mean(0))
        assert torch.equal(table[last + 1 :], theirs[last + 1 :])

    save_model(tmp_path / "saved", ONE, model, processor)
    again = nano_moca.load(tmp_path / "saved", "cpu")
    assert again.processor.new_mask_token is None and again.processor.mask_token == last
    assert again.model.config.vocabulary == len(ours[0])
    assert equal_models(again, Moca(model, processor))
    expected = nano_moca.load(golden / name, "cpu").embed(records)  # the words' rows are the same
    torch.testing.assert_close(again.embed(records), expected)
