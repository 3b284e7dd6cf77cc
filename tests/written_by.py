"""Checkpoints as one version of transformers or another writes them, read by nano_moca.

Two commands. The first runs in an environment that has some version of transformers, and
writes tiny random models of every family that it knows, each with processor files as that
version saves them, and with what that version computes on a text and on a picture:

    python tests/written_by.py write FOLDER [--sentence-transformers]

The second reads them all, and prints a table to paste into LOG.md:

    python tests/written_by.py read FOLDER

FOLDER/<version>/<family> holds the model with its head, <family>-base the one without, as
AutoModel and sentence-transformers save it.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
MARK = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = {"text": "two red boats and a tree\n", "image": f"so {MARK}a picture of noise"}
KINDS = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
# config of the decoder and of the tower, where they differ from the class's own defaults
DECODER = {
    "vocab_size": 704, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 4096, "bos_token_id": 600, "eos_token_id": 602,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
TOKENS = {"image_token_id": 612, "video_token_id": 613, "vision_start_token_id": 609,
          "vision_end_token_id": 610}
TOWERS = {
    "qwen2_vl": {"depth": 3, "embed_dim": 48, "hidden_size": 64, "num_heads": 3},
    "qwen2_5_vl": {"depth": 4, "hidden_size": 48, "intermediate_size": 76, "num_heads": 3,
                   "out_hidden_size": 64, "fullatt_block_indexes": [1, 3]},
    "qwen3_vl": {"depth": 4, "hidden_size": 48, "intermediate_size": 76, "num_heads": 3,
                 "out_hidden_size": 64, "num_position_embeddings": 64,
                 "deepstack_visual_indexes": [0, 1, 2]}}


def make_config(family: str):
    """The family's config class, filled as a script of its time would fill it."""
    import transformers

    kind = getattr(transformers, KINDS[family] + "Config")
    tied = family != "qwen2_5_vl"
    if family != "qwen3_vl":
        return kind(**DECODER, **TOKENS, tie_word_embeddings=tied, vision_config=TOWERS[family])
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    if transformers.__version__ >= "5":
        text = DECODER | {"head_dim": 16, "rope_parameters": rope | {"rope_theta": 1e4}}
        del text["rope_scaling"], text["rope_theta"]
    else:
        text = DECODER | {"head_dim": 16, "rope_scaling": rope, "tie_word_embeddings": tied}
    return kind(text_config=text, vision_config=TOWERS[family], **TOKENS,
                tie_word_embeddings=tied)


