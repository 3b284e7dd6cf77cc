"""Against transformers itself, where it is installed: random shapes, random pictures, both ways.

The golden cases fix a few answers; here fresh tiny models of random shapes are built and saved by
transformers, read by nano_moca and compared; and transformers reads what nano_moca saves.
"""

import json
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import nano_moca
from nano_moca import MARK, Moca, Record
from nano_moca.convert import export
from nano_moca.convert.export import save_model
from nano_moca.distributed import World
from nano_moca.families import load_config
from nano_moca.processor import Processor, smart_resize

transformers = pytest.importorskip("transformers")
close = partial(torch.testing.assert_close, rtol=0)
KINDS = {"qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL"}


try:  # the image processing that works with PIL, whatever this transformers calls it
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as image_processing

    ReferenceImageProcessor = image_processing.Qwen2VLImageProcessorPil
except ImportError:
    from transformers.models.qwen2_vl import image_processing_qwen2_vl as image_processing

    ReferenceImageProcessor = image_processing.Qwen2VLImageProcessor


def reference_image_processor(**limits: int):
    """Qwen2-VL's, with CLIP's mean and deviation."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return ReferenceImageProcessor(image_mean=mean, image_std=std, **limits)


def reference_model(family: str, dice: random.Random, tied: bool) -> nn.Module:
    """A model of random shape and weights, the weights large enough for every part to count."""
    head_width, kv_heads = dice.choice([16, 24, 32]), dice.choice([1, 2])
    heads = kv_heads * dice.choice([1, 2, 3])
    side = 3 * head_width // 16
    vision_heads, width = dice.choice([1, 2, 3]), heads * head_width
    text = dict(
        vocab_size=704, hidden_size=width, intermediate_size=dice.choice([40, 100]),
        num_hidden_layers=dice.choice([1, 2, 3]), num_attention_heads=heads,
        num_key_value_heads=kv_heads, rope_theta=dice.choice([1e4, 1e6]), rms_norm_eps=1e-6,
        rope_scaling={"type": "mrope", "mrope_section": [head_width // 2 - 2 * side, side, side]},
        tie_word_embeddings=tied, image_token_id=612, video_token_id=613,
        vision_start_token_id=609, vision_end_token_id=610, bos_token_id=600, eos_token_id=602,
    )
    depth, vision_width = dice.choice([1, 2, 3]), vision_heads * dice.choice([16, 20])
    vision = dict(depth=depth, num_heads=vision_heads)
    if family == "qwen2_5_vl":
        full = sorted(dice.sample(range(depth), dice.randint(0, depth)))
        vision |= dict(hidden_size=vision_width, out_hidden_size=width, intermediate_size=52,
                       window_size=dice.choice([56, 112]), fullatt_block_indexes=full)
    else:
        vision |= dict(embed_dim=vision_width, hidden_size=width, mlp_ratio=dice.choice([2, 4]))
    config = getattr(transformers, KINDS[family] + "Config")(**text, vision_config=vision)
    config._attn_implementation = "eager"
    model = getattr(transformers, KINDS[family] + "ForConditionalGeneration")(config).eval().float()
    torch.manual_seed(dice.randint(0, 10**6))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.dim() > 1:
                noise *= 1.0 if "embed_tokens" in name else 1.6 / weight[0].numel() ** 0.5
                weight.copy_(noise)
            else:
                scale = ("norm" in name or "ln_q" in name) and name.endswith("weight")
                weight.copy_(scale + 0.2 * noise)
    model.tie_weights()
    return model


def random_picture(dice: random.Random) -> Image.Image:
    """Waves and noise, of any shape."""
    width, height = (int(2 ** dice.uniform(3, 8.3)) for _ in range(2))
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / dice.uniform(3, 30) + y / dice.uniform(3, 30)) for _ in range(3)]
    noise = np.random.default_rng(dice.randint(0, 10**6)).normal(0, 20, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) * 90 + 127 + noise).clip(0, 255).astype(np.uint8))


def random_record(dice: random.Random, images: int) -> Record:
    """Words and pictures in any order, pictures side by side or not."""
    words = [" a word", "\n", "caf\u00e9 ", "<|im_end|>", "123"]
    parts = [MARK] * images + dice.choices(words, k=4)
    dice.shuffle(parts)
    return Record("".join(parts), [random_picture(dice) for _ in range(images)])


@torch.no_grad()
def reference_outputs(model: nn.Module, processor, tokenizer: Tokenizer, record: Record
                      ) -> dict[str, Tensor]:
    """What transformers computes on one record: image tokens, hidden states both ways, logits."""
    body, text, out = model.model, record.text, {}
    features = None
    if record.images:
        pixels = processor(images=record.images, return_tensors="pt")
        out["patches"], out["grids"] = pixels["pixel_values"].float(), pixels["image_grid_thw"]
        for grid in out["grids"].tolist():
            text = text.replace("<|image_pad|>", "<|x|>" * (np.prod(grid) // 4), 1)
        features = body.visual(out["patches"], grid_thw=out["grids"])
        out["vision"] = features = getattr(features, "pooler_output", features)
    ids = torch.tensor(tokenizer.encode(text.replace("<|x|>", "<|image_pad|>")).ids)[None]
    is_image = ids == model.config.image_token_id
    extra = {}
    if "mm_token_type_ids" in body.get_rope_index.__code__.co_varnames:
        extra["mm_token_type_ids"] = is_image.int()
    positions, _ = body.get_rope_index(input_ids=ids, image_grid_thw=out.get("grids"),
                                       attention_mask=torch.ones_like(ids), **extra)
    out |= dict(tokens=ids[0], positions=positions[:, 0].long())
    embeddings = model.get_input_embeddings()(ids)
    if features is not None:
        embeddings = embeddings.masked_scatter(is_image[..., None], features)
    decoder, length = body.language_model, ids.shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    rotary = decoder.rotary_emb(embeddings, positions)
    for name, mask in (("causal", causal), ("bidirectional", torch.zeros_like(causal))):
        hidden = embeddings
        for layer in decoder.layers:
            result = layer(hidden, attention_mask=mask, position_ids=positions,
                           position_embeddings=rotary)
            hidden = result[0] if isinstance(result, tuple) else result
        out[name] = decoder.norm(hidden)[0]
    out["logits"] = model(input_ids=ids, pixel_values=out.get("patches"), position_ids=positions,
                          image_grid_thw=out.get("grids"), **extra).logits[0]
    return out


def save_reference(model: nn.Module, folder: Path, golden: Path) -> Path:
    """A checkpoint folder as transformers writes it, with the golden cases' tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(golden / "qwen2.5-vl" / name, folder)
    return folder


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_random_models(family: str, seed: int, golden: Path, tmp_path: Path) -> None:
    """A fresh model of random shape computes the same in both, on text and several pictures."""
    dice = random.Random(seed)
    model = reference_model(family, dice, tied=seed % 2 == 0)
    moca = nano_moca.load(save_reference(model, tmp_path / "model", golden), "cpu")
    limits = dict(min_pixels=moca.processor.min_pixels, max_pixels=moca.processor.max_pixels)
    processor = reference_image_processor(**limits)
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for images in (0, 1, 3):
        record = random_record(dice, images)
        expected = reference_outputs(model, processor, tokenizer, record)
        batch = moca.processor.batch([record])
        assert torch.equal(batch.tokens, expected["tokens"])
        assert torch.equal(batch.positions, expected["positions"])
        if images:
            assert torch.equal(batch.grids, expected["grids"])
            close(batch.patches, expected["patches"], atol=1e-6)
            close(moca.model.visual(batch.patches, batch.layout), expected["vision"], atol=1e-3)
        for name in ("causal", "bidirectional"):
            close(moca.model(batch, causal=name == "causal"), expected[name], atol=1e-3)
        close(moca.model(batch, causal=True) @ moca.model.head.T, expected["logits"], atol=1e-3)


