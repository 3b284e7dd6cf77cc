"""Qwen3-VL's towers: what differs from those in nano_moca/model.py, read that first.

    vision tower   no windows: in every block a patch sees its whole image
                   patches of 16 x 16 pixels, so 1536 values, embedded with a bias
                   learnt positions, beside the rotary embedding
                   LayerNorm, and an MLP with GELU instead of SwiGLU
                   DeepStack: a few of its blocks put out image tokens too
    decoder        each head of queries and keys is normed; no bias on q, k, v
                   a head's width is in the config, and is not D / H
                   M-RoPE's axes take turns: see `parse_qwen3` in config.py
                   DeepStack: what those blocks put out enters after early layers

DeepStack (arXiv 2406.04334) has k features for each image token. They come from, say,
blocks 5, 11 and 17 of the vision tower, and are added to the token's hidden state
after layers 0, 1 and 2 of the decoder. On the way from one tower to the other a token
is therefore 1 + k vectors: its embedding and its features, which are zeros for text.
(That costs the memory of k layers' inputs; in return all code between the towers is
the same as for Qwen2.5-VL.)

The parameters have the names of the checkpoints. Left out: video.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moca import model as qwen2
from nano_moca.attention import Segments, attend
from nano_moca.batch import Layout
from nano_moca.qwen3.config import Qwen3Config, Qwen3VisionConfig

# --- the vision tower -----------------------------------------------------------------


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, mlp_width: int, out_width: int, approximate: str) -> None:
        """approximate: "tanh", or "none" for the exact GELU."""
        super().__init__()
        self.linear_fc1 = nn.Linear(width, mlp_width)
        self.linear_fc2 = nn.Linear(mlp_width, out_width)
        self.gelu = nn.GELU(approximate)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., out_width]."""
        return self.linear_fc2(self.gelu(self.linear_fc1(x)))


class Merger(GeluMLP):
    """Four patches to one image token, or to one of its features. For the former they
    are normed one by one, as in Qwen2.5-VL; for the latter together, as one vector."""

    def __init__(self, config: Qwen3VisionConfig, norm_width: int) -> None:
        group_width = config.merge**2 * config.width
        super().__init__(group_width, group_width, config.out_width, "none")
        self.group_width = group_width
        self.norm = nn.LayerNorm(norm_width, qwen2.VISION_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x [P, E], the patches of a group next to each other -> [J, D]."""
        normed = self.norm(x.view(-1, *self.norm.normalized_shape))  # [P, E] or [J, 4 * E]
        return super().forward(normed.view(-1, self.group_width))


class VisionTower(qwen2.VisionTower):
    """Patches of images of any size become image tokens, and their features. (The
    blocks' norm is LayerNorm, as in Qwen2-VL: see `vision_norm`.)"""

    def __init__(self, config: Qwen3VisionConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Linear(config.patch_values, config.width)
        self.pos_embed = nn.Embedding(config.table_side**2, config.width)
        for block in self.blocks:
            block.mlp = GeluMLP(config.width, config.mlp_width, config.width, "tanh")

        # The last merger, and one for each block that puts out features.
        group_width = config.merge**2 * config.width
        self.merger = Merger(config, config.width)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, group_width) for _ in config.deepstack)

    def forward(self, patches: Tensor, layout: Layout) -> Tensor:
        """patches [P, 1536], by 2x2 groups, and where they are -> image tokens and their
        features [J, 1 + k, D]."""
        # Without windows the groups stay in the images' order.
        angles = self.rotary_angles(layout)  # [P, d/2]
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))  # [P, E]
        learnt = [self.learnt_positions(*grid) for grid in layout.grids]
        x = x + torch.cat(learnt).to(x.dtype)

        # Features are taken on the way, each by its own merger.
        features: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = qwen2.run_layer(block, self.checkpointing, x, angles, layout.whole)  # [P, E]
            if number in self.config.deepstack:
                features.append(self.deepstack_merger_list[len(features)](x))  # [J, D]
        return torch.stack([self.merger(x), *features], dim=1)  # [J, 1 + k, D]

    def learnt_positions(self, frames: int, rows: int, columns: int) -> Tensor:
        """What the learnt table says of each patch of an image, [P, E] float32.

        The table is a square of, say, 48 x 48 places. It is stretched over the image,
        corners on corners, with bilinear interpolation between its places.
        """
        side = self.config.table_side
        table = self.pos_embed.weight.float().T.view(1, -1, side, side)  # [1, E, side, side]
        grid = F.interpolate(table, (rows, columns), mode="bilinear", align_corners=True)

        # From the image's rows to the order of its patches, by groups.
        m = self.config.merge
        groups = grid.view(-1, rows // m, m, columns // m, m).transpose(2, 3)
        return groups.flatten(1).T.repeat(frames, 1)


# --- the decoder ----------------------------------------------------------------------


class SelfAttention(qwen2.SelfAttention):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.bias = None
        self.q_norm = qwen2.RMSNorm(config.head_width, config.norm_eps)
        self.k_norm = qwen2.RMSNorm(config.head_width, config.norm_eps)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments, causal: bool) -> Tensor:
        """x [T, D], angles [T, d/2] float32 -> [T, D]."""
        query = self.q_proj(x).unflatten(1, (self.heads, self.head_width))  # [T, H, d]
        key = self.k_proj(x).unflatten(1, (self.kv_heads, self.head_width))  # [T, K, d]
        value = self.v_proj(x).unflatten(1, (self.kv_heads, self.head_width))  # [T, K, d]

        # The norms act on each head, before positions enter.
        query = qwen2.rotate(self.q_norm(query), angles, x.dtype)
        key = qwen2.rotate(self.k_norm(key), angles, x.dtype)
        out = attend(query, key, value, segments, causal)  # [T, H, d]
        return self.o_proj(out.flatten(1))  # [T, D]


class DecoderLayer(qwen2.DecoderLayer):
    """Qwen2's layer with another attention."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.self_attn = SelfAttention(config)


class TokenEmbedding(nn.Embedding):
    """The embeddings of tokens, with room for features: zeros, as text has none."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config.vocabulary, config.width)
        self.features = len(config.vision.deepstack)  # k

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, 1 + k, D]."""
        x = super().forward(tokens)  # [T, D]
        return F.pad(x[:, None], (0, 0, 0, self.features))


class Decoder(qwen2.Decoder):
    """Qwen3: Qwen2 with other layers, and with features added after the first ones."""

    layer = DecoderLayer

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.embed_tokens = TokenEmbedding(config)

    def forward(self, x: Tensor, positions: Tensor, segments: Segments, causal: bool) -> Tensor:
        """x [T, 1 + k, D] embeddings and features, positions [3, T] -> hidden states
        [T, D]."""
        angles = qwen2.mrope_angles(positions, self.config)  # [T, d/2]
        x, *features = x.unbind(1)  # [T, D] each
        for number, layer in enumerate(self.layers):
            x = qwen2.run_layer(layer, self.checkpointing, x, angles, segments, causal)  # [T, D]
            if number < len(features):
                x = x + features[number]
        return self.norm(x)


class VLM(qwen2.VLM):
    """Both towers joined as in Qwen2.5-VL."""

    vision_tower = VisionTower
    decoder = Decoder
