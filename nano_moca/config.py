"""The shape of a model: the sizes that its layers are built from.

They come from a checkpoint's `config.json`. How such a file is read, in all the forms
that it has had, is in convert/configs.py, and for Qwen3-VL in qwen3/config.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path

BASE = Path(__file__).parent / "base"  # the nano base: 1.2 million parameters


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (ViT)."""

    depth: int  # blocks
    width: int  # E
    heads: int
    mlp_width: int
    out_width: int  # the decoder's width
    act: str  # silu: RMSNorm, SwiGLU (Qwen2.5); quick_gelu: LayerNorm, MLP (Qwen2); else Qwen3's
    window: int  # side of an attention window in pixels, 0 for none
    full_blocks: tuple[int, ...]  # that attend to the full image (without windows, all do)
    patch: int  # side of a patch in pixels
    frames: int  # an image is repeated into this many frames
    merge: int  # merge x merge patches become one token of the decoder

    @property
    def padded_mlp_width(self) -> int:
        """The gated MLP's width in memory: a multiple of 8, padded with zeros, which
        change nothing. (Rows of Qwen2.5-VL's 3420 bfloat16 values begin at odd addresses,
        and a GPU multiplies such matrices at less than half its speed.)"""
        return self.mlp_width + -self.mlp_width % 8

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of the patch embedding in files: a convolution's."""
        return self.width, 3, self.frames, self.patch, self.patch

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

    family: str  # "qwen2_5_vl", "qwen2_vl" or "qwen3_vl"
    vocabulary: int  # V, of the embedding; the tokenizer's ids may end earlier
    stored_vocabulary: int  # of the checkpoint's files: less if V grew for a mask token
    width: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # K: H / K query heads share a key and value (grouped queries)
    head_width: int  # d
    mlp_width: int
    rope_theta: float
    rope_axes: tuple[int, ...]  # of the d/2 frequencies: 0 for frame, 1 row, 2 column
    norm_eps: float
    tied: bool  # the output head is the embedding
    vision: VisionConfig
    raw: dict  # the file's content, from which a saved model's is written

    @property
    def image_token_cost(self) -> float:
        """The work on an image token, in text tokens: 1.9 for 3B, 1.4 for 7B.

        Every token passes the decoder, and an image token's patches pass the vision
        tower first. Work is counted in weights that multiply a token. Attention
        itself, about 7% of either tower at 1,280 tokens, is left out.
        """
        attention = 2 * (self.heads + self.kv_heads) * self.head_width
        decoder = self.layers * self.width * (attention + 3 * self.mlp_width)
        seen = self.vision
        matrices = 3 if seen.act == "silu" else 2  # of an MLP: a SwiGLU has a gate
        tower = seen.depth * seen.width * (4 * seen.width + matrices * seen.mlp_width)
        return 1 + seen.merge**2 * tower / decoder

    # How the two towers' names begin in the files that we save.
    saved_names = {"language": "model", "visual": "visual"}


def grow_vocabulary(config: Config, token: int) -> Config:
    """The config with an embedding for the id `token`. Qwen's embeddings are padded
    beyond the tokenizer's last id, so that they seldom have to grow."""
    return replace(config, vocabulary=max(config.vocabulary, token + 1))
