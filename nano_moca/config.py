"""The shape of a model, read from a Qwen `config.json`.

Two families are known: Qwen2-VL and Qwen2.5-VL. Their decoders are the same; their vision towers differ in norm,
MLP and windows. A `config.json` comes in two forms: flat (the hub's checkpoints, transformers up to 4.51) and with
a nested `text_config` (4.52 and later). Both are read into the two small dataclasses below, and whatever this code
does not implement (sliding windows, other activations) is refused instead of ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


class MocaError(Exception):
    """Something that the user can mend: its message is one line that names the file and the mend."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (ViT). `windows` says that some blocks attend within windows only (Qwen2.5-VL)."""

    depth: int
    width: int
    heads: int
    mlp_width: int
    out_width: int  # the decoder's width
    act: str  # "silu": SwiGLU with RMSNorm (Qwen2.5-VL); "quick_gelu": plain MLP with LayerNorm (Qwen2-VL)
    window: int = 0  # side of an attention window in pixels, 0 for none
    full_blocks: tuple[int, ...] = ()  # blocks that attend over the whole image although there are windows
    patch: int = 14  # side of a patch in pixels
    frames: int = 2  # an image is repeated into this many frames
    merge: int = 2  # merge x merge patches become one token of the decoder

    @property
    def patch_values(self) -> int:
        """Values in one patch: channels x frames x patch x patch (1176)."""
        return 3 * self.frames * self.patch * self.patch

    @property
    def group_values(self) -> int:
        """Values in one merged group of patches, which is what one image token stands for (4704)."""
        return self.merge**2 * self.patch_values


@dataclass(frozen=True)
class Config:
    """The decoder's shape, the vision tower's, and the `config.json` they were read from."""

    family: str  # "qwen2_5_vl" or "qwen2_vl"
    vocabulary: int  # rows of the embedding; the tokenizer's ids may end earlier (padded rows)
    width: int
    layers: int
    heads: int
    key_heads: int  # grouped-query attention: heads // key_heads queries share one key and value
    mlp_width: int
    rope_theta: float
    rope_sections: tuple[int, int, int]  # frequencies that turn with frame, row, column
    norm_eps: float
    tied: bool  # the output head is the embedding
    vision: VisionConfig
    raw: dict  # the file's content, from which a saved model's config.json is made

    @property
    def stored_vocabulary(self) -> int:
        """Rows in the checkpoint's files: fewer than `vocabulary` when it grew for a mask token."""
        return self.raw.get("text_config", self.raw).get("vocab_size", self.vocabulary)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def read_json(path: Path) -> dict:
    """One JSON object from a file; MocaError if it is absent, malformed or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MocaError(f"{path} does not exist: give the folder of a Qwen2-VL or Qwen2.5-VL checkpoint") from None
    except (OSError, ValueError) as error:
        raise MocaError(f"{path} cannot be read as JSON ({error}): copy the file again") from None
    if not isinstance(content, dict):
        raise MocaError(f"{path} holds no JSON object: copy the file again")
    return content


def load_config(folder: Path) -> Config:
    """Read `folder/config.json`; MocaError names what is missing or not supported."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """Turn the content of a `config.json`, flat or nested, into a `Config`. `where` is named in errors."""
    family = raw.get("model_type")
    if family not in ("qwen2_5_vl", "qwen2_vl"):
        raise MocaError(f"{where}: model_type is {family!r}; qwen2_5_vl and qwen2_vl are supported")
    text = {**raw, **raw.get("text_config", {})}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if text.get("use_sliding_window"):
        raise MocaError(f"{where}: use_sliding_window is on; only full attention is supported")
    if text.get("hidden_act", "silu") != "silu":
        raise MocaError(f"{where}: hidden_act is {text['hidden_act']!r}; the decoder's must be 'silu'")
    try:
        vision = _vision(raw["vision_config"], family, text["hidden_size"])
        config = Config(
            family=family,
            vocabulary=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            key_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            mlp_width=text["intermediate_size"],
            rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
            rope_sections=tuple(rope["mrope_section"]),
            norm_eps=text.get("rms_norm_eps", 1e-6),
            # nested files say it at the top, where transformers reads it; the text part is a fallback
            tied=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision=vision,
            raw=raw,
        )
    except KeyError as error:
        raise MocaError(f"{where}: the field {error} is missing: copy the file again") from None
    _check(config, where)
    return config


def _vision(raw: dict, family: str, width: int) -> VisionConfig:
    """The vision tower's part. Qwen2-VL names its widths otherwise and has no windows."""
    shared = dict(
        depth=raw["depth"], heads=raw["num_heads"], patch=raw.get("patch_size", 14),
        frames=raw.get("temporal_patch_size", 2), merge=raw.get("spatial_merge_size", 2),
    )
    if family == "qwen2_vl":
        mlp_width = int(raw["embed_dim"] * raw.get("mlp_ratio", 4))
        return VisionConfig(width=raw["embed_dim"], mlp_width=mlp_width, out_width=raw.get("hidden_size", width),
                            act=raw.get("hidden_act", "quick_gelu"), **shared)
    return VisionConfig(
        width=raw["hidden_size"], mlp_width=raw["intermediate_size"], out_width=raw["out_hidden_size"],
        act=raw.get("hidden_act", "silu"), window=raw["window_size"],
        full_blocks=tuple(raw["fullatt_block_indexes"]), **shared,
    )


def _check(config: Config, where: str) -> None:
    """Refuse shapes that the code would compute wrongly."""
    vision = config.vision
    expected = "silu" if config.family == "qwen2_5_vl" else "quick_gelu"
    wrong = {
        f"heads {config.heads} do not divide the width {config.width}": config.width % config.heads,
        f"key heads {config.key_heads} do not divide the heads {config.heads}": config.heads % config.key_heads,
        f"mrope_section {config.rope_sections} does not sum to half a head": (
            sum(config.rope_sections) != config.head_width // 2),
        f"vision heads {vision.heads} do not divide its width {vision.width}": vision.width % vision.heads,
        f"the vision tower's output {vision.out_width} is not the decoder's width {config.width}": (
            vision.out_width != config.width),
        f"the vision tower's hidden_act is {vision.act!r}, not {expected!r}": vision.act != expected,
        f"window_size {vision.window} is no multiple of a merged patch": (
            vision.window % (vision.patch * vision.merge)),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise MocaError(f"{where}: {message}")


def nano_config(vocabulary: int, special: dict[str, int]) -> Config:
    """The embedded default's model, in Qwen2.5-VL's own words: a few million parameters, for a laptop's CPU.

    vocabulary: rows of the embedding. special: the tokenizer's ids of its special tokens, by their names.
    """
    width = 160
    raw = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "hidden_size": width, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 5,
        "num_key_value_heads": 1, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "bos_token_id": special["<|endoftext|>"], "eos_token_id": special["<|im_end|>"],
        "vision_start_token_id": special["<|vision_start|>"], "vision_end_token_id": special["<|vision_end|>"],
        "image_token_id": special["<|image_pad|>"], "video_token_id": special["<|video_pad|>"],
        "vision_config": {
            "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 3, "out_hidden_size": width,
            "window_size": 56, "fullatt_block_indexes": [2], "patch_size": 14, "temporal_patch_size": 2,
            "spatial_merge_size": 2, "hidden_act": "silu",
        },
        "torch_dtype": "float32",
    }
    return parse_config(raw, "the nano preset")
