"""Make golden/ again: tiny Qwen-VL checkpoints, and what transformers computes on them.

    pip install transformers==5.17.0
    python tests/make_golden.py                    writes tests/golden
    python tests/make_golden.py --output FOLDER    writes FOLDER, and compares it with
                                                   tests/golden

The tests compare nano_moca with an implementation that shares no code with it. This
file is the only one that runs that implementation to write something down; it imports
nothing of the package, and the package nothing of it. The models have the exact
architecture of Qwen2.5-VL and Qwen2-VL at a width of 64, and random weights, large
enough that attention, windows and rotary positions show in the result.

    images/, records.jsonl      eight records with eight pictures of awkward shapes and
                                modes
    qwen2.5-vl/                 tied head; config.json as transformers 5 writes it
    qwen2.5-vl-untied/          a head of its own; config.json as transformers 4.50
                                writes it, and as the hub's checkpoints have it
    qwen2-vl/                   the older family: LayerNorm, quick-GELU, no windows

inputs.golden.safetensors holds of each record i, alone and without padding,

    {i}.input_ids      [L] int64      image marks expanded
    {i}.positions      [3, L] int64   M-RoPE positions: frame, row, column
    {i}.pixel_values   [P, 1176]      normalised patches; absent without images
    {i}.grid           [I, 3] int64   frames, rows and columns of patches per image

and <checkpoint>.golden.safetensors what that model makes of it:

    {i}.vision         [J, D]         image tokens; absent without images
    {i}.layers         [4, L, D]      input of every decoder layer, bidirectional
    {i}.bidirectional  [L, D]         hidden states after the final norm
    {i}.causal         [L, D]         the same with causal attention
    {i}.logits         [L, V]         of the next token, causal
    {i}.mean, {i}.last [D]            unit vectors: mean of bidirectional, last of causal
    {i}.greedy         [8] int64      the next eight tokens, greedily

All is float32, on the CPU, with eager attention. Under Python 3.11, torch 2.13, Pillow
13 and transformers 5.17 every picture, tokenizer, weight and input comes out with the
same bytes. What the models compute differs by rounding from one CPU to another: by a
few millionths of the largest value.

Left out: the newer key layout in two shards, which conftest.py makes from qwen2.5-vl.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
    trainers,
)
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil as ImageProcessor,
)

GOLDEN = Path(__file__).resolve().parent / "golden"
CHECKPOINTS = ("qwen2.5-vl", "qwen2.5-vl-untied", "qwen2-vl")
INPUTS = ("input_ids", "positions", "pixel_values", "grid")  # do not depend on a model
PAD = "<|image_pad|>"
MARK = f"<|vision_start|>{PAD}<|vision_end|>"

# Qwen's special tokens in their order, and how its tokenizer cuts a text into words
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
    "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", PAD,
    "<|video_pad|>",
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEARNT = 600  # tokens; with the special ones 614
VOCABULARY = 704  # rows of the embedding: padded, as Qwen's are

# pixels: 4 to 40 merged groups per image, and CLIP's mean and standard deviation
IMAGE_SETTINGS = {
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 40,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PICTURES = (  # width, height, mode, kind of file
    (84, 84, "RGB", "png"),
    (200, 61, "RGBA", "png"),
    (61, 230, "L", "png"),
    (30, 40, "RGB", "jpg"),
    (301, 299, "P", "png"),
    (28, 28, "LA", "png"),
    (512, 40, "RGB", "png"),
    (140, 224, "CMYK", "jpg"),
)


# --- the records ----------------------------------------------------------------------


def draw_pictures(folder: Path) -> list[str]:
    """Waves, noise and a disc in each of PICTURES; their paths as a record has them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = []
    for number, (width, height, mode, suffix) in enumerate(PICTURES):
        # each channel waves at its own pace, so that a mix-up of channels shows
        y, x = np.mgrid[0:height, 0:width]
        waves = []
        for _ in range(3):
            phase = x / random.uniform(3, 30) + y / random.uniform(3, 30)
            waves.append(np.sin(phase))
        noise = random.normal(0, 12, (height, width, 3))
        pixels = np.stack(waves, -1) * 100 + 127 + noise

        # the disc stands on the left and above, so that a mirrored image shows
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        disc = [2, 2, width // 2, height // 2]
        ImageDraw.Draw(picture).ellipse(disc, fill=(240, 20, 60))

        name = f"{number}-{mode.lower()}-{width}x{height}.{suffix}"
        picture.convert(mode).save(folder / name)
        paths.append(f"{folder.name}/{name}")
    return paths


def make_records(paths: list[str]) -> list[dict]:
    """Text alone, images alone, one and several, special tokens, odd characters."""
    accents = "Caf\u00e9 cafe\u0301 \u4f60\u597d 12345 \U0001f98a"
    chat = f"<|im_start|>user\n{MARK}What is this?<|im_end|>\n<|im_start|>assistant\n"
    several = f"Before {MARK} between {MARK}{MARK} after."
    return [
        {"text": "The quick brown fox.", "images": []},
        {"text": f"{MARK}Represent the given document image.", "images": paths[:1]},
        {"text": MARK, "images": paths[1:2]},
        {"text": several, "images": paths[2:5]},
        {"text": f"{accents}\n\n  spaces   and\ttabs 'tis it's", "images": []},
        {"text": chat, "images": paths[5:6]},
        {"text": f"{MARK}a{MARK}b", "images": paths[6:8]},
        {"text": "a", "images": []},
    ]


# --- the checkpoints ------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE with Qwen's normaliser, words and special tokens.

    It is learnt from Python's documentation: a text that every machine has, but the
    same one only under the same version of Python.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNT, initial_alphabet=alphabet, show_progress=False)
    texts = [topics[name] for name in sorted(topics)[:20]]
    tokenizer.train_from_iterator(texts, trainer)

    # special tokens come last, and are found in a text before it is cut into words
    for token in SPECIAL:
        added = AddedToken(token, special=True, normalized=False)
        tokenizer.add_special_tokens([added])
    return tokenizer


