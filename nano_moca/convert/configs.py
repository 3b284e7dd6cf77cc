"""A Qwen `config.json` as a `Config`: Qwen2-VL's and Qwen2.5-VL's.

Their decoders are the same; their vision towers differ in norm, MLP and windows. A file
comes in two forms: flat (the hub's checkpoints, transformers up to 4.51) and with a
nested `text_config` (4.52 and later). What a writer left out has the value that
transformers gives it: up to 4.49 only what differed from that was written.

A file may come from a stranger. So every value is looked at before anything is built
from it: its type, its sign, and that it is not larger than any model's.

Whatever this code does not implement (sliding windows, other activations, stretched
rotary positions) is refused. If it were ignored, the model would run and its output
would be nonsense.
"""

import reprlib
from dataclasses import dataclass
from typing import Any

from nano_moca.config import Config, VisionConfig
from nano_moca.files import MocaError

ACTIVATIONS = {"qwen2_5_vl": "silu", "qwen2_vl": "quick_gelu"}  # the towers'
DTYPES = (None, "float32", "bfloat16", "float16")  # None: the file names none

# The numbers in config.json, by our names: theirs, the value where a file has none, and
# the least and the most that it may be. A number without a point has to be whole.
DECODER_NUMBERS = {
    "vocabulary": ("vocab_size", 152064, 1, 10**8),
    "width": ("hidden_size", 8192, 1, 10**5),
    "layers": ("num_hidden_layers", 80, 1, 1000),
    "heads": ("num_attention_heads", 64, 1, 10**4),
    "mlp_width": ("intermediate_size", 29568, 1, 10**6),
    "norm_eps": ("rms_norm_eps", 1e-5, 1e-12, 0.1)}
VISION_NUMBERS = {
    "depth": ("depth", 32, 1, 1000),
    "heads": ("num_heads", 16, 1, 10**4),
    "patch": ("patch_size", 14, 1, 1000),
    "frames": ("temporal_patch_size", 2, 1, 16),
    "merge": ("spatial_merge_size", 2, 1, 16)}

# A trap: hidden_size is the decoder's width in Qwen2-VL, and the tower's in 2.5.
FAMILY_NUMBERS = {
    "qwen2_vl": {
        "width": ("embed_dim", 1280, 1, 10**5),
        "mlp_width": ("mlp_ratio", 4, 1, 100),  # times the width
        "out_width": ("hidden_size", 3584, 1, 10**5),
        "window": ("window_size", 0, 0, 0)},
    "qwen2_5_vl": {
        "width": ("hidden_size", 3584, 1, 10**5),
        "mlp_width": ("intermediate_size", 3420, 1, 10**6),
        "out_width": ("out_hidden_size", 3584, 1, 10**5),
        "window": ("window_size", 112, 1, 10**5)}}


@dataclass(frozen=True)
class Section:
    """An object in config.json, whose values are checked as they are read: a MocaError
    names the file, the key and the value."""

    values: dict
    place: str  # the file's name, and the keys that lead here

    def check(self, fits: bool, key: str, wanted: str) -> None:
        """MocaError unless the value fits. (reprlib shortens what is long or deep.)"""
        if not fits:
            value = reprlib.repr(self.values[key]) if key in self.values else "left out"
            raise MocaError(f"{self.place}{key} is {value}, not {wanted}: correct it, or use "
                            "another checkpoint")

    def part(self, key: str) -> "Section":
        """An object inside this one; empty if it is left out or null."""
        value = self.values.get(key)
        self.check(isinstance(value, dict | None), key, "an object")
        return Section(value or {}, f"{self.place}{key}.")

    def choice(self, key: str, *allowed: Any) -> Any:
        """One of the allowed values; the first if it is left out."""
        value = self.values.get(key, allowed[0])
        fits = value in allowed and type(value) in map(type, allowed)  # 1 equals true
        self.check(fits, key, " or ".join(map(reprlib.repr, allowed)))
        return value

    def number(self, key: str, default: float, least: float, most: float) -> Any:
        """A number from `least` to `most`, whole if the default is."""
        value = self.values.get(key, default)
        kind = type(default)
        whole = "whole " if kind is int else ""
        fits = type(value) in (int, kind) and least <= value <= most  # NaN does not
        self.check(fits, key, f"a {whole}number from {least} to {most}")
        return kind(value)

    def sizes(self, table: dict[str, tuple]) -> dict[str, Any]:
        """All numbers of a table, by our names."""
        return {ours: self.number(*theirs) for ours, theirs in table.items()}

    def numbers(self, key: str, default: tuple, least: float, most: float) -> tuple:
        """A list of numbers from `least` to `most`, whole if `most` is. The default is not
        looked at."""
        value = self.values.get(key, default)
        kind = type(most)
        fits = isinstance(value, list) and all(
            type(number) in (int, kind) and least <= number <= most for number in value)
        wanted = f"a list of {kind.__name__}s from {least} to {most}"
        self.check(fits or value is default, key, wanted)
        return tuple(value)


