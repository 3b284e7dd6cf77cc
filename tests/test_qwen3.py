"""Qwen3-VL: what its config.json may say, packing, gradients, and both stages on it.

The checkpoints are tiny, of random shape and weights, and are made here; that the model is
Qwen3-VL is tested against transformers, in test_live_qwen3.py. What is not of this family (masking,
losses, batches, files) is tested elsewhere.
"""

import copy
import json
import math
import multiprocessing
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import nano_moca
import train_cl
import train_cpt
from launching import Job, assert_same_run, child, free_port, read_log, read_weights, write_data
from nano_moca import MARK, Moca, MocaError, Record
from nano_moca import model as qwen2
from nano_moca.batch import Batch
from nano_moca.config import BASE
from nano_moca.convert import export
from nano_moca.families import build_model, load_config
from nano_moca.masking import MaskedBatch, mask_batch
from nano_moca.model import VLM, ReconstructionModel
from nano_moca.qwen3 import model as qwen3
from nano_moca.qwen3.config import parse_qwen3
from waits import Watch, attend_nowhere

close = partial(torch.testing.assert_close, rtol=0)
# the hub's preprocessor_config.json, but for its limits, 256 x 256 to 4096 x 4096 pixels
PIXELS = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3,
          "image_std": [0.5] * 3, "image_processor_type": "Qwen2VLImageProcessorFast",
          "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 30 * 32 * 32}}


