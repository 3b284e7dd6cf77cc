"""The shape of a Qwen3-VL, read from its `config.json`.

The file is always nested. As in convert/configs.py, what it leaves out has the
value that transformers (5.17) gives it, every value is looked at, and what this code
does not implement is refused.
"""

import math
from dataclasses import dataclass

from nano_moca.config import Config, VisionConfig
from nano_moca.convert import configs
from nano_moca.convert.configs import Section, parse_decoder, parse_tower

# The numbers in the file, as in convert/configs.py: by our names theirs, the value
# if there is none, and the least and the most that it may be.
DECODER_NUMBERS = {
    "vocabulary": ("vocab_size", 151936, 1, 10**8),
    "width": ("hidden_size", 4096, 1, 10**5),
    "layers": ("num_hidden_layers", 32, 1, 1000),
    "heads": ("num_attention_heads", 32, 1, 10**4),
    "head_width": ("head_dim", 128, 2, 10**4),
    "mlp_width": ("intermediate_size", 22016, 1, 10**6),
    "norm_eps": ("rms_norm_eps", 1e-6, 1e-12, 0.1)}
VISION_NUMBERS = configs.VISION_NUMBERS | {
    "depth": ("depth", 27, 1, 1000),
    "width": ("hidden_size", 1152, 1, 10**5),
    "mlp_width": ("intermediate_size", 4304, 1, 10**6),
    "out_width": ("out_hidden_size", 3584, 1, 10**5),
    "patch": ("patch_size", 16, 1, 1000)}


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
    text.choice("model_type", "qwen3_vl_text")
    text.choice("attention_bias", False)
    sizes = text.sizes(DECODER_NUMBERS)
    text.check(sizes["head_width"] % 2 == 0, "head_dim", "an even number")
    fields, sections = parse_decoder(
        top, text, sizes, kv_heads=32, theta=500000.0, sections=(24, 20, 20), interleaved=True)

    # The three axes take turns (frame, row, column, frame, ...), row and column until
    # they have as many frequencies as their section says. The rest are the frame's.
    axes = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections))]

    # Places for the learnt positions, and the blocks of DeepStack.
    tower = top.part("vision_config")
    tower_fields = parse_tower(tower, VISION_NUMBERS, "gelu_pytorch_tanh", sizes["width"])
    places = tower.number("num_position_embeddings", 2304, 1, 10**6)
    depth, layers = tower_fields["depth"], sizes["layers"]
    blocks = tower.numbers("deepstack_visual_indexes", (8, 16, 24), 0, depth - 1)

    # Each block's features enter after a layer of the decoder of their own.
    rising = sorted(set(blocks) & set(range(depth)))
    fits = rising == list(blocks) and len(blocks) <= layers
    tower.check(fits, "deepstack_visual_indexes", f"at most {layers} rising numbers below depth")
    vision = Qwen3VisionConfig(window=0, full_blocks=(), deepstack=blocks,
                               table_side=math.isqrt(places), **tower_fields)
    return Qwen3Config(family="qwen3_vl", vision=vision, raw=raw, rope_axes=tuple(axes), **fields)