def parse_config(raw: dict, source: str = "config.json") -> Config:
    """The content of a `config.json`, flat or nested, as a `Config`.

    source: the file's name for errors. MocaError for what is malformed or refused.
    """
    # A nested file has the decoder's part in text_config, a flat one at the top. A file
    # that names no model_type is none of ours.
    top = Section({"model_type": None} | raw, f"{source}: ")
    family = top.choice("model_type", *ACTIVATIONS)
    text = top if raw.get("text_config") is None else top.part("text_config")
    sizes = text.sizes(DECODER_NUMBERS)

    # Heads share the width.
    heads, width = sizes["heads"], sizes["width"]
    sizes["head_width"], over = divmod(width, heads)
    text.check(not over, "num_attention_heads", f"a divisor of {width}")
    text.choice("head_dim", None, sizes["head_width"])

    # Switches of other Qwen models, in positions that are not implemented here.
    text.choice("use_sliding_window", False, None)
    text.choice("layer_types", None, ["full_attention"] * sizes["layers"])
    fields, (frames, rows, columns) = parse_decoder(
        top, text, sizes, kv_heads=8, theta=1e6, sections=(16, 24, 24), interleaved=False)

    # Of the vision tower, Qwen2-VL's file has a ratio in place of a width.
    numbers = VISION_NUMBERS | FAMILY_NUMBERS[family]
    tower = top.part("vision_config")
    tower_fields = parse_tower(tower, numbers, ACTIVATIONS[family], width)
    if family == "qwen2_vl":
        tower_fields["mlp_width"] *= tower_fields["width"]
    vision = VisionConfig(**tower_fields, full_blocks=tower.numbers(
        "fullatt_block_indexes", (7, 15, 23, 31), 0, tower_fields["depth"] - 1))

    # A window is cut into groups (Qwen2-VL has no windows).
    side = vision.patch * vision.merge
    tower.check(vision.window % side == 0, "window_size", f"a multiple of {side}")
    axes = (0,) * frames + (1,) * rows + (2,) * columns
    return Config(family=family, vision=vision, raw=raw, rope_axes=axes, **fields)


def parse_decoder(top: Section, text: Section, sizes: dict, kv_heads: int, theta: float,
                  sections: tuple[int, ...], interleaved: bool) -> tuple[dict, tuple[int, ...]]:
    """What the decoders of all families say alike: fields of `Config`, and how many of a
    head's frequencies each axis of the position has.

    top, text: the file, and its decoder's part. sizes: the decoder's numbers. kv_heads,
    theta, sections: where the file has none.
    """
    # Query heads share the key heads. These may be null: as many as query heads.
    heads, key = sizes["heads"], "num_key_value_heads"
    null = text.values.get(key, kv_heads) is None
    kv_heads = heads if null else text.number(key, kv_heads, 1, 10**4)
    text.check(heads % kv_heads == 0, key, f"a divisor of {heads}")
    text.choice("hidden_act", "silu")

    # The dtype has an older and a newer key. Some files of transformers 4 say tied in
    # text_config only, and untied at the top. "nano_moca" is ours, see save_weights.
    tied = False
    for section in (top, text):
        section.choice("torch_dtype", *DTYPES)
        section.choice("dtype", *DTYPES)
        tied |= section.choice("tie_word_embeddings", False, True)
    top.check(isinstance(top.values.get("nano_moca", {}), dict), "nano_moca", "an object")

    # One frequency turns two values of a head; other ways to turn are not implemented.
    older = text.part("rope_scaling")
    rope = older if older.values else text.part("rope_parameters")
    rope.choice("rope_type", "default", "mrope")
    rope.choice("type", "default", "mrope")
    rope.choice("mrope_interleaved", interleaved)
    sections = rope.numbers("mrope_section", sections, 0, 10**5)
    head_width = sizes["head_width"]
    fits = len(sections) == 3 and sum(sections) * 2 == head_width
    rope.check(fits, "mrope_section", f"three numbers, half of {head_width} together")

    # Newer files keep rope_theta among these, older ones beside them.
    turning = rope if "rope_theta" in rope.values else text
    return sizes | dict(
        stored_vocabulary=sizes["vocabulary"], kv_heads=kv_heads, tied=tied,
        rope_theta=turning.number("rope_theta", theta, 1.0, 1e12)), sections


def parse_tower(tower: Section, numbers: dict, act: str, width: int) -> dict:
    """What the vision towers say alike, as fields of `VisionConfig`.

    numbers: the table of its numbers. act: its activation. width: the decoder's.
    """
    sizes = tower.sizes(numbers)
    tower.choice("hidden_act", act)
    tower.choice("in_channels", 3)
    tower.choice("in_chans", 3)
    tower.part("rope_parameters").choice("rope_theta", 10000.0, 10000)

    # Image tokens stand among text tokens. A quarter of a head turns with the row, and
    # one with the column.
    fits, key = sizes["out_width"] == width, numbers["out_width"][0]
    tower.check(fits, key, f"the decoder's width {width}")
    fits = sizes["width"] % (4 * sizes["heads"]) == 0
    tower.check(fits, "num_heads", f"a divisor of {sizes['width'] // 4}")
    return sizes | {"act": act}
