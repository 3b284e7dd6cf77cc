"""The shape of a Qwen3-VL, read from its `config.json`.

The file is always nested. As in convert/configs.py, what it leaves out has the
value that transformers (5.17) gives it, every value is looked at, and what this code
does not implement is refused.
"""

import math
from dataclasses import dataclass

from nano_moca.config import Config, VisionConfig
from nano_moca.convert.configs import DTYPES, Section

# The numbers in the file, as in convert/configs.py: by our names theirs, the value
# if there is none, and the least and the most that it may be.
DECODER_NUMBERS = {
    "vocabulary": ("vocab_size", 151936, 1, 10**8),
    "width": ("hidden_size", 4096, 1, 10**5),
    "layers": ("num_hidden_layers", 32, 1, 1000),
    "heads": ("num_attention_heads", 32, 1, 10**4),
    "kv_heads": ("num_key_value_heads", 32, 1, 10**4),
    "head_width": ("head_dim", 128, 2, 10**4),
    "mlp_width": ("intermediate_size", 22016, 1, 10**6),
    "norm_eps": ("rms_norm_eps", 1e-6, 1e-12, 0.1)}
VISION_NUMBERS = {
    "depth": ("depth", 27, 1, 1000),
    "width": ("hidden_size", 1152, 1, 10**5),
    "heads": ("num_heads", 16, 1, 10**4),
    "mlp_width": ("intermediate_size", 4304, 1, 10**6),
    "out_width": ("out_hidden_size", 3584, 1, 10**5),
    "patch": ("patch_size", 16, 1, 1000),
    "frames": ("temporal_patch_size", 2, 1, 16),
    "merge": ("spatial_merge_size", 2, 1, 16)}


@dataclass(frozen=True)
class Qwen3VisionConfig(VisionConfig):
    """The vision tower (ViT)."""

    table_side: int  # the learnt positions are a square of side x side
    deepstack: tuple[int, ...]  # the blocks that put out features, in rising order


@dataclass(frozen=True)
class Qwen3Config(Config):
    """The decoder's shape, the vision tower's, and the file they were read from."""

    # The family is younger than the older layout: no transformers reads it in that.
    saved_names = {"language": "model.language_model", "visual": "model.visual"}


def parse_qwen3(raw: dict, source: str = "config.json") -> Qwen3Config:
    """The content of a Qwen3-VL's `config.json`.

    source: the file's name for errors. MocaError for what is malformed or refused.
    """
    top = Section(raw, f"{source}: ")
    text = top.part("text_config")
    sizes = {ours: text.number(*theirs) for ours, theirs in DECODER_NUMBERS.items()}
    vision = parse_tower(top.part("vision_config"), sizes["width"], sizes["layers"])

    # Files of transformers 4 keep rope_theta beside the other rotary parameters.
    rope = text.part("rope_scaling" if text.values.get("rope_scaling") else "rope_parameters")
    turning = rope if "rope_theta" in rope.values else text
    rope.choice("rope_type", "default")
    rope.choice("type", "default")
    rope.choice("mrope_interleaved", True)

    # The three axes take turns (frame, row, column, frame, ...), row and column until
    # they have as many frequencies as their section says. The rest are the frame's.
    sections = rope.numbers("mrope_section", (24, 20, 20), 10**5)
    fits = len(sections) == 3 and sum(sections) * 2 == sizes["head_width"]
    rope.check(fits, "mrope_section", f"three numbers, half of {sizes['head_width']} together")
    axes = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections))]

    tied = top.choice("tie_word_embeddings", False, True)
    tied |= text.choice("tie_word_embeddings", False, True)
    config = Qwen3Config(
        family="qwen3_vl", stored_vocabulary=sizes["vocabulary"], vision=vision, raw=raw,
        rope_theta=turning.number("rope_theta", 500000.0, 1.0, 1e12), rope_axes=tuple(axes),
        tied=tied, **sizes)

    # Switches of other models, in positions that are not implemented here.
    text.choice("model_type", "qwen3_vl_text")
    text.choice("hidden_act", "silu")
    text.choice("attention_bias", False)

    # The rest is as in `parse_config`.
    for section in (top, text):
        section.choice("torch_dtype", *DTYPES)
        section.choice("dtype", *DTYPES)
    top.part("nano_moca")
    heads = config.heads
    text.check(heads % config.kv_heads == 0, "num_key_value_heads", f"a divisor of {heads}")
    return config


def parse_tower(tower: Section, width: int, layers: int) -> Qwen3VisionConfig:
    """The vision tower's part. width, layers: the decoder's. Errors as above."""
    sizes = {ours: tower.number(*theirs) for ours, theirs in VISION_NUMBERS.items()}
    places = tower.number("num_position_embeddings", 2304, 1, 10**6)
    blocks = tower.numbers("deepstack_visual_indexes", (8, 16, 24), sizes["depth"] - 1)
    act = tower.choice("hidden_act", "gelu_pytorch_tanh")
    vision = Qwen3VisionConfig(act=act, window=0, full_blocks=(), deepstack=blocks,
                               table_side=math.isqrt(places), **sizes)

    # Each block's features enter after a layer of the decoder of their own.
    rising = sorted(set(blocks) & set(range(vision.depth)))
    fits = rising == list(blocks) and len(blocks) <= layers
    tower.check(fits, "deepstack_visual_indexes", f"at most {layers} rising numbers below depth")
    tower.check(vision.out_width == width, "out_hidden_size", f"the decoder's width {width}")
    quarters = vision.width // 4
    tower.check(vision.width % (4 * vision.heads) == 0, "num_heads", f"a divisor of {quarters}")
    tower.part("rope_parameters").choice("rope_theta", 10000.0, 10000)
    return vision
