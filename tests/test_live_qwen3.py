"""Qwen3-VL against transformers itself: random shapes, random pictures, both ways.

As in test_live.py: fresh tiny models are built and saved by transformers, read by nano_moca and
compared; and transformers reads what nano_moca saves.
"""

import copy
import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import nano_moca
from nano_moca import MARK, Moca, Record, weights
from nano_moca.convert.export import save_model
from nano_moca.config import BASE
from nano_moca.convert import export
from nano_moca.distributed import World
from nano_moca.families import build_model
from nano_moca.processor import Processor
from nano_moca.qwen3.config import parse_qwen3
from test_qwen3 import PIXELS, complete, fill, random_shape

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Qwen3VLForConditionalGeneration"):
    pytest.skip("this transformers is older than Qwen3-VL", allow_module_level=True)
from test_live import ReferenceImageProcessor, random_picture

close = partial(torch.testing.assert_close, rtol=0)
ALONE = World(0, 1, torch.device("cpu"), torch.float32)
HUB = {  # the sizes of the three dense models
    "2B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
               num_attention_heads=16, tied=True),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
               num_attention_heads=32, tied=True),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
               num_attention_heads=32, tied=False)}


def reference_model(shape: dict, seed: int) -> nn.Module:
    """A model of random weights."""
    config = transformers.Qwen3VLConfig(**copy.deepcopy(shape))
    config._attn_implementation = "eager"
    model = fill(transformers.Qwen3VLForConditionalGeneration(config).eval().float(), seed)
    model.tie_weights()
    return model


def save_reference(model: nn.Module, folder: Path) -> Path:
    """A checkpoint as transformers writes it."""
    model.save_pretrained(folder)
    return complete(folder)


def random_record(dice: random.Random, images: int) -> Record:
    """Words and pictures in any order, pictures side by side or not."""
    words = dice.choices([" a word", "\n", "blue star,", "<|im_end|>", "12"], k=4)
    parts = [MARK] * images + words
    dice.shuffle(parts)
    return Record("".join(parts), [random_picture(dice) for _ in range(images)])