def make_model(name: str, tokenizer: Tokenizer, seed: int) -> nn.Module:
    """A tiny model of one of the two families, with weights that make every part
    count."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    decoder = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=112,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, rope_theta=10000.0,
        max_position_embeddings=4096, rms_norm_eps=1e-6, use_cache=True,
        tie_word_embeddings=name != "qwen2.5-vl-untied",
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        image_token_id=ids[PAD], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )

    # a trap: hidden_size is the decoder's width in Qwen2-VL, and the tower's in 2.5
    vision = dict(
        num_heads=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2)
    if name == "qwen2-vl":
        vision |= dict(depth=3, embed_dim=48, hidden_size=64, mlp_ratio=2)
        config = transformers.Qwen2VLConfig(**decoder, vision_config=vision)
        kind = transformers.Qwen2VLForConditionalGeneration
    else:
        vision |= dict(
            depth=4, hidden_size=48, out_hidden_size=64, intermediate_size=76,
            window_size=56, fullatt_block_indexes=[1, 3])
        config = transformers.Qwen2_5_VLConfig(**decoder, vision_config=vision)
        kind = transformers.Qwen2_5_VLForConditionalGeneration

    # the golden weights are what follows this seed and transformers' own draws
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = kind(config).eval().float()
    for key, weight in model.named_parameters():
        weight.detach().copy_(random_weight(key, weight))
    model.tie_weights()
    return model


def random_weight(key: str, weight: Tensor) -> Tensor:
    """Values for a parameter: larger than a fresh model's, in which every layer is
    nearly the identity and a fault in it hardly shows."""
    noise = torch.randn_like(weight)
    if "embed_tokens" in key:
        return noise
    if weight.dim() > 1:
        inputs = weight[0].numel()
        return noise * (1.6 / inputs**0.5)

    # vectors: scales and shifts of norms, and biases
    if "norm" in key or "ln_q" in key:
        scale = 1.0 if key.endswith("weight") else 0.0
        return scale + 0.2 * noise
    return 0.3 * noise


def save_checkpoint(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """A checkpoint folder as it would lie on the hub."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # nobody reads it
    tokenizer.save(str(folder / "tokenizer.json"))

    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    kind = {"image_processor_type": "Qwen2VLImageProcessor"}
    text = json.dumps(IMAGE_SETTINGS | sizes | kind, indent=2)
    (folder / "preprocessor_config.json").write_text(text)


