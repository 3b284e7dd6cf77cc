"""Checkpoints as other programs write them, and as no program should.

What transformers fills in where a file is silent is filled in here; where it is installed, the
two readings are compared. And a checkpoint may come from a stranger: nothing in it is believed
before it has been looked at.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nano_moca
from nano_moca import Moca, MocaError, Record, weights
from nano_moca.config import Config
from nano_moca.convert.configs import parse_config
from nano_moca.families import load_config
from nano_moca.model import VLM
from test_weights import refusal

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MLP = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
FAMILIES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}


@pytest.fixture
def transformers():
    """The library, for tests that compare with it."""
    return pytest.importorskip("transformers")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder: Path, change: Callable[[dict], None]) -> None:
    """Change config.json."""
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def rename(folder: Path, pairs: tuple[tuple[str, str], ...]) -> None:
    """Give the stored tensors other prefixes, the first that fits; "-" drops a tensor."""
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        theirs = next((theirs for ours, theirs in pairs if name.startswith(ours)), None)
        ours = next((ours for ours, _ in pairs if name.startswith(ours)), "")
        if theirs != "-":
            renamed[(theirs or "") + name.removeprefix(ours)] = tensor
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / folder.name))


def equal_models(ours: Moca, theirs: Moca) -> bool:
    ours, theirs = ours.model.state_dict(), theirs.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ---- configs: what is left out, and where it stands


def flat_3b(**vision: object) -> dict:
    """Qwen2.5-VL-3B's decoder as transformers 4.45 to 4.51 wrote it."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
        "hidden_size": 2048, "image_token_id": 151655, "intermediate_size": 11008,
        "max_position_embeddings": 128000, "max_window_layers": 80, "model_type": "qwen2_5_vl",
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default",
                         "type": "default"},
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0", "use_cache": True, "use_sliding_window": False,
        "vision_config": vision, "vocab_size": 151936}


def test_what_4_49_wrote_of_qwen2_5_vl() -> None:
    """Of the vision tower only what differs from the class: depth, heads, windows are missing."""
    config = parse_config(flat_3b(hidden_size=1280, in_chans=3, model_type="qwen2_5_vl",
                                  out_hidden_size=2048, spatial_patch_size=14,
                                  tokens_per_second=2))
    vision = config.vision
    assert (vision.depth, vision.heads, vision.width, vision.mlp_width) == (32, 16, 1280, 3420)
    assert (vision.window, vision.full_blocks) == (112, (7, 15, 23, 31))
    assert (vision.patch, vision.frames, vision.merge, vision.act) == (14, 2, 2, "silu")
    assert config.tied and config.norm_eps == 1e-6 and config.rope_theta == 1e6
    assert (config.vocabulary, config.stored_vocabulary) == (151936, 151936)


def test_what_4_45_wrote_of_qwen2_vl() -> None:
    """Its 7B has the class's own tower: all of it is missing, and so is the ratio of widths."""
    raw = flat_3b(in_chans=3, model_type="qwen2_vl", spatial_patch_size=14)
    raw |= {"model_type": "qwen2_vl", "hidden_size": 3584, "num_attention_heads": 28,
            "num_key_value_heads": 4, "tie_word_embeddings": False}
    config = parse_config(raw)
    vision = config.vision
    assert (vision.depth, vision.heads, vision.width, vision.mlp_width) == (32, 16, 1280, 5120)
    assert (vision.out_width, vision.window, vision.act) == (3584, 0, "quick_gelu")
    assert not config.tied and config.kv_heads == 4


def test_everything_left_out() -> None:
    """The class's own decoder: the 72B, but for the eps of its norms."""
    raw = {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}}
    config = parse_config(raw)
    assert (config.vocabulary, config.width, config.layers, config.mlp_width) == (
        152064, 8192, 80, 29568)
    assert (config.heads, config.kv_heads, config.head_width) == (64, 8, 128)
    assert (config.norm_eps, config.rope_theta) == (1e-5, 1e6)
    assert config.rope_axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert not config.tied
    nested = parse_config({**raw, "text_config": {}})
    assert replace(nested, raw={}) == replace(config, raw={})
    heads = parse_config({**raw, "num_key_value_heads": None})
    assert heads.kv_heads == 64  # null is not left out