def reference_inputs(model: nn.Module, record: Record) -> dict[str, Tensor]:
    """What transformers makes of a record before its model runs."""
    text, inputs = record.text, {}
    if record.images:
        limits = {name: PIXELS[name] for name in PIXELS if name != "image_processor_type"}
        inputs = dict(ReferenceImageProcessor(**limits)(images=record.images, return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].float()
        for grid in inputs["image_grid_thw"].tolist():
            text = text.replace("<|image_pad|>", "<|x|>" * (np.prod(grid) // 4), 1)
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(text.replace("<|x|>", "<|image_pad|>")).ids)[None]
    types = (ids == model.config.image_token_id).int()
    return inputs | dict(input_ids=ids, mm_token_type_ids=types,
                         attention_mask=torch.ones_like(ids))


@torch.no_grad()
def reference_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers computes: positions, image tokens and features, hidden states both ways,
    logits. (Its decoder is always causal, so the layers are called here one by one.)"""
    body, ids, grids = model.model, inputs["input_ids"], inputs.get("image_grid_thw")
    positions, _ = body.get_rope_index(
        ids, inputs["mm_token_type_ids"], image_grid_thw=grids,
        attention_mask=inputs["attention_mask"])
    out = dict(positions=positions[:, 0])
    start, features = model.get_input_embeddings()(ids), []
    is_image = ids[0] == model.config.image_token_id
    if grids is not None:
        seen = body.visual(inputs["pixel_values"], grid_thw=grids)
        features = seen.deepstack_features
        out["vision"] = torch.stack([seen.pooler_output, *features], 1)
        start[0, is_image] = seen.pooler_output
    decoder, length = body.language_model, ids.shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    rotary = decoder.rotary_emb(start, positions)
    for name, mask in (("causal", causal), ("bidirectional", torch.zeros_like(causal))):
        hidden = start.clone()
        for number, layer in enumerate(decoder.layers):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            if number < len(features):
                hidden[0, is_image] += features[number]
        out[name] = decoder.norm(hidden)[0]
    out["logits"] = model(**inputs).logits[0]
    return out


@torch.no_grad()
def compare(moca: Moca, model: nn.Module, record: Record) -> None:
    """A record through both: the same at every place on the way."""
    inputs = reference_inputs(model, record)
    expected = reference_outputs(model, inputs)
    batch = moca.processor.batch([record])
    assert torch.equal(batch.tokens, inputs["input_ids"][0])
    assert torch.equal(batch.positions, expected["positions"])
    if record.images:
        assert torch.equal(batch.grids, inputs["image_grid_thw"])
        close(batch.patches, inputs["pixel_values"], atol=1e-6)
        close(moca.model.visual(batch.patches, batch.layout), expected["vision"], atol=1e-4)
    for name in ("causal", "bidirectional"):
        close(moca.model(batch, causal=name == "causal"), expected[name], atol=1e-4)
    close(moca.model(batch, causal=True) @ moca.model.head.T, expected["logits"], atol=5e-4)


@pytest.mark.parametrize("seed", range(6))
def test_random_models(seed: int, tmp_path: Path) -> None:
    """A fresh model of random shape computes the same in both, on text and several pictures."""
    dice = random.Random(seed)
    model = reference_model(random_shape(dice, tied=seed % 2 == 0), seed)
    moca = nano_moca.load(save_reference(model, tmp_path / "model"), "cpu")
    assert moca.model.config.tied == (seed % 2 == 0)
    for images in (0, 1, 2, 3):
        compare(moca, model, random_record(dice, images))


@pytest.mark.parametrize("seed", [10, 11])
@torch.no_grad()
def test_greedy(seed: int, tmp_path: Path) -> None:
    """Both go on with the same words, each record alone there and packed here: features stay
    where the images are."""
    dice = random.Random(seed)
    model = reference_model(random_shape(dice, tied=False), seed)
    moca = nano_moca.load(save_reference(model, tmp_path / "model"), "cpu")
    records = [random_record(dice, images) for images in (1, 0, 2)]
    captions = moca.caption(records, steps=8)
    end = moca.processor.end_token
    for record, caption in zip(records, captions, strict=True):
        inputs = reference_inputs(model, record)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=end,
                             pad_token_id=end)[0, inputs["input_ids"].shape[1] :].tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        assert caption == moca.processor.tokenizer.decode(ids, skip_special_tokens=False)
        assert len(set(ids)) > 2, "too dull to tell anything"


@pytest.mark.parametrize("shard_size", ["5GB", 40_000])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_we_save(tied: bool, shard_size: str | int, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved model loads with no key missing, unexpected or misshapen, and computes the same."""
    monkeypatch.setattr(export, "SHARD_SIZE", shard_size)
    dice = random.Random(20 + tied)
    model = reference_model(random_shape(dice, tied), 0)
    moca = nano_moca.load(save_reference(model, tmp_path / "theirs"), "cpu")
    with torch.no_grad():
        for parameter in moca.model.parameters():  # another model than the one that was read
            parameter.mul_(1.01)
    save_model(tmp_path / "ours", ALONE, moca.model, moca.processor)
    again, info = type(model).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard_size != "5GB")
    compare(moca, again, random_record(dice, 2))

    # And its image processor is found by its own name, with the limits of the checkpoint.
    theirs = ReferenceImageProcessor.from_pretrained(tmp_path / "ours")
    picture = random_picture(dice)
    expected = theirs(images=[picture], return_tensors="pt")
    batch = moca.processor.batch([Record(MARK, [picture])])
    assert torch.equal(batch.grids, expected["image_grid_thw"])
    close(batch.patches, expected["pixel_values"].float(), atol=1e-6)


def test_random_pictures(tmp_path: Path) -> None:
    """Pixels to 1e-6 and equal grids on many sizes and limits, in patches of 16 pixels."""
    dice = random.Random(0)
    complete(tmp_path)
    config = parse_qwen3(random_shape(dice, tied=True))
    for _ in range(40):
        low = 32 * 32 * dice.choice([1, 4, 16])
        high = low * dice.choice([4, 10, 40])
        processor = Processor.load(tmp_path, config, low, high)
        given = {name: PIXELS[name] for name in PIXELS if name != "image_processor_type"}
        given["size"] = {"shortest_edge": low, "longest_edge": high}
        image = random_picture(dice).convert(dice.choice(["RGB", "L", "P", "CMYK", "1"]))
        expected = ReferenceImageProcessor(**given)(images=[image], return_tensors="pt")
        batch = processor.batch([Record(MARK, [image])])
        assert torch.equal(batch.grids, expected["image_grid_thw"])
        close(batch.patches, expected["pixel_values"].float(), atol=1e-6)


@pytest.mark.parametrize("size", HUB)
def test_true_shapes(size: str) -> None:
    """The three dense models: their config.json is read, and every tensor has its name and shape.
    (Without memory for the weights.)"""
    sizes = dict(HUB[size])
    tied = sizes.pop("tied")
    rope = dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default")
    text = sizes | dict(
        model_type="qwen3_vl_text", attention_bias=False, attention_dropout=0.0, dtype="bfloat16",
        head_dim=128, hidden_act="silu", max_position_embeddings=262144, num_key_value_heads=8,
        rms_norm_eps=1e-6, rope_scaling=rope, rope_theta=5000000, tie_word_embeddings=tied,
        use_cache=True, vocab_size=151936)
    vision = dict(
        model_type="qwen3_vl", depth=24, deepstack_visual_indexes=[5, 11, 17], hidden_size=1024,
        intermediate_size=4096, hidden_act="gelu_pytorch_tanh", in_channels=3, num_heads=16,
        num_position_embeddings=2304, out_hidden_size=sizes["hidden_size"], patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2)
    if size == "8B":
        vision |= dict(depth=27, deepstack_visual_indexes=[8, 16, 24], hidden_size=1152,
                       intermediate_size=4304)
    raw = dict(model_type="qwen3_vl", image_token_id=151655, video_token_id=151656,
               vision_start_token_id=151652, vision_end_token_id=151653, text_config=text,
               vision_config=vision, tie_word_embeddings=tied)

    config = parse_qwen3(json.loads(json.dumps(raw)))
    with torch.device("meta"):
        ours = build_model(config)
        theirs = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**raw))
    shapes = {weights.stored_name(name, config): weight.numel()
              for name, weight in ours.named_parameters()}
    assert shapes == {name: weight.numel() for name, weight in theirs.named_parameters()}
    assert round(sum(shapes.values()) / 1e9, 2) == {"2B": 2.13, "4B": 4.44, "8B": 8.77}[size]

    # The frequencies turn with the same axes.
    rotary = theirs.model.language_model.rotary_emb.to_empty(device="cpu")
    rotary.inv_freq = torch.ones_like(rotary.inv_freq, device="cpu")
    positions = torch.tensor([[1.0], [2.0], [3.0]])[:, None]  # [3, 1, 1]
    turned = torch.stack([positions[axis, 0, 0].cos() for axis in config.rope_axes])
    close(rotary(torch.zeros(1), positions)[0][0, 0, :64], turned, atol=1e-6)
