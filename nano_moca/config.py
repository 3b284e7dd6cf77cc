"""The shape of a model, read from a Qwen `config.json`.

Two families are known: Qwen2-VL and Qwen2.5-VL. Their decoders are the same; their
vision towers differ in norm, MLP and windows. A `config.json` comes in two forms:
flat (the hub's checkpoints, transformers up to 4.51) and with a nested `text_config`
(4.52 and later). Both are read into the two small dataclasses below.

Whatever this code does not implement (sliding windows, other activations, stretched
rotary positions) is refused. If it were ignored, the model would run and its output
would be nonsense.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from nano_moca.files import MocaError, read_json

BASE = Path(__file__).parent / "base"  # the nano base: two million parameters
ACTIVATIONS = {"qwen2_5_vl": "silu", "qwen2_vl": "quick_gelu"}  # the towers'
DTYPES = {None, "float32", "bfloat16", "float16"}  # None: the file names none


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (ViT)."""

    depth: int  # blocks
    width: int  # E
    heads: int
    mlp_width: int
    out_width: int  # the decoder's width
    act: str  # silu: RMSNorm and SwiGLU (2.5); quick_gelu: LayerNorm and MLP (2)
    window: int  # side of an attention window in pixels, 0 for none
    full_blocks: tuple[int, ...]  # blocks that attend to the full image
    patch: int  # side of a patch in pixels
    frames: int  # an image is repeated into this many frames
    merge: int  # merge x merge patches become one token of the decoder

    @property
    def patch_values(self) -> int:
        """Values in one patch: channels x frames x patch x patch (1176)."""
        return 3 * self.frames * self.patch * self.patch

    @property
    def group_values(self) -> int:
        """Values in a merged group of patches, that is, of one image token (4704)."""
        return self.merge**2 * self.patch_values


@dataclass(frozen=True)
class Config:
    """The decoder's shape, the vision tower's, and the file they were read from."""

    family: str  # "qwen2_5_vl" or "qwen2_vl"
    vocabulary: int  # V, of the embedding; the tokenizer's ids may end earlier
    width: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # K: H / K query heads share a key and value (grouped queries)
    mlp_width: int
    rope_theta: float
    rope_sections: tuple[int, int, int]  # frequencies for frame, row, column
    norm_eps: float
    tied: bool  # the output head is the embedding
    vision: VisionConfig
    raw: dict  # the file's content, from which a saved model's is written

    @property
    def head_width(self) -> int:
        """Values of one attention head (d)."""
        return self.width // self.heads

    @property
    def stored_vocabulary(self) -> int:
        """The vocabulary of the checkpoint's files: smaller than `vocabulary` if it
        was grown for a mask token."""
        return (self.raw.get("text_config") or self.raw).get("vocab_size", self.vocabulary)


def grow_vocabulary(config: Config, token: int) -> Config:
    """The config with an embedding for the id `token`. Qwen's embeddings are padded
    beyond the tokenizer's last id, so that they seldom have to grow."""
    return replace(config, vocabulary=max(config.vocabulary, token + 1))


def load_config(folder: Path) -> Config:
    """Read `folder/config.json`; MocaError says what is missing or not supported."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(raw: dict, source: str = "config.json") -> Config:
    """The content of a `config.json`, flat or nested, as a `Config`.

    source: the file's name for errors. MocaError for what is missing, malformed or
    refused.
    """
    family = str(raw.get("model_type"))
    act = ACTIVATIONS.get(family)
    if act is None:
        raise MocaError(f"{source}: model_type is {family}, not qwen2_5_vl or qwen2_vl")

    # A malformed value is reported before a refused one: so look at all, then refuse.
    refusals: list[str] = []

    def check(condition: bool, reason: str) -> None:
        if not condition:
            refusals.append(reason)

    try:
        # A nested file has the decoder's part in text_config, a flat one at the top.
        text = raw | (raw.get("text_config") or {})
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        config = parse_decoder(raw, text, rope, family)
        vision = config.vision

        # Switches of other Qwen models, in positions that are not implemented here.
        check(not text.get("use_sliding_window"), "use_sliding_window must be false")
        check(text.get("hidden_act", "silu") == "silu", "the decoder's hidden_act must be silu")
        check(vision.act == act, f"the vision tower's hidden_act must be {act}")

        # Sizes that have to divide each other, to be cut into heads and windows.
        heads_divide = (config.width % config.heads == 0
            and config.heads % config.kv_heads == 0 and vision.width % vision.heads == 0)
        check(heads_divide, "heads must divide the width, and key heads the heads")
        group_side = vision.patch * vision.merge  # in pixels, as the window's
        check(vision.window % group_side == 0, "window_size must be whole groups")

        # One frequency turns two values of a head, so there are half as many.
        sections = config.rope_sections
        sections_fit = len(sections) == 3 and sum(sections) * 2 == config.head_width
        check(sections_fit, "mrope_section must be three, half a head together")
        rope_type = rope.get("rope_type") or rope.get("type") or "mrope"
        check(rope_type in ("mrope", "default"), "rope must be plain, not stretched (yarn)")

        # layer_types has an entry per layer; the dtype has an older and a newer key.
        kinds = set(text.get("layer_types") or ())
        check(kinds <= {"full_attention"}, "layer_types must be full_attention")
        dtypes = {text.get("torch_dtype"), text.get("dtype")}
        check(dtypes <= DTYPES, "torch_dtype must be float32, bfloat16 or float16")

        # Image tokens stand among text tokens; "nano_moca" is ours, see save_weights.
        check(vision.out_width == config.width, "the vision tower must put out the decoder's width")
        check(isinstance(raw.get("nano_moca", {}), dict), "nano_moca must be an object")
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise MocaError(f"{source}: missing or malformed: {error}: copy it again") from None

    if refusals:
        raise MocaError(f"{source}: {refusals[0]}: this code knows no other Qwen-VL")
    return config


def parse_decoder(raw: dict, text: dict, rope: dict, family: str) -> Config:
    """The `Config` of a file's content, unchecked.

    raw: the content; text: the decoder's part of it; rope: the rotary part of that.
    KeyError, TypeError, ValueError or AttributeError for what is missing or
    malformed.
    """
    return Config(
        family=family, vocabulary=text["vocab_size"],
        width=text["hidden_size"], layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        mlp_width=text["intermediate_size"],
        # Newer files keep rope_theta among the rotary parameters, older beside them.
        rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
        rope_sections=tuple(rope["mrope_section"]),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        # Nested files say it at the top, where transformers reads it first.
        tied=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        vision=parse_vision(raw["vision_config"], family), raw=raw)


def parse_vision(raw: dict, family: str) -> VisionConfig:
    """The vision tower's part; errors as in `parse_decoder`."""
    # What has one name in both families.
    shared = {
        "depth": raw["depth"], "heads": raw["num_heads"], "patch": raw.get("patch_size", 14),
        "frames": raw.get("temporal_patch_size", 2), "merge": raw.get("spatial_merge_size", 2),
        "act": raw.get("hidden_act", ACTIVATIONS[family])}

    # A trap: hidden_size is the decoder's width in Qwen2-VL, and the tower's in 2.5.
    if family == "qwen2_vl":
        width = raw["embed_dim"]
        return VisionConfig(
            width=width, mlp_width=int(width * raw["mlp_ratio"]), out_width=raw["hidden_size"],
            window=0, full_blocks=(), **shared)
    return VisionConfig(
        width=raw["hidden_size"], mlp_width=raw["intermediate_size"],
        out_width=raw["out_hidden_size"], window=raw["window_size"],
        full_blocks=tuple(raw["fullatt_block_indexes"]), **shared)