def make_processor(family: str):
    """Tokenizer and image processor, as that version puts them together."""
    import transformers
    from transformers.models.qwen2_vl import image_processing_qwen2_vl as image_processing

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tests" / "golden" / "qwen2.5-vl" / "tokenizer.json"),
        eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if hasattr(transformers, "Qwen2TokenizerFast"):
        tokenizer = transformers.Qwen2TokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>",
            pad_token="<|endoftext|>")
    limits = {"min_pixels": 4096, "max_pixels": 40960}
    if transformers.__version__ >= "4.57":
        limits = {"size": {"shortest_edge": 4096, "longest_edge": 40960}}
    if family == "qwen3_vl":
        limits |= {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    parts = {"image_processor": image_processing.Qwen2VLImageProcessor(**limits),
             "tokenizer": tokenizer, "chat_template": "{{ 'as it was' }}"}
    if transformers.__version__ >= "4.52":
        name = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
        parts["video_processor"] = getattr(transformers, name)()
    return getattr(transformers, KINDS[family] + "Processor")(**parts)


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough for every part to count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.dim() > 1:
                scale = 1.0 if "embed" in name and "patch" not in name else 1.6
                weight.copy_(noise * scale / weight[0].numel() ** (0.5 * (scale > 1)))
            else:
                weight.copy_(("norm" in name and name.endswith("weight")) + 0.2 * noise)
    model.tie_weights()


@torch.no_grad()
def reference(model: torch.nn.Module, processor, picture: Image.Image) -> dict:
    """What that version computes: token ids, patches, hidden states."""
    out = {}
    for name, text in TEXTS.items():
        images = {"images": [picture]} if name == "image" else {}
        inputs = processor(text=[text], return_tensors="pt", **images)
        # before 4.49, forward places images as if they were text, and only generation does not
        if hasattr(model, "get_rope_index"):
            inputs["position_ids"], _ = model.get_rope_index(
                inputs["input_ids"], inputs.get("image_grid_thw"),
                attention_mask=inputs["attention_mask"])
        if hasattr(model.model, "language_model"):
            hidden = model.model(**inputs).last_hidden_state
        else:
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        out[f"{name}.ids"], out[f"{name}.hidden"] = inputs["input_ids"][0], hidden[0]
        if images:
            out[f"{name}.patches"] = inputs["pixel_values"]
    return {key: tensor.contiguous() for key, tensor in out.items()}


def write(folder: Path, by_sentence_transformers: bool) -> None:
    """Every family that this version knows."""
    declare_operators()
    import transformers

    version, families = f"transformers-{transformers.__version__}", list(KINDS)
    if by_sentence_transformers:
        import sentence_transformers

        begin = folder / version
        version = f"sentence-transformers-{sentence_transformers.__version__}"
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (96 * 7, 112 * 8, 3), dtype=np.uint8))
    for family in families:
        if not hasattr(transformers, KINDS[family] + "Config"):
            continue
        side = 32 if family == "qwen3_vl" else 28  # a picture at its own size
        shown = picture.crop((0, 0, 4 * side, 3 * side))
        target = folder / version / family
        shutil.rmtree(target, ignore_errors=True)
        if by_sentence_transformers:
            sentence_transformers.SentenceTransformer(str(begin / family)).save(str(target))
            shutil.copy(begin / family / "reference.bin", target)
            shutil.copy(begin / family / "picture.png", target)
            continue
        config = make_config(family)
        config._attn_implementation = "eager"
        model = getattr(transformers, KINDS[family] + "ForConditionalGeneration")(config)
        model = model.eval().float()
        randomise(model)
        processor = make_processor(family)
        results = reference(model, processor, shown)
        heads = {family: model}
        if transformers.__version__ >= "4.52":
            heads[f"{family}-base"] = model.model
        for name, part in heads.items():
            part.save_pretrained(target.with_name(name))
            processor.save_pretrained(target.with_name(name))
            save_file(results, target.with_name(name) / "reference.bin")
            shown.save(target.with_name(name) / "picture.png")


def declare_operators() -> None:
    """Two operators of torchvision that its build for another torch would miss."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401


@torch.no_grad()
def read(folder: Path) -> None:
    """A line a checkpoint: does it load, and how far are we from what its writer computed."""
    sys.path.insert(0, str(ROOT))
    import nano_moca

    print("| written by | model | text | image | config.json | beside |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path in sorted(folder.glob("*/*")):
        expected = load_file(path / "reference.bin")
        raw = json.loads((path / "config.json").read_text())
        form = "nested" if "text_config" in raw else "flat"
        beside = ("processor_config.json", "preprocessor_config.json")
        found = [name.split("_")[0] for name in beside if (path / name).is_file()]
        cells = []
        try:
            moca = nano_moca.load(path, "cpu", attention="causal")
            for name, text in TEXTS.items():
                images = [path / "picture.png"] if name == "image" else []
                batch = moca.processor.batch([nano_moca.Record(text, images)])
                assert torch.equal(batch.tokens, expected[f"{name}.ids"]), "other token ids"
                if images:
                    off = (batch.patches - expected[f"{name}.patches"]).abs().max().item()
                    assert off < 1e-5, f"patches differ by {off:.0e}"
                hidden = moca.model(batch, causal=True)
                off = (hidden - expected[f"{name}.hidden"]).abs().max().item()
                cells.append(f"{off:.0e}")
        except Exception as error:
            cells = [f"{type(error).__name__}: {str(error).splitlines()[0][-160:]}", ""]
        print(f"| {path.parent.name} | {path.name} | {' | '.join(cells)} | {form} | "
              f"{', '.join(found)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentence-transformers", action="store_true")
    flags = parser.parse_args()
    if flags.what == "write":
        write(flags.folder, flags.sentence_transformers)
    else:
        read(flags.folder)