@pytest.mark.parametrize("shard_size", ["5GB", 100_000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_transformers_reads_what_we_save(family: str, tied: bool, shard_size: str | int,
                                         golden: Path, tmp_path: Path, monkeypatch) -> None:
    """A saved model loads with no key missing, unexpected or misshapen: the same logits."""
    monkeypatch.setattr(export, "SHARD_SIZE", shard_size)
    dice = random.Random(7)
    model = reference_model(family, dice, tied)
    moca = nano_moca.load(save_reference(model, tmp_path / "theirs", golden), "cpu")
    for parameter in moca.model.parameters():  # another model than the one that was read
        parameter.mul_(1.01)
    save_model(tmp_path / "ours", World(0, 1, torch.device("cpu"), torch.float32), moca.model,
               moca.processor)
    kind = type(model)
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True,
                                       attn_implementation="eager")
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard_size != "5GB")
    record = random_record(dice, 2)
    limits = dict(min_pixels=moca.processor.min_pixels, max_pixels=moca.processor.max_pixels)
    tokenizer = Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
    expected = reference_outputs(again, reference_image_processor(**limits), tokenizer, record)
    hidden = moca.model(moca.processor.batch([record]), causal=True)
    close(hidden @ moca.model.head.T, expected["logits"], atol=1e-3)