def flatten_config(folder: Path) -> None:
    """Rewrite config.json as transformers 4.50.3 writes it of the same model: with the
    decoder's part at the top, and older names. (Its very bytes: compared once.)"""
    path = folder / "config.json"
    nested = json.loads(path.read_text())
    flat = nested | nested["text_config"]
    vision = dict(nested["vision_config"])

    # what the newer version says beyond the older one
    for key in ("text_config", "layer_types", "pad_token_id"):
        del flat[key]
    for key in ("rope_parameters", "initializer_range"):
        del vision[key]

    # what it says otherwise; sliding_window is not used, and stands at its default
    rope = flat.pop("rope_parameters")
    flat["rope_theta"] = rope["rope_theta"]
    kind = {"type": "default", "rope_type": "default"}
    flat["rope_scaling"] = kind | {"mrope_section": rope["mrope_section"]}
    flat["sliding_window"] = 4096
    flat["torch_dtype"] = flat.pop("dtype")
    flat["model_type"] = vision["model_type"] = nested["model_type"]
    flat["transformers_version"] = "4.50.3"
    flat["vision_config"] = vision
    path.write_text(json.dumps(flat, indent=2, sort_keys=True) + "\n")


# --- what transformers computes -------------------------------------------------------


@torch.no_grad()
def reference(
    model: nn.Module, tokenizer: Tokenizer, record: dict, root: Path,
) -> dict[str, Tensor]:
    """All that golden/ holds of one record: {name: tensor}, inputs and outputs."""
    body = model.model  # without the output head
    out: dict[str, Tensor] = {}

    # each image mark's pad is repeated once per merged group of its image
    pieces = record["text"].split(PAD)
    text = pieces[0]
    if record["images"]:
        images = [Image.open(root / path) for path in record["images"]]
        pixels = ImageProcessor(**IMAGE_SETTINGS)(images=images, return_tensors="pt")
        out["pixel_values"] = pixels["pixel_values"].float()  # [P, 1176]
        out["grid"] = pixels["image_grid_thw"]  # [I, 3]
        groups = (out["grid"].prod(1) // 4).tolist()
        for count, piece in zip(groups, pieces[1:], strict=True):
            text += PAD * count + piece

    ids = torch.tensor(tokenizer.encode(text).ids)[None]  # [1, L]
    is_image = ids == model.config.image_token_id
    positions, _ = body.get_rope_index(
        ids, is_image.int(), image_grid_thw=out.get("grid"),
        attention_mask=torch.ones_like(ids))  # [3, 1, L]
    out["input_ids"] = ids[0]
    out["positions"] = positions[:, 0].long()

    # the vision tower's output replaces the embeddings of the image tokens
    x = model.get_input_embeddings()(ids)  # [1, L, D]
    if record["images"]:
        features = body.visual(out["pixel_values"], grid_thw=out["grid"])
        out["vision"] = features.pooler_output  # [J, D]
        x = x.masked_scatter(is_image[..., None].expand_as(x), out["vision"])

    # the decoder's layers, one by one, in both directions
    hidden, layers = run_decoder(body.language_model, x, positions, causal=False)
    out["bidirectional"] = hidden[0]
    out["layers"] = torch.cat(layers)  # [4, L, D]
    hidden, _ = run_decoder(body.language_model, x, positions, causal=True)
    out["causal"] = hidden[0]

    # our way through the layers has to be transformers' own where it has one
    answer = model(
        input_ids=ids, pixel_values=out.get("pixel_values"),
        image_grid_thw=out.get("grid"), position_ids=positions)
    out["logits"] = answer.logits[0].float()
    logits = model.lm_head(out["causal"])
    torch.testing.assert_close(logits, out["logits"], atol=2e-3, rtol=1e-3)

    out["mean"] = F.normalize(out["bidirectional"].mean(0), dim=-1)
    out["last"] = F.normalize(out["causal"][-1], dim=-1)
    out["greedy"] = greedy(model, x, positions, steps=8)
    return {name: tensor.contiguous() for name, tensor in out.items()}


def run_decoder(
    decoder: nn.Module, x: Tensor, positions: Tensor, causal: bool,
) -> tuple[Tensor, list[Tensor]]:
    """transformers' decoder layers under a mask of our choice: x [1, L, D] -> hidden
    states [1, L, D], and the input of every layer.

    transformers itself runs this decoder causally only. Its eager attention adds the
    mask as it is given.
    """
    L = x.shape[1]
    mask = torch.zeros(1, 1, L, L)
    if causal:
        forbidding = torch.finfo(torch.float32).min
        mask = torch.full_like(mask, forbidding).triu(1)

    rotary = decoder.rotary_emb(x, positions)
    layers = []
    for layer in decoder.layers:
        layers.append(x)
        x = layer(
            x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return decoder.norm(x), layers


def greedy(model: nn.Module, x: Tensor, positions: Tensor, steps: int) -> Tensor:
    """The likeliest next token, `steps` times, without a cache: [steps] int64."""
    tokens = []
    for _ in range(steps):
        hidden, _ = run_decoder(model.model.language_model, x, positions, causal=True)
        token = model.lm_head(hidden[:, -1]).argmax(-1)  # [1]
        tokens.append(token)

        # all three axes go on from the largest position so far
        embedding = model.get_input_embeddings()(token)
        x = torch.cat([x, embedding[None]], 1)
        following = positions.max() + 1
        positions = torch.cat([positions, following.expand(3, 1, 1)], -1)
    return torch.cat(tokens)


# --- all of it ------------------------------------------------------------------------


def make(root: Path) -> None:
    """Write everything into `root`."""
    records = make_records(draw_pictures(root / "images"))
    lines = [json.dumps(record) + "\n" for record in records]
    (root / "records.jsonl").write_text("".join(lines))

    tokenizer = make_tokenizer()
    metadata = {"transformers": transformers.__version__}
    inputs: dict[str, Tensor] = {}
    for seed, name in enumerate(CHECKPOINTS):
        model = make_model(name, tokenizer, seed)
        save_checkpoint(root / name, model, tokenizer)
        if name == "qwen2.5-vl-untied":
            flatten_config(root / name)

        # inputs are the same for each model, so they are stored once
        outputs: dict[str, Tensor] = {}
        for number, record in enumerate(records):
            for key, tensor in reference(model, tokenizer, record, root).items():
                kept = inputs if key in INPUTS else outputs
                kept[f"{number}.{key}"] = tensor
        save_file(outputs, root / f"{name}.golden.safetensors", metadata=metadata)
        print(f"{name}: {len(outputs)} tensors", flush=True)
    save_file(inputs, root / "inputs.golden.safetensors", metadata=metadata)


def compare(root: Path) -> None:
    """Print of each file in `root` how far it is from the one in golden/."""
    ours = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    theirs = {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*") if path.is_file()}
    for path in sorted(ours ^ theirs):
        print(f"{path}: only in {root if path in ours else GOLDEN}")

    for path in sorted(ours & theirs):
        said = "equal bytes"
        if (root / path).read_bytes() != (GOLDEN / path).read_bytes():
            said = "other bytes"
            if path.suffix == ".safetensors":
                said = difference(load_file(root / path), load_file(GOLDEN / path))
        print(f"{path}: {said}")


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """How far two files of tensors are apart, in words."""
    if ours.keys() != theirs.keys():
        return "other tensors"

    # logits are hundreds of times larger than embeddings: also as a share of the largest
    absolute = {}
    share = {}
    for name, tensor in theirs.items():
        if ours[name].shape != tensor.shape:
            return f"another shape of {name}"
        expected = tensor.double()
        error = (ours[name].double() - expected).abs().max().item()
        absolute[name] = error
        share[name] = error / max(expected.abs().max().item(), 1e-30)

    worst = max(absolute, key=absolute.get)
    return (
        f"values to {absolute[worst]:.1e} ({worst}), and to {max(share.values()):.1e} of "
        "a tensor's largest")


def main() -> None:
    """The command line: see the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=GOLDEN)
    root = parser.parse_args().output
    root.mkdir(parents=True, exist_ok=True)

    # one thread: sums are then in one order, whatever the machine's number of cores
    torch.set_num_threads(1)
    make(root)
    if root.resolve() != GOLDEN:
        compare(root)


if __name__ == "__main__":
    main()
