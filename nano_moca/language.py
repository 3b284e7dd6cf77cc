"""The decoder: Qwen2 with rotary positions in three dimensions (M-RoPE).

Qwen2 was trained as a causal language model. Every layer takes `causal` as an argument: with False
the same weights form the bidirectional encoder that MoCa trains. Nothing else changes.

Positions are triples (frame, row, column). For text the three are equal, so M-RoPE is ordinary
rotary embedding; an image token carries its place in the grid.
"""

import torch
from torch import Tensor, nn

from nano_moca.attention import Segments, attend, rotary_frequencies, rotate
from nano_moca.config import Config
from nano_moca.vision import RMSNorm, SwiGLU, run_block


class SelfAttention(nn.Module):
    """Grouped-query attention: H query heads share K key and value heads. Bias on q, k, v; none on
    o."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.q_proj = nn.Linear(config.width, config.heads * config.head_width)
        self.k_proj = nn.Linear(config.width, config.key_heads * config.head_width)
        self.v_proj = nn.Linear(config.width, config.key_heads * config.head_width)
        self.o_proj = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments, causal: bool) -> Tensor:
        """x [T, D], angles [T, d/2] float32 (d: width of a head) -> [T, D]."""
        query, key, value = (proj(x).unflatten(-1, (-1, self.head_width))  # [T, H or K, d]
                             for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(rotate(query, angles), rotate(key, angles), value, segments, causal)
        return self.o_proj(out.flatten(1))  # [T, H, d] -> [T, D]


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments, causal: bool) -> Tensor:
        """As SelfAttention."""
        x = x + self.self_attn(self.input_layernorm(x), angles, segments, causal)
        return x + self.mlp(self.post_attention_layernorm(x))


def mrope_angles(positions: Tensor, config: Config) -> Tensor:
    """positions [3, T] -> angles [T, d/2] float32: each frequency turns with one of the three axes.

    The sections say how many of the d/2 frequencies, the fastest first, follow frame, row and
    column.
    """
    frequencies = rotary_frequencies(config.head_width, config.rope_theta, positions.device)
    sections = zip(positions, frequencies.split(config.rope_sections), strict=True)
    return torch.cat([axis[:, None] * turning for axis, turning in sections], dim=-1)  # [T, d/2]


class Decoder(nn.Module):
    """Token embeddings in, hidden states after the final norm out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each layer in backward, to save memory
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, segments: Segments, causal: bool) -> Tensor:
        """x [T, D] embeddings, positions [3, T] -> hidden states [T, D]."""
        angles = mrope_angles(positions, self.config)
        for layer in self.layers:
            x = run_block(layer, self.checkpointing, x, angles, segments, causal)
        return self.norm(x)