def test_random_pictures(golden: Path) -> None:
    """Pixels to 1e-6 and equal grids on many random sizes, modes and limits."""
    config, dice = load_config(golden / "qwen2.5-vl"), random.Random(0)
    for _ in range(60):
        low = 28 * 28 * dice.choice([1, 4, 16])
        limits = dict(min_pixels=low, max_pixels=low * dice.choice([4, 10, 40]))
        processor = Processor.load(golden / "qwen2.5-vl", config, **limits)
        image = random_picture(dice).convert(dice.choice(["RGB", "RGBA", "L", "P", "CMYK", "1"]))
        expected = reference_image_processor(**limits)(images=[image], return_tensors="pt")
        batch = processor.batch([Record(MARK, [image])])
        assert torch.equal(batch.grids, expected["image_grid_thw"])
        close(batch.patches, expected["pixel_values"].float(), atol=1e-6)


def test_smart_resize() -> None:
    """The resized size is the reference's for thousands of sizes and limits."""
    dice = random.Random(0)
    for _ in range(5000):
        height, width = (int(2 ** dice.uniform(0, 12)) for _ in range(2))
        low = 28 * 28 * dice.randint(1, 300)
        arguments = (height, width, 28, low, low * dice.randint(4, 30))
        try:
            expected = image_processing.smart_resize(*arguments)
        except ValueError:
            with pytest.raises(ValueError):
                smart_resize(*arguments)
        else:
            assert smart_resize(*arguments) == expected


def test_special_tokens_in_text(moca: Moca, golden: Path) -> None:
    """Special tokens in a text are one token each, as tokenizers and transformers read them."""
    path = str(golden / "qwen2.5-vl" / "tokenizer.json")
    theirs = Tokenizer.from_file(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    stray = ("<|image_pad|>", "<|video_pad|>")  # refused without an image
    special = [token.content for token in theirs.get_added_tokens_decoder().values()
               if token.content not in stray]
    dice = random.Random(0)
    for _ in range(50):
        words = [" a", "b ", "\n\n", "  ", "caf\u00e9", "cafe\u0301", "\u4f60\u597d", "<|", "|>",
                 "<|im_start", "\U0001f98a", "don't", "12345", "\t"]
        text = "x" + "".join(dice.choices(words + special, k=12))
        ids = moca.processor.batch([Record(text)]).tokens.tolist()
        assert ids == theirs.encode(text).ids == fast(text)["input_ids"]
    for name in special:
        ids = moca.processor.batch([Record(f"a{name}b")]).tokens.tolist()
        assert ids == [*theirs.encode("a").ids, theirs.token_to_id(name), *theirs.encode("b").ids]


@pytest.mark.repository
def test_golden_can_be_made_again(golden: Path, tmp_path: Path) -> None:
    """make_golden.py makes every file of golden/, each with the tensors that it has there. (Their
    values depend on the versions of Python, Pillow and torch: see there.)"""
    import make_golden

    make_golden.make(tmp_path)
    files = sorted(path.relative_to(golden) for path in golden.rglob("*") if path.is_file())
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert made == files
    for path in files:
        ours, theirs = tmp_path / path, golden / path
        if path.suffix == ".safetensors":
            assert load_file(ours).keys() == load_file(theirs).keys(), path
        if path.name == "config.json":
            versions = {"transformers_version": ""}
            contents = [json.loads(file.read_text()) | versions for file in (ours, theirs)]
            assert contents[0] == contents[1], path