def test_a_nested_decoder_stands_alone(golden: Path) -> None:
    """Transformers 4.52 to 4.57 repeated it at the top, where nobody reads it any more."""
    raw = json.loads((golden / "qwen2.5-vl" / "config.json").read_text())
    config = parse_config(raw)
    assert replace(parse_config({**raw, "hidden_size": 99, "vocab_size": 5}), raw={}) == replace(
        config, raw={})
    del raw["text_config"]["vocab_size"]
    assert parse_config({**raw, "vocab_size": 5}).vocabulary == 152064


TIED = [  # at the top, in text_config, whether transformers 5.17 ties
    (None, None, False), (None, True, True), (None, False, False),
    (True, None, True), (True, True, True), (True, False, True),
    (False, None, False), (False, True, True), (False, False, False)]


def say_tied(raw: dict, top: bool | None, inside: bool | None) -> dict:
    """The config with tie_word_embeddings in both places, or without."""
    raw = deepcopy(raw)
    for part, value in ((raw, top), (raw["text_config"], inside)):
        part.pop("tie_word_embeddings", None)
        if value is not None:
            part["tie_word_embeddings"] = value
    return raw


@pytest.mark.parametrize("top, inside, tied", TIED)
def test_tied_in_either_place(checkpoint: Path, moca: Moca, top: bool | None, inside: bool | None,
                              tied: bool) -> None:
    """True in one of the two places ties; there is no head in the file."""
    raw = say_tied(json.loads((checkpoint / "config.json").read_text()), top, inside)
    (checkpoint / "config.json").write_text(json.dumps(raw))
    assert load_config(checkpoint).tied == tied
    if tied:
        assert equal_models(nano_moca.load(checkpoint, "cpu"), moca)
    else:
        message = refusal(checkpoint)
        assert "missing lm_head.weight" in message and "output head" in message


@pytest.mark.parametrize("top, tied", [(None, False), (True, True), (False, False)])
def test_tied_in_a_flat_file(golden: Path, top: bool | None, tied: bool) -> None:
    """There is one place only."""
    raw = json.loads((golden / "qwen2.5-vl-untied" / "config.json").read_text())
    raw.pop("tie_word_embeddings", None)
    assert parse_config(raw if top is None else {**raw, "tie_word_embeddings": top}).tied == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_as_transformers_ties(transformers, golden: Path, family: str) -> None:
    """The table, asked of transformers itself."""
    raw = json.loads((golden / "qwen2.5-vl" / "config.json").read_text())
    if family == "qwen2_vl":
        raw = json.loads((golden / "qwen2-vl" / "config.json").read_text())
    for top, inside, _ in TIED:
        said = say_tied(raw, top, inside)
        theirs = getattr(transformers, FAMILIES[family] + "Config")(**deepcopy(said))
        assert parse_config(said).tied == theirs.tie_word_embeddings, (top, inside)


def as_transformers_reads(transformers, raw: dict) -> dict:
    """The sizes in transformers' own reading of a config, by our names."""
    config = getattr(transformers, FAMILIES[raw["model_type"]] + "Config")(**deepcopy(raw))
    text, tower = config.text_config, config.vision_config
    sections = text.rope_parameters.get("mrope_section", (16, 24, 24))
    sizes = {
        "vocabulary": text.vocab_size, "width": text.hidden_size,
        "layers": text.num_hidden_layers, "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads, "mlp_width": text.intermediate_size,
        "norm_eps": text.rms_norm_eps, "rope_theta": text.rope_parameters["rope_theta"],
        "rope_axes": tuple(np.repeat([0, 1, 2], sections).tolist()),
        "tied": config.tie_word_embeddings, "depth": tower.depth, "patch": tower.patch_size,
        "vision_heads": tower.num_heads, "frames": tower.temporal_patch_size,
        "merge": tower.spatial_merge_size, "act": tower.hidden_act}
    if raw["model_type"] == "qwen2_vl":
        return sizes | {"vision_width": tower.embed_dim, "out_width": tower.hidden_size,
                        "vision_mlp_width": tower.embed_dim * tower.mlp_ratio}
    return sizes | {"vision_width": tower.hidden_size, "out_width": tower.out_hidden_size,
                    "vision_mlp_width": tower.intermediate_size, "window": tower.window_size,
                    "full_blocks": tuple(tower.fullatt_block_indexes)}


def as_we_read(config: Config, names: dict) -> dict:
    """The same of ours."""
    ours = {name: getattr(config, name) for name in vars(config) if name != "raw"}
    for name, value in vars(config.vision).items():
        ours["vision_" + name if name in ("width", "heads", "mlp_width") else name] = value
    return {name: ours[name] for name in names}


