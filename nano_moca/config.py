"""The shape of a model, read from a Qwen `config.json`.

Two families are known: Qwen2-VL and Qwen2.5-VL. Their decoders are the same; their vision towers
differ in norm, MLP and windows. A `config.json` comes in two forms: flat (the hub's checkpoints,
transformers up to 4.51) and with a nested `text_config` (4.52 and later). Both are read into the
two small dataclasses below, and whatever this code does not implement (sliding windows, other
activations) is refused instead of ignored.
"""

import json
from dataclasses import dataclass
from pathlib import Path

BASE = Path(__file__).parent / "base"  # the nano base: two million parameters, for a CPU


class MocaError(Exception):
    """An error that the user can fix: one line that names the file and says what to do."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (ViT)."""

    depth: int
    width: int
    heads: int
    mlp_width: int
    out_width: int  # the decoder's width
    act: str  # "silu": RMSNorm and SwiGLU (Qwen2.5-VL); "quick_gelu": LayerNorm and MLP (Qwen2-VL)
    window: int  # side of an attention window in pixels, 0 for none
    full_blocks: tuple[int, ...]  # blocks that see the whole image although there are windows
    patch: int  # side of a patch in pixels
    frames: int  # an image is repeated into this many frames
    merge: int  # merge x merge patches become one token of the decoder

    @property
    def patch_values(self) -> int:
        """Values in one patch: channels x frames x patch x patch (1176)."""
        return 3 * self.frames * self.patch * self.patch

    @property
    def group_values(self) -> int:
        """Values in one merged group of patches, what one image token stands for (4704)."""
        return self.merge**2 * self.patch_values


@dataclass(frozen=True)
class Config:
    """The decoder's shape, the vision tower's, and the `config.json` they were read from."""

    family: str  # "qwen2_5_vl" or "qwen2_vl"
    vocabulary: int  # rows of the embedding; the tokenizer's ids may end earlier (padded rows)
    width: int
    layers: int
    heads: int
    key_heads: int  # grouped-query attention: heads // key_heads queries share a key and a value
    mlp_width: int
    rope_theta: float
    rope_sections: tuple[int, int, int]  # frequencies that turn with frame, row, column
    norm_eps: float
    tied: bool  # the output head is the embedding
    vision: VisionConfig
    raw: dict  # the file's content, from which a saved model's config.json is made

    @property
    def head_width(self) -> int:
        """Values of one attention head (d)."""
        return self.width // self.heads

    @property
    def stored_vocabulary(self) -> int:
        """Rows in the checkpoint's files: fewer than `vocabulary` when it grew for a mask token."""
        return (self.raw.get("text_config") or self.raw).get("vocab_size", self.vocabulary)


def read_json(path: Path) -> dict:
    """One JSON object from a file; MocaError if it is absent, malformed or no object."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}  # TypeError if it is no object
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MocaError(
            f"{path} cannot be read ({reason}): give the folder of a Qwen-VL checkpoint") from None


def write_json(path: Path, content: dict) -> None:
    """A JSON file a person can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_config(folder: Path) -> Config:
    """Read `folder/config.json`; MocaError names what is missing or not supported."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """The content of a `config.json`, flat or nested, as a `Config`. `where` is named in errors."""
    family = str(raw.get("model_type"))
    act = {"qwen2_5_vl": "silu", "qwen2_vl": "quick_gelu"}.get(family)
    if act is None:
        raise MocaError(f"{where}: model_type is {family}, not qwen2_5_vl or qwen2_vl")
    try:
        text = raw | (raw.get("text_config") or {})
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
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
            # nested files say it at the top, where transformers reads it; the text part second
            tied=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            vision=parse_vision(raw["vision_config"], family),
            raw=raw,
        )
        vision = config.vision
        refuse = {
            "use_sliding_window must be false": text.get("use_sliding_window"),
            "the decoder's hidden_act must be silu": text.get("hidden_act", "silu") != "silu",
            f"the vision tower's hidden_act must be {act}": vision.act != act,
            "heads must divide the width, and key heads the heads": (
                config.width % config.heads or config.heads % config.key_heads
                or vision.width % vision.heads),
            "window_size must be whole groups": vision.window % (vision.patch * vision.merge),
            "mrope_section must be three, half a head together": (
                len(config.rope_sections) - 3 or sum(config.rope_sections) * 2 - config.head_width),
            "rope must be plain, not stretched (yarn)": (
                (rope.get("rope_type") or rope.get("type") or "mrope") not in ("mrope", "default")),
            "layer_types must be full_attention": (
                {*(text.get("layer_types") or ())} - {"full_attention"}),
            "torch_dtype must be float32, bfloat16 or float16": (
                {text.get("torch_dtype"), text.get("dtype")}
                - {None, "float32", "bfloat16", "float16"}),
            "the vision tower must put out the decoder's width": vision.out_width - config.width,
            "nano_moca must be an object": not isinstance(raw.get("nano_moca", {}), dict),
        }
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise MocaError(f"{where}: missing or malformed: {error}: copy it again") from None
    for reason in (reason for reason, is_wrong in refuse.items() if is_wrong):
        raise MocaError(f"{where}: {reason}: this code knows no other Qwen-VL")
    return config


def parse_vision(raw: dict, family: str) -> VisionConfig:
    """The vision tower's part. Qwen2-VL names its widths otherwise and has no windows."""
    shared = dict(depth=raw["depth"], heads=raw["num_heads"], patch=raw.get("patch_size", 14),
                  frames=raw.get("temporal_patch_size", 2), merge=raw.get("spatial_merge_size", 2))
    if family == "qwen2_vl":
        return VisionConfig(
            width=raw["embed_dim"], mlp_width=int(raw["embed_dim"] * raw["mlp_ratio"]),
            out_width=raw["hidden_size"], act=raw.get("hidden_act", "quick_gelu"), window=0,
            full_blocks=(), **shared)
    return VisionConfig(
        width=raw["hidden_size"], mlp_width=raw["intermediate_size"],
        out_width=raw["out_hidden_size"], act=raw.get("hidden_act", "silu"),
        window=raw["window_size"], full_blocks=tuple(raw["fullatt_block_indexes"]), **shared)
