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
            raise MocaError(f"{self.place}{key} is {value}, not {wanted}: use another checkpoint")

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

    def numbers(self, key: str, default: tuple[int, ...], most: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 to `most`. The default is not looked at."""
        value = self.values.get(key, default)
        fits = isinstance(value, list) and all(
            type(number) is int and 0 <= number <= most for number in value)
        self.check(fits or value is default, key, f"a list of whole numbers from 0 to {most}")
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
    sizes = {ours: text.number(*theirs) for ours, theirs in DECODER_NUMBERS.items()}
    vision = parse_vision(top.part("vision_config"), family, sizes["width"])

    # The key heads may be null: as many as query heads. Newer files keep rope_theta
    # among the rotary parameters, older ones beside them.
    heads, kv_heads = sizes["heads"], text.values.get("num_key_value_heads", 8)
    rope = text.part("rope_scaling" if text.values.get("rope_scaling") else "rope_parameters")
    turning = rope if "rope_theta" in rope.values else text

    # Heads share the width. One frequency turns two values of a head, with one axis of
    # the position; other ways to turn are not implemented here.
    rope.choice("rope_type", "default", "mrope")
    rope.choice("type", "default", "mrope")
    head_width, over = divmod(sizes["width"], heads)
    text.check(not over, "num_attention_heads", f"a divisor of {sizes['width']}")
    sections = rope.numbers("mrope_section", (16, 24, 24), 10**5)
    fits = len(sections) == 3 and sum(sections) * 2 == head_width
    rope.check(fits, "mrope_section", f"three numbers, half of {head_width} together")
    frames, rows, columns = sections

    # Some files of transformers 4 say tied in text_config only, and untied at the top.
    tied = top.choice("tie_word_embeddings", False, True)
    tied |= text.choice("tie_word_embeddings", False, True)
    config = Config(
        family=family, stored_vocabulary=sizes["vocabulary"], vision=vision, raw=raw,
        kv_heads=heads if kv_heads is None else text.number("num_key_value_heads", 8, 1, 10**4),
        head_width=head_width, rope_theta=turning.number("rope_theta", 1e6, 1.0, 1e12),
        rope_axes=(0,) * frames + (1,) * rows + (2,) * columns, tied=tied, **sizes)

    # Switches of other Qwen models, in positions that are not implemented here.
    text.choice("use_sliding_window", False, None)
    text.choice("hidden_act", "silu")
    text.choice("layer_types", None, ["full_attention"] * config.layers)

    # The dtype has an older and a newer key. "nano_moca" is ours, see save_weights.
    for section in (top, text):
        section.choice("torch_dtype", *DTYPES)
        section.choice("dtype", *DTYPES)
    top.part("nano_moca")

    # Query heads share the key heads.
    text.check(heads % config.kv_heads == 0, "num_key_value_heads", f"a divisor of {heads}")
    return config


def parse_vision(tower: Section, family: str, width: int) -> VisionConfig:
    """The vision tower's part. width: the decoder's. Errors as in `parse_config`."""
    numbers = VISION_NUMBERS | FAMILY_NUMBERS[family]
    sizes = {ours: tower.number(*theirs) for ours, theirs in numbers.items()}
    if family == "qwen2_vl":
        sizes["mlp_width"] *= sizes["width"]  # a ratio in the file
    full_blocks = tower.numbers("fullatt_block_indexes", (7, 15, 23, 31), sizes["depth"] - 1)
    act = tower.choice("hidden_act", ACTIVATIONS[family])
    vision = VisionConfig(act=act, full_blocks=full_blocks, **sizes)

    # Image tokens stand among text tokens. A quarter of a head turns with the row, and
    # one with the column. A window is cut into groups, and has none in Qwen2-VL.
    tower.check(vision.out_width == width, numbers["out_width"][0], f"the decoder's width {width}")
    quarters, group_side = vision.width // 4, vision.patch * vision.merge
    tower.check(vision.width % (4 * vision.heads) == 0, "num_heads", f"a divisor of {quarters}")
    tower.check(vision.window % group_side == 0, "window_size", f"a multiple of {group_side}")
    tower.part("rope_parameters").choice("rope_theta", 10000.0, 10000)
    return vision