def fits_together(sizes: dict) -> bool:
    """Whether a model could be built of the sizes that a config gives."""
    head_width = sizes["width"] // sizes["heads"]
    named = sizes.get("full_blocks", ())  # the default's may lie beyond the tower
    return (sizes["width"] % sizes["heads"] == 0 and sizes["heads"] % sizes["kv_heads"] == 0
            and len(sizes["rope_axes"]) * 2 == head_width
            and sizes["out_width"] == sizes["width"]
            and sizes["vision_width"] % (4 * sizes["vision_heads"]) == 0
            and (named == (7, 15, 23, 31) or max(named, default=0) < sizes["depth"]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nested", [True, False])
def test_any_key_may_be_left_out(transformers, family: str, nested: bool) -> None:
    """Sizes at random, some of them left out: read as transformers reads them, and refused just
    where these do not fit together."""
    dice = random.Random(f"{family} {nested}")
    compared = 0
    for _ in range(400):
        text = dict(
            vocab_size=dice.choice([500, 152064]), hidden_size=dice.choice([512, 8192]),
            intermediate_size=96, num_hidden_layers=dice.choice([3, 80]),
            num_attention_heads=dice.choice([4, 64]), num_key_value_heads=dice.choice([4, 8, None]),
            rms_norm_eps=1e-6, hidden_act="silu", use_sliding_window=False)
        rope = dict(mrope_section=[16, 24, 24], type="mrope", rope_theta=5e5)
        tower = dict(depth=dice.choice([2, 32]), num_heads=dice.choice([2, 16]), patch_size=14,
                     spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
        if family == "qwen2_vl":
            tower |= dict(embed_dim=dice.choice([64, 1280]), mlp_ratio=3, hidden_size=8192)
        else:
            tower |= dict(hidden_size=dice.choice([64, 3584]), out_hidden_size=8192,
                          window_size=56, intermediate_size=50, fullatt_block_indexes=[1])
        for part in (text, rope, tower):
            for key in dice.sample(sorted(part), dice.randint(0, len(part))):
                del part[key]

        # The rotary part in its older place and its newer one, rope_theta beside it or within.
        place = dice.choice(["rope_scaling", "rope_parameters"])
        if "rope_theta" in rope and dice.random() < 0.5:
            text["rope_theta"] = rope.pop("rope_theta")
        raw = {"model_type": family, "vision_config": tower}
        text |= {place: rope}
        raw |= {"text_config": text, "hidden_size": 77} if nested else text

        theirs = as_transformers_reads(transformers, raw)
        if fits_together(theirs):
            assert as_we_read(parse_config(raw), theirs) == theirs
            compared += 1
        else:
            refused_config(raw)
    assert 10 < compared < 300


# ---- configs: values that cannot be


NUMBERS = {
    "text": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "intermediate_size"),
    "vision": ("depth", "num_heads", "hidden_size", "out_hidden_size", "intermediate_size",
               "patch_size", "temporal_patch_size", "spatial_merge_size", "window_size")}
COUNTS = [("text", key) for key in NUMBERS["text"]] + [("vision", key) for key in NUMBERS["vision"]]


def refused_config(raw: dict) -> str:
    """The error for the content of a config.json."""
    with pytest.raises(MocaError) as caught:
        parse_config(raw, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ") and len(message) < 300
    return message


@pytest.fixture(scope="module")
def raw(golden: Path) -> dict:
    """A config that is right."""
    return json.loads((golden / "qwen2.5-vl" / "config.json").read_text())


@pytest.mark.parametrize("part, key", COUNTS)
def test_a_count_is_a_whole_number(raw: dict, part: str, key: str) -> None:
    """Not a word, a fraction, a truth value, nothing; not zero, negative or beyond any model."""
    values = ["2", 3.5, 8.0, True, False, {}, [4], 0, -1, -64, 10**9, 10**30, float("nan"),
              float("inf"), "[" * 10**6, [[]] * 10**6]
    values += [] if key == "num_key_value_heads" else [None]
    for value in values:
        changed = deepcopy(raw)
        changed[f"{part}_config"][key] = value
        message = refused_config(changed)
        assert f"{part}_config.{key} is " in message and "whole number" in message


@pytest.mark.parametrize("key, values", [
    ("rms_norm_eps", [0, 0.0, -1e-6, 2, True, None, "1e-6", float("nan"), float("inf"), [1e-6]]),
    ("rope_theta", [0, -1e4, 1e30, False, None, "10000", float("nan"), -float("inf"), {}]),
    ("tie_word_embeddings", ["false", "true", 0, 1, 1.0, None, [], "yes"]),
    ("use_sliding_window", [True, "false", 1, {}]),
    ("hidden_act", ["gelu", None, 1, ["silu"]]),
    ("layer_types", ["full_attention", ["full_attention"], ["sliding_attention"] * 4, [None] * 4,
                     ["full_attention"] * 3 + ["linear_attention"], {}]),
    ("torch_dtype", ["float8", "int8", "bfloat", 16, ["float32"], {}]),
    ("dtype", ["complex64", True]),
    ("head_dim", [32, "16", 16.0, True, [16]]),  # of a head 16 wide
    ("rope_scaling", ["", 0, False, [], 7]),
])
@pytest.mark.parametrize("nested", [True, False])
def test_other_values_of_the_decoder(raw: dict, key: str, values: list, nested: bool) -> None:
    """Each is named as it stands in the file, in a nested and in a flat one."""
    for value in values:
        changed = deepcopy(raw)
        text = changed["text_config"]
        if key == "rope_theta":
            text.pop("rope_parameters")
            text["rope_scaling"] = {"mrope_section": [2, 3, 3]}
        text[key] = value
        if not nested:
            changed = changed.pop("text_config") | changed  # the model_type of the latter
            changed[key] = value
        place = "text_config." if nested else "config.json: "
        assert f"{place}{key} is " in refused_config(changed)


@pytest.mark.parametrize("change, key", [
    (lambda raw: raw["text_config"].update(rope_parameters=[1]), "rope_parameters is [1]"),
    (lambda raw: raw["text_config"].update(rope_scaling="mrope"), "rope_scaling is 'mrope'"),
    (lambda raw: raw["text_config"]["rope_parameters"].update(rope_theta=None),
     "text_config.rope_parameters.rope_theta is None"),
    (lambda raw: raw["text_config"]["rope_parameters"].update(rope_type="yarn"), "rope_type"),
    (lambda raw: raw["text_config"]["rope_parameters"].update(type="linear"), "type is 'linear'"),
    (lambda raw: raw["text_config"].update(rope_scaling={"type": "yarn"}), "type is 'yarn'"),
    (lambda raw: raw.update(text_config=[]), "text_config is []"),
    (lambda raw: raw.update(text_config=7), "text_config is 7"),
    (lambda raw: raw.update(vision_config="vit"), "vision_config is 'vit'"),
    (lambda raw: raw.update(vision_config=[]), "vision_config is []"),
    (lambda raw: raw.update(nano_moca=["causal"]), "nano_moca"),
    (lambda raw: raw.update(model_type=["qwen2_vl"]), "model_type is ['qwen2_vl']"),
    (lambda raw: raw.update(model_type={}), "model_type"),
    (lambda raw: raw.pop("model_type"), "model_type"),
    (lambda raw: raw.update(tie_word_embeddings="false"), "config.json: tie_word_embeddings"),
    (lambda raw: raw["vision_config"]["rope_parameters"].update(rope_theta=500.0), "rope_theta"),
    (lambda raw: raw["vision_config"].update(hidden_act=None), "vision_config.hidden_act"),
    (lambda raw: raw["vision_config"].update(num_heads=8), "num_heads is 8"),  # 6 wide each
    (lambda raw: raw["vision_config"].update(in_channels=4), "in_channels is 4"),
    (lambda raw: raw["vision_config"].update(in_chans=1), "in_chans is 1"),
    (lambda raw: raw["text_config"]["rope_parameters"].update(mrope_interleaved=True),
     "mrope_interleaved is True"),
    (lambda raw: raw.update(nano_moca=None), "nano_moca is None"),
    (lambda raw: raw.update(nano_moca=0), "nano_moca is 0"),
])
def test_other_places(raw: dict, change: Callable, key: str) -> None:
    """Objects that are none, rotary positions of other kinds, the vision tower's switches."""
    changed = deepcopy(raw)
    change(changed)
    assert key in refused_config(changed)


@pytest.mark.parametrize("sections", [
    [-2, 5, 5], [2.0, 3, 3], ["2", 3, 3], [2, 3, 3, 0], [8], [2, 3, True, 2], [], None, 8,
    [10**30, 3, 3], {"2": 3}, "233", [2, 3, 4]])
def test_rotary_sections(raw: dict, sections: object) -> None:
    """Three whole numbers, none negative, half a head together."""
    changed = deepcopy(raw)
    changed["text_config"]["rope_parameters"]["mrope_section"] = sections
    assert "mrope_section is " in refused_config(changed)


@pytest.mark.parametrize("blocks", [[4], [1, 99], [-1], [1.0], ["1"], [True], None, 3, {}, [10**30],
                                    [[1]], [None]])
def test_full_attention_blocks(raw: dict, blocks: object) -> None:
    """A block that the tower does not have is refused; transformers passes it over."""
    changed = deepcopy(raw)
    changed["vision_config"]["fullatt_block_indexes"] = blocks
    assert "fullatt_block_indexes is " in refused_config(changed)


def test_blocks_that_are_there(raw: dict) -> None:
    """None, the first and the last are good; and a file may not name any."""
    changed = deepcopy(raw)
    for blocks in ([], [0], [3, 0, 3]):
        changed["vision_config"]["fullatt_block_indexes"] = blocks
        assert parse_config(changed).vision.full_blocks == tuple(blocks)
    del changed["vision_config"]["fullatt_block_indexes"]
    assert not set(range(4)) & set(parse_config(changed).vision.full_blocks)


def test_numbers_that_are_right(raw: dict) -> None:
    """A whole number where a fraction may be, and sizes beyond today's models."""
    changed = deepcopy(raw)
    changed["text_config"]["rope_parameters"]["rope_theta"] = 5000000
    changed["text_config"].update(intermediate_size=500_000, vocab_size=10_000_000)
    config = parse_config(changed)
    assert config.rope_theta == 5e6 and isinstance(config.rope_theta, float)
    assert config.mlp_width == 500_000


@pytest.mark.parametrize("content", [
    "[" * 100_000, '{"model_type": ' * 50_000, '{"a": ' + "9" * 5000 + "}", "NaN", "\ufeff{}",
    '"x"', b"\x00" * 100, b"\xff\xfe{}"])
def test_files_that_are_no_config(checkpoint: Path, content: str | bytes) -> None:
    """Nesting that exhausts the parser, numbers that exhaust time, other encodings."""
    content = content.encode() if isinstance(content, str) else content
    (checkpoint / "config.json").write_bytes(content)
    assert "config.json" in refusal(checkpoint)


def test_deep_values_are_shown_short(raw: dict) -> None:
    """A value nested as deep as the parser allows does not break the message about it."""
    deep = json.loads("[" * 900 + "]" * 900)
    assert len(refused_config(raw | {"text_config": {"hidden_size": deep}})) < 300


# ---- which files are read


def test_bare_names(checkpoint: Path, moca: Moca) -> None:
    """What AutoModel saves: language_model and visual, and no head."""
    rename(checkpoint, (("model.", "language_model."),))
    assert equal_models(nano_moca.load(checkpoint, "cpu"), moca)


def test_bare_names_without_their_head(golden: Path, tmp_path: Path) -> None:
    """A model whose head is not the embedding lacks something then."""
    folder = copy_of(golden / "qwen2.5-vl-untied", tmp_path)
    rename(folder, (("model.", "language_model."), (HEAD, "-")))
    message = refusal(folder)
    assert "missing lm_head.weight" in message and "output head" in message


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen2.5-vl-untied", "qwen2-vl"])
@pytest.mark.parametrize("prefixes", [
    (("model.", "model.language_model."), ("visual.", "model.visual.")),
    (("model.", "model.language_model."),), (("model.", "language_model."),)])
def test_every_layout(golden: Path, tmp_path: Path, name: str, prefixes: tuple) -> None:
    """The same bits under any of the names."""
    folder = copy_of(golden / name, tmp_path)
    rename(folder, prefixes)
    assert equal_models(nano_moca.load(folder, "cpu"), nano_moca.load(golden / name, "cpu"))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen2.5-vl-untied", "qwen2-vl"])
def test_saved_by_transformers(transformers, golden: Path, tmp_path: Path, name: str) -> None:
    """As a generator, in shards too, and as the base class: config and weights."""
    expected = nano_moca.load(golden / name, "cpu")
    for number, (kind, size) in enumerate((("AutoModelForImageTextToText", "50GB"),
                                           ("AutoModelForImageTextToText", "300KB"),
                                           ("AutoModel", "50GB"), ("AutoModel", "300KB"))):
        folder = tmp_path / str(number)
        theirs = getattr(transformers, kind).from_pretrained(golden / name, dtype=torch.float32)
        theirs.save_pretrained(folder, max_shard_size=size)
        for file in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copy(golden / name / file, folder)
        assert (folder / INDEX).exists() == (size == "300KB")
        if kind == "AutoModel" and "untied" in name:
            assert "missing lm_head.weight" in refusal(folder)
        else:
            assert equal_models(nano_moca.load(folder, "cpu"), expected)


def in_two_shards(folder: Path, spelling: str = "{}") -> Path:
    """Cut the weights in two files; returns the index, which spells their names so."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, spelling.format(shard))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / INDEX


def test_two_sets_of_weights(checkpoint: Path, moca: Moca) -> None:
    """One file, and an index that names others: both are named, whatever they hold. One of them
    is the older. Files with other names are nobody's business."""
    whole = (checkpoint / "model.safetensors").read_bytes()
    index = in_two_shards(checkpoint)
    (checkpoint / "consolidated.safetensors").write_bytes(b"broken")
    assert equal_models(nano_moca.load(checkpoint, "cpu"), moca)
    for content in (whole, b"broken"):
        (checkpoint / "model.safetensors").write_bytes(content)
        message = refusal(checkpoint)
        assert "two sets" in message and index.name in message
        assert f"{checkpoint} holds two sets of weights, model.safetensors" in message
    index.unlink()
    (checkpoint / "model.safetensors").write_bytes(whole)
    assert equal_models(nano_moca.load(checkpoint, "cpu"), moca)


def test_an_index_of_one_file(checkpoint: Path, moca: Moca) -> None:
    """An index that names model.safetensors itself is the same set."""
    names = load_file(checkpoint / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert equal_models(nano_moca.load(checkpoint, "cpu"), moca)


def test_a_tensor_in_two_shards(checkpoint: Path) -> None:
    """Nobody can say which is right."""
    in_two_shards(checkpoint)
    tensors = load_file(checkpoint / "model-00001-of-00002.safetensors")
    name = min(tensors)
    second = checkpoint / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {name: tensors[name]}, second)
    assert f"{name} and {name} in {second.name} are one" in refusal(checkpoint)


@pytest.mark.parametrize("spelling", [
    "../{}", "a/../../{}", "a/..", "..", "/etc/hostname", "{folder}/outside.safetensors",
    "{folder}/checkpoint/model.safetensors", "./../{}"])
def test_shards_outside(checkpoint: Path, spelling: str) -> None:
    """A written name may not lead out of the folder, nor be absolute: and is not opened."""
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "outside.safetensors")
    name = spelling.replace("{folder}", str(checkpoint.parent)).format("outside.safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    message = refusal(checkpoint)
    assert INDEX in message and name in message and "outside the folder" in message


@pytest.mark.parametrize("promised", [None, [], {}, "x", 5, {EMBEDDING: 5}, {EMBEDDING: None},
                                      {EMBEDDING: ["a"]}, {EMBEDDING: ""}, {EMBEDDING: "."},
                                      {EMBEDDING: "a\u0000b"}, {EMBEDDING: "a" * 5000},
                                      {EMBEDDING: "x\nerror: all is well"}])
def test_an_index_of_nothing(checkpoint: Path, promised: object) -> None:
    """An index without names, or with names that no file has."""
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": promised}))
    assert str(checkpoint) in refusal(checkpoint)


def test_links_are_followed(checkpoint: Path, moca: Moca, tmp_path: Path) -> None:
    """The hub's cache: snapshots hold links to blobs beside them. And a link to a single file."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    in_two_shards(checkpoint)
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    assert equal_models(nano_moca.load(snapshot, "cpu"), moca)
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert equal_models(nano_moca.load(linked, "cpu"), moca)


def test_shards_in_a_folder_within(checkpoint: Path, moca: Moca) -> None:
    """A name may lead further in."""
    in_two_shards(checkpoint, "./within/{}")
    (checkpoint / "within").mkdir()
    for shard in checkpoint.glob("*.safetensors"):
        shard.rename(checkpoint / "within" / shard.name)
    assert equal_models(nano_moca.load(checkpoint, "cpu"), moca)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device", "dangling"])
def test_only_ordinary_files(checkpoint: Path, name: str, kind: str) -> None:
    """What is no file is named, and not waited for."""
    in_two_shards(checkpoint)
    path = checkpoint / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling": "nowhere"}.get(kind, "/dev/zero"))
    message = refusal(checkpoint)
    assert name in message or (kind == "dangling" and "model.safetensors" in message)


# ---- what is in them


@pytest.mark.parametrize("name", ["linear.weight", "score.weight", "model.layers.9.mlp.x", "a\nb",
                                  "visual.blocks.7.norm1.weight", "model.visual.extra"])
def test_extra_tensors(checkpoint: Path, moca: Moca, name: str) -> None:
    """One that the model has no place for is refused, unless it is allowed."""
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(2, 3, dtype=torch.int8)}))
    shown = name.replace("\n", "\\n")
    assert f"unexpected {shown} in model.safetensors" in refusal(checkpoint)

    model = weights.empty_model(moca.model.config)
    model.to_empty(device="cpu")
    weights.load_weights(model, checkpoint, allow_extra=True)
    assert equal_models(Moca(model, moca.processor), moca)


KERNEL = "visual.patch_embed.proj.weight"


@pytest.mark.parametrize("change", [
    lambda kernel: kernel.permute(0, 2, 3, 4, 1), lambda kernel: kernel.transpose(1, 2),
    lambda kernel: kernel.flatten(1), lambda kernel: kernel.flatten(),
    lambda kernel: kernel[0, 0, 0, 0, 0], lambda kernel: kernel[None],
], ids=["channels last", "frames first", "a matrix", "a vector", "a number", "six axes"])
def test_a_kernel_of_other_axes(checkpoint: Path, change: Callable) -> None:
    """The right number of values, in another order, would be other weights."""
    def exchange(tensors: dict[str, Tensor]) -> None:
        tensors[KERNEL] = change(tensors[KERNEL]).contiguous().clone()

    rewrite(checkpoint, exchange)
    message = refusal(checkpoint)
    assert f"{KERNEL} is [" in message and "[48, 3, 2, 14, 14]" in message


@pytest.mark.parametrize("target", ["nowhere", "itself"])
@pytest.mark.parametrize("name", [INDEX, "processor_config.json"])
def test_a_dangling_link_is_not_passed_over(checkpoint: Path, name: str, target: str) -> None:
    """What a folder says to hold is read or refused, though there is an older file beside it."""
    nano_moca.load(checkpoint, "cpu")
    (checkpoint / name).symlink_to(name if target == "itself" else "blobs/0123")
    assert name in refusal(checkpoint)


@pytest.mark.parametrize("name", ["config.json", INDEX, "preprocessor_config.json",
                                  "processor_config.json", "tokenizer.json"])
def test_files_without_end(checkpoint: Path, name: str) -> None:
    """Terabytes, all of them zeros and none of them on the disk, are not read."""
    (checkpoint / name).touch()
    os.truncate(checkpoint / name, 2**40)
    assert name in refusal(checkpoint) and "bytes" in refusal(checkpoint)


def test_folders_of_any_name(checkpoint: Path, moca: Moca) -> None:
    """What the system takes as a name: a line end, one of the longest."""
    for name in ("line\nend", "a" * 255, "größe %s {}", "-x", "#y?z"):
        folder = checkpoint.with_name(name)
        checkpoint = checkpoint.rename(folder)
        assert equal_models(nano_moca.load(folder, "cpu"), moca)
    (checkpoint / "config.json").write_text("{")
    assert "config.json" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["", "x" * 300, "x/" * 3000, "a\0b", None, 7, b"abc", "\ud800"])
def test_names_of_no_folder(name: object) -> None:
    """Nothing, and what no system takes, is refused before anybody is asked for it."""
    assert "is not a folder" in refusal(name)


def test_long_names_are_shortened(checkpoint: Path) -> None:
    """A tensor's name of a megabyte, or a key's, is no line that anybody wants to read."""
    rewrite(checkpoint, lambda tensors: tensors.update({"x" * 10**6: torch.zeros(1)}))
    assert "unexpected xxx" in refusal(checkpoint) and len(refusal(checkpoint)) < 6000
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({"y" * 10**6: 1}))
    assert "yyyyy" in refusal(checkpoint) and len(refusal(checkpoint)) < 6000


def test_missing_is_an_error_always(checkpoint: Path, moca: Moca) -> None:
    """Whatever else is allowed."""
    rewrite(checkpoint, lambda tensors: tensors.update(other=tensors.pop(MLP)))
    model = weights.empty_model(moca.model.config)
    with pytest.raises(MocaError, match=f"missing {MLP}"):
        weights.load_weights(model, checkpoint, allow_extra=True)


def test_a_misfit_costs_no_memory(checkpoint: Path, moca: Moca, monkeypatch) -> None:
    """Names and shapes are matched on the meta device, before there are weights."""
    found = weights.find_weights(checkpoint, weights.empty_model(moca.model.config))
    assert found["language.norm.weight"] == (checkpoint / "model.safetensors", "model.norm.weight")
    assert len(found) == len(list(moca.model.parameters()))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("memory was given")

    monkeypatch.setattr(VLM, "to_empty", refuse)
    reconfigure(checkpoint, lambda raw: raw["text_config"].update(vocab_size=10**8))
    assert "[704, 64]" in refusal(checkpoint) and "[100000000, 64]" in refusal(checkpoint)


DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32",
          torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.bool: "BOOL",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [MLP, "visual.blocks.0.norm1.weight", HEAD])
def test_types_that_no_training_gives(checkpoint: Path, dtype: torch.dtype, name: str) -> None:
    """One tensor is enough: it is named with its type and file. A stored head counts too."""
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors.get(name, tensors[EMBEDDING]).to(dtype)

    rewrite(checkpoint, change)
    assert f"{name} in model.safetensors is {DTYPES[dtype]}," in refusal(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_that_training_gives(checkpoint: Path, records: list[Record], moca: Moca,
                                   dtype: torch.dtype) -> None:
    """The others of floating point are read, each tensor in its own; a tied head may be stored
    in another than the embedding's."""
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
        tensors[HEAD] = tensors[EMBEDDING].to(dtype).float()
        tensors[MLP] = tensors[MLP].to(dtype)

    rewrite(checkpoint, change)
    vectors = nano_moca.load(checkpoint, "cpu").embed(records)
    torch.testing.assert_close(vectors, moca.embed(records), atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name, place", [
    (EMBEDDING, 0), (EMBEDDING, -1), (MLP, 77), ("model.norm.weight", 1),
    ("visual.patch_embed.proj.weight", 5), ("model.layers.0.self_attn.q_proj.bias", -1)])
def test_weights_that_are_not_finite(checkpoint: Path, value: float, dtype: torch.dtype, name: str,
                                     place: int) -> None:
    """One value among all is enough, wherever it is and whatever its type."""
    def change(tensors: dict[str, Tensor]) -> None:
        spoilt = tensors[name].to(dtype)
        spoilt.view(-1)[place] = value
        tensors[name] = spoilt

    rewrite(checkpoint, change)
    message = refusal(checkpoint)
    assert name in message and str(checkpoint / "model.safetensors") in message


def test_finite_only_in_float64(checkpoint: Path) -> None:
    """What float32 cannot hold would become infinity."""
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[MLP] = tensors[MLP].double()
        tensors[MLP][0, 0] = -1e300

    rewrite(checkpoint, change)
    assert MLP in refusal(checkpoint)


def forge(path: Path, header: bytes | dict, data: bytes = b"") -> None:
    """A safetensors file with this header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(shape: list, end: int = 16, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize("header", [
    {EMBEDDING: entry([2**40, 2**40])}, {EMBEDDING: entry([-4])}, {EMBEDDING: entry([4], 2**60)},
    {EMBEDDING: entry([4]), HEAD: entry([4])}, {EMBEDDING: entry([4], dtype="Q4_K")},
    {EMBEDDING: entry([32], dtype="F4")}, {EMBEDDING: entry([0, 64], 0)}, {EMBEDDING: entry([], 4)},
    {EMBEDDING: 5}, b"[" * 10_000, b"{", b"\xff" * 50, {"a\nerror: all is well": entry([4])}])
def test_headers_that_lie(checkpoint: Path, header: bytes | dict) -> None:
    """Sizes that overflow, that are not there or that overlap; unknown types; no JSON."""
    forge(checkpoint / "model.safetensors", header, bytes(16))
    assert str(checkpoint) in refusal(checkpoint)


def test_a_header_longer_than_its_file(checkpoint: Path) -> None:
    """The length is read first, and would be the size of a buffer."""
    for length in (2**63, 10**12, 200):
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        assert "model.safetensors" in refusal(checkpoint)