def random_shape(dice: random.Random, tied: bool) -> dict:
    """A config.json for the nano base's tokenizer. Heads are wider or narrower than D / H, the
    sections divide them anyhow, the table of positions is smaller or larger than the images."""
    head_dim, kv_heads = dice.choice([16, 24, 32]), dice.choice([1, 2])
    width, vision_heads = dice.choice([32, 40, 72]), dice.choice([1, 2, 3])
    row, column = (dice.randint(1, head_dim // 6) for _ in range(2))
    layers, depth = dice.choice([3, 4]), dice.choice([4, 5])
    features = dice.choice([0, 1, 2, 3])
    rope = dict(rope_type="default", rope_theta=dice.choice([1e4, 5e6]), mrope_interleaved=True,
                mrope_section=[head_dim // 2 - row - column, row, column])
    text = dict(
        model_type="qwen3_vl_text", vocab_size=1330, hidden_size=width,
        intermediate_size=dice.choice([40, 100]), num_hidden_layers=layers,
        num_attention_heads=kv_heads * dice.choice([1, 2, 3]), num_key_value_heads=kv_heads,
        head_dim=head_dim, dtype="float32", rope_parameters=rope)
    vision = dict(
        depth=depth, hidden_size=vision_heads * dice.choice([16, 20]), intermediate_size=52,
        num_heads=vision_heads, out_hidden_size=width,
        num_position_embeddings=dice.choice([2, 3, 7, 16]) ** 2,
        deepstack_visual_indexes=sorted(dice.sample(range(depth), features)))
    tokens = json.loads((BASE / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    return dict(
        model_type="qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=tied,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, large enough for every part to count."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        if weight.dim() == 1:
            is_scale = "norm" in name and name.endswith("weight")
            weight.copy_(is_scale + 0.2 * noise)
        else:
            is_table = name.endswith(("embed_tokens.weight", "pos_embed.weight"))
            weight.copy_(noise if is_table else 1.6 * noise / math.sqrt(weight[0].numel()))
    return model


def complete(folder: Path) -> Path:
    """The files beside weights and config.json."""
    shutil.copy(BASE / "tokenizer.json", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


@pytest.fixture(scope="module")
def raw() -> dict:
    """One config.json: five blocks, of which three put out features, and four layers."""
    raw = random_shape(random.Random(0), tied=True)
    raw["text_config"]["num_hidden_layers"] = 4
    raw["vision_config"] |= dict(
        depth=5, deepstack_visual_indexes=[0, 2, 3], num_position_embeddings=25)
    return raw


@pytest.fixture(scope="module")
def checkpoint(raw: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of it. Tests must not change it."""
    folder = tmp_path_factory.mktemp("qwen3")
    config = parse_qwen3(copy.deepcopy(raw))
    export.save_weights(folder, fill(build_model(config), seed=0).state_dict(), config)
    return complete(folder)


@pytest.fixture(scope="module")
def moca(checkpoint: Path) -> Moca:
    """It is loaded."""
    return nano_moca.load(checkpoint, "cpu")


def picture(number: int) -> Image.Image:
    """Noise, of one of four shapes, one of which is stretched a lot."""
    high, wide = ((64, 64), (40, 300), (96, 70), (150, 64))[number % 4]
    pixels = np.random.default_rng(number).integers(0, 255, (high, wide, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Text alone, one image, two images with and without text between, and an image at the end."""
    return [Record("blue star, red anchor"), Record(f"{MARK} a picture", [picture(0)]),
            Record(f"see{MARK}{MARK} both", [picture(1), picture(2)]),
            Record(f"{MARK} and {MARK}", [picture(3), picture(0)]), Record("umbrella")]


# --- config.json ----------------------------------------------------------------------


def test_the_family_chooses_the_model(moca: Moca, checkpoint: Path) -> None:
    """Qwen3-VL's towers for its config, and Qwen2.5-VL's for another."""
    assert isinstance(moca.model, qwen3.VLM)
    assert isinstance(moca.model.visual, qwen3.VisionTower)
    assert moca.model.config == load_config(checkpoint)
    assert type(build_model(load_config(BASE))) is VLM


def test_what_a_file_leaves_out() -> None:
    """A file that says nothing is transformers' default, whose towers do not even fit; one
    of transformers 4 keeps rope_theta beside the other rotary parameters, or leaves it out."""
    config = parse_qwen3({"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}})
    assert (config.vocabulary, config.layers, config.kv_heads, config.mlp_width) == (
        151936, 32, 32, 22016)
    assert (config.head_width, config.rope_theta, config.norm_eps) == (128, 5e5, 1e-6)
    assert (len(config.rope_axes), config.tied) == (64, False)
    assert (config.vision.depth, config.vision.width, config.vision.table_side) == (27, 1152, 48)
    assert (config.vision.patch_values, config.vision.deepstack) == (1536, (8, 16, 24))

    older = random_shape(random.Random(0), tied=True)
    text = older["text_config"]
    newer = parse_qwen3(copy.deepcopy(older))
    text["rope_scaling"] = text.pop("rope_parameters")
    text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
    assert replace(parse_qwen3(older), raw={}) == replace(newer, raw={})


@pytest.mark.parametrize(("sections", "axes"), [
    ([24, 20, 20], [0, 1, 2] * 20 + [0] * 4), ([4, 3, 1], [0, 1, 2, 0, 1, 0, 0, 1]),
    ([2, 3, 3], [0, 1, 2, 0, 1, 2, 0, 1])])  # here the rows would need a ninth frequency
def test_axes_take_turns(raw: dict, sections: list[int], axes: list[int]) -> None:
    """Frame, row, column, frame, ..., and what is left turns with the frame."""
    raw = copy.deepcopy(raw)
    raw["text_config"]["head_dim"] = 2 * len(axes)
    raw["text_config"]["rope_parameters"]["mrope_section"] = sections
    assert parse_qwen3(raw).rope_axes == tuple(axes)


@pytest.mark.parametrize(("place", "key", "value"), [
    ("", "model_type", "qwen3_vl_moe"), ("", "model_type", "qwen3_5"),
    ("", "text_config", []), ("", "vision_config", "none"), ("", "dtype", "float64"),
    ("", "tie_word_embeddings", "yes"), ("", "nano_moca", 1),
    ("text_config", "model_type", "qwen3_vl_moe_text"), ("text_config", "hidden_act", "gelu"),
    ("text_config", "attention_bias", True), ("text_config", "head_dim", 0),
    ("text_config", "head_dim", "16"), ("text_config", "hidden_size", -32),
    ("text_config", "hidden_size", 32.0), ("text_config", "num_hidden_layers", 10**5),
    ("text_config", "num_key_value_heads", 7), ("text_config", "rms_norm_eps", math.nan),
    ("text_config", "vocab_size", True), ("text_config", "num_attention_heads", None),
    ("text_config.rope_parameters", "rope_type", "yarn"),
    ("text_config.rope_parameters", "type", "linear"),
    ("text_config.rope_parameters", "rope_theta", math.inf),
    ("text_config.rope_parameters", "mrope_interleaved", False),
    ("text_config.rope_parameters", "mrope_section", [4, 2, 3]),
    ("text_config.rope_parameters", "mrope_section", [4, 4]),
    ("text_config.rope_parameters", "mrope_section", [4, "2", 2]),
    ("vision_config", "hidden_act", "silu"), ("vision_config", "out_hidden_size", 31),
    ("vision_config", "num_heads", 5), ("vision_config", "spatial_merge_size", 0),
    ("vision_config", "depth", 10**5), ("vision_config", "patch_size", [16, 16]),
    ("vision_config", "rope_parameters", {"rope_theta": 1e6}),
    ("vision_config", "deepstack_visual_indexes", [0, 9]),
    ("vision_config", "deepstack_visual_indexes", [-1, 2]),
    ("vision_config", "deepstack_visual_indexes", [2, 1]),
    ("vision_config", "deepstack_visual_indexes", [1, 1]),
    ("vision_config", "deepstack_visual_indexes", [0, 1.5]),
    ("vision_config", "deepstack_visual_indexes", [0, 1, 2, 3, 4]),
])
def test_refused_configs(place: str, key: str, value: object, raw: dict, tmp_path: Path) -> None:
    """What this code does not implement, and what no model could be, is one line that names
    file and key."""
    raw = copy.deepcopy(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    load_config(tmp_path)
    part = raw
    for name in filter(None, place.split(".")):
        part = part[name]
    part[key] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(MocaError) as error:
        load_config(tmp_path)
    message = str(error.value)
    assert "config.json" in message and key in message and "\n" not in message, message
    if key == "model_type":
        assert str(value) in message


def test_default_blocks_of_a_shallow_tower(raw: dict) -> None:
    """By default blocks 8, 16 and 24 put out features: there have to be as many."""
    raw = copy.deepcopy(raw)
    del raw["vision_config"]["deepstack_visual_indexes"]
    with pytest.raises(MocaError, match="deepstack_visual_indexes is left out"):
        parse_qwen3(raw)
    raw["vision_config"]["depth"] = 25
    assert parse_qwen3(raw).vision.deepstack == (8, 16, 24)


def test_a_table_of_another_size(checkpoint: Path, tmp_path: Path) -> None:
    """The weights do not fit then, and the message says which; also if it is no square."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"]["num_position_embeddings"] = 24
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(MocaError, match="pos_embed.weight is"):
        nano_moca.load(folder, "cpu")


# --- images ---------------------------------------------------------------------------


def test_patches_of_sixteen_pixels(moca: Moca) -> None:
    """Sides are multiples of 32 pixels; a patch is 1536 values around 0; and back."""
    image = picture(3)
    batch = moca.processor.batch([Record(MARK, [image])])
    grid = tuple(batch.grids[0].tolist())
    assert batch.patches.shape == (grid[1] * grid[2], 1536)
    assert -1 <= batch.patches.min() and batch.patches.max() <= 1
    resized = image.resize((grid[2] * 16, grid[1] * 16), Image.Resampling.BICUBIC)
    pixels = moca.processor.unpatchify(batch.patches.numpy(), grid)
    assert np.abs(pixels * 255 - np.asarray(resized)).max() < 1e-3


def test_positions_are_stretched(moca: Moca) -> None:
    """The corners of an image lie on the corners of the table, whatever its shape; an image of the
    table's own size has the table itself."""
    tower = moca.model.visual
    side, table = tower.config.table_side, tower.pos_embed.weight
    corners = table.view(side, side, -1)[[0, 0, -1, -1], [0, -1, 0, -1]]
    for rows, columns in ((2, 2), (4, 18), (30, 6)):
        learnt = tower.learnt_positions(1, rows, columns)
        assert learnt.shape == (rows * columns, tower.config.width)
        groups = learnt.view(rows // 2, columns // 2, 4, -1)
        ends = groups[0, 0, 0], groups[0, -1, 1], groups[-1, 0, 2], groups[-1, -1, 3]
        close(torch.stack(ends), corners, atol=1e-6)


# --- packing and gradients ------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_packing_changes_nothing(moca: Moca, records: list[Record], causal: bool) -> None:
    """A record's hidden states are the same alone, and beside others in any order."""
    alone = [moca.model(moca.processor.batch([record]), causal) for record in records]
    for order in ([3, 0, 2, 4, 1], [4, 2, 1, 0, 3]):
        batch = moca.processor.batch([records[n] for n in order])
        parts = moca.model(batch, causal).split(batch.lengths)
        for number, part in zip(order, parts, strict=True):
            close(part, alone[number], atol=2e-5)


@torch.no_grad()
def test_the_end_reaches_the_beginning_iff_bidirectional(moca: Moca, records: list[Record]
                                                         ) -> None:
    """Another last word or another last picture changes the first hidden state when
    bidirectional, never when causal."""
    batch = moca.processor.batch(records[2:3])
    tokens = batch.tokens.clone()
    tokens[-1] = 5
    pixels = batch.pixels.clone()
    pixels[-1] = 255 - pixels[-1]  # of the last group
    last_group = int(batch.image_index[-1])
    for changed, place in ((replace(batch, tokens=tokens), len(tokens) - 1),
                           (replace(batch, pixels=pixels), last_group)):
        for causal in (False, True):
            change = moca.model(changed, causal) - moca.model(batch, causal)
            assert (change[0].abs().max() > 1e-4) == (not causal)
            assert change[place].abs().max() > 1e-2


def test_the_host_does_not_wait(moca: Moca, records: list[Record], monkeypatch: pytest.MonkeyPatch
                               ) -> None:
    """Forward and backward read nothing from the device and send nothing: see waits.py."""
    for module in (qwen3, qwen2):
        monkeypatch.setattr(module, "attend", attend_nowhere)
    batch = moca.processor.batch(records).to("meta")
    model = copy.deepcopy(moca.model).to("meta")
    with Watch() as watch:
        model.embed(batch, causal=False, pooling="mean").sum().backward()
    assert not watch.waits and not watch.copies


def layer_inputs(model: VLM, x: Tensor, batch: Batch) -> list[Tensor]:
    """What each layer of the decoder is given, and what the decoder puts out."""
    taken: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
             for layer in model.language.layers]
    taken.append(model.language(x, batch.positions, batch.segments, causal=False))
    for hook in hooks:
        hook.remove()
    return taken


@torch.no_grad()
def test_features_enter_after_their_layers(moca: Moca, records: list[Record]) -> None:
    """The first feature is added to the image tokens after the first layer, the next after the
    next; the words get nothing, and hear of it from the image tokens only."""
    batch = moca.processor.batch(records[3:4])
    x = moca.model.embed_inputs(batch)  # [T, 1 + k, D]
    is_image = torch.zeros(len(batch.tokens), dtype=torch.bool)
    is_image[batch.image_index] = True
    assert x.shape[1] == 1 + len(moca.model.config.vision.deepstack) == 4
    assert not x[~is_image, 1:].any() and x[is_image].abs().amax(-1).all()

    with_all = layer_inputs(moca.model, x, batch)
    for number in (1, 2, 3):
        without = x.clone()
        without[:, number] = 0
        pairs = zip(with_all, layer_inputs(moca.model, without, batch), strict=True)
        changed = [(one != other).any(-1) for one, other in pairs]  # [T] each
        assert not torch.stack(changed[:number]).any()
        assert torch.equal(changed[number], is_image)


def stage_one(moca: Moca, records: list[Record]) -> tuple[ReconstructionModel, MaskedBatch]:
    """Stage 1's model around a loaded one, and a masked batch."""
    model = ReconstructionModel(moca.model)
    model.patch_decoder.to_empty(device="cpu").init_from(moca.model.language, seed=0)
    batch = moca.processor.batch(records)
    return model, mask_batch(batch, moca.processor, 0.4, 0.5, [(0, n) for n in range(len(records))])


def test_the_patch_decoder_is_the_middle_layer(moca: Moca, records: list[Record]) -> None:
    """Stage 1's layer has normed heads too, and predicts groups of 6144 values."""
    model, masked = stage_one(moca, records)
    middle = moca.model.language.layers[len(moca.model.language.layers) // 2].state_dict()
    layer = model.patch_decoder.layer.state_dict()
    assert layer.keys() == middle.keys() and "self_attn.q_norm.weight" in layer
    assert all(torch.equal(layer[name], middle[name]) for name in layer)
    with torch.no_grad():
        _, pixels = model(masked, causal=False, predict=True)
    assert pixels.shape == masked.target.shape == (len(masked.group_index), 6144)


def test_gradients_reach_every_parameter(moca: Moca, records: list[Record]) -> None:
    """Also those of DeepStack's mergers and the whole table of positions; with checkpointing the
    same ones to the bit."""
    model, masked = stage_one(moca, records)
    names = [name for name, _ in model.named_parameters()]
    assert any("deepstack_merger_list.1.norm.bias" in name for name in names)
    gradients = []
    try:
        for on in (False, True):
            moca.model.set_checkpointing(on)
            loss = sum(model(masked, causal=False))
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    finally:
        moca.model.set_checkpointing(False)
    for name, kept, again in zip(names, *gradients, strict=True):
        assert kept.any(), name
        assert torch.equal(kept, again), name
        if "pos_embed" in name:
            assert kept.any(-1).all()


def test_a_batch_without_images_runs_all_of_the_tower(moca: Moca, records: list[Record]) -> None:
    """For the sake of other ranks: nothing changes, and each weight's gradient is zero."""
    batch = moca.processor.batch(records[:1])
    expected = moca.model(batch, causal=False)
    moca.model.run_vision_always = True
    try:
        hidden = moca.model(batch, causal=False)
    finally:
        moca.model.run_vision_always = False
    assert torch.equal(hidden, expected)
    gradients = torch.autograd.grad(hidden.sum(), list(moca.model.visual.parameters()))
    assert not any(gradient.any() for gradient in gradients)


@torch.no_grad()
def test_half_precision(moca: Moca, checkpoint: Path, records: list[Record]) -> None:
    """In bfloat16 the vectors are nearly the same."""
    half = nano_moca.load(checkpoint, "cpu", torch.bfloat16)
    assert half.model.head.dtype == torch.bfloat16
    assert (half.embed(records) * moca.embed(records)).sum(-1).min() > 0.99


# --- both stages ----------------------------------------------------------------------


def start(folder: Path, script: str, line: str, ranks: int) -> Job:
    """A run of a script in processes of its own, as launching.py starts them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launching", "train_cpt", "train_cl"])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = folder.with_suffix(".txt")
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        arguments = (script, line.split(), said, address | place, None, None)
        processes.append(context.Process(target=child, args=arguments, daemon=True))
        processes[-1].start()
    return Job(processes, said)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2's data: pictures and their captions, with a hard negative, and words."""
    folder, lines = tmp_path_factory.mktemp("pairs"), []
    for number in range(8):
        picture(number).save(folder / f"{number}.png")
        seen = {"text": f"{MARK} picture", "images": [f"{number}.png"]}
        lines.append({"task": "pictures", "kind": "image-text", "query": {"text": f"star {number}"},
                      "positive": seen, "negatives": [{"text": f"anchor {number}"}]})
        lines.append({"task": "words", "kind": "text-only", "query": {"text": f"blue {number}"},
                      "positive": {"text": f"red {number}"}})
    return write_data(folder / "data.jsonl", lines)


@pytest.mark.parametrize(("script", "flags"), [
    (train_cpt, "--steps 4 --batch-tokens 200 --no-report"),
    (train_cl, "--steps 4 --batch 4 --chunk 3 --no-report")])
def test_both_stages_on_two_ranks(script, flags: str, checkpoint: Path, mixed: Path, pairs: Path,
                                  tmp_path: Path) -> None:
    """Each trains the whole model, two ranks as one, batches without images included; and what it
    saves is a checkpoint of the same family."""
    flags += f" --device cpu --model {checkpoint} --data {pairs if script is train_cl else mixed}"
    jobs = []
    for ranks in (1, 2):
        line = f"{flags} --output {tmp_path}/{ranks}"
        jobs.append(start(tmp_path / str(ranks), script.__name__, line, ranks))
    for job in jobs:
        assert job.wait() == 0, job.output
    assert_same_run(tmp_path / "2", tmp_path / "1", start=checkpoint)
    assert all(math.isfinite(line["loss"]) for line in read_log(tmp_path / "1"))

    # Every tensor has moved, and has the name by which it was read.
    before = nano_moca.load(checkpoint, "cpu")
    after = nano_moca.load(tmp_path / "1" / "model", "cpu")
    assert type(after.model) is qwen3.VLM
    assert all(name.startswith("model.") for name in read_weights(tmp_path / "1"))
    for (name, old), new in zip(before.model.named_parameters(), after.model.parameters(),
                                strict=True):
        assert not torch.equal(old, new), name
