"""The vision tower: patches of images become tokens of the decoder's width.

    patches [P, 1176] -> linear -> blocks (attention within windows, or over the whole image) ->
    merger -> [P/4, D]

Images of any size enter as rows of patches, packed end to end like texts. The order of the rows is
by 2x2 groups, since the merger turns each group of four patches into one token. Qwen2.5-VL saves
most of the attention's cost by letting patches see only their window; a few blocks see the whole
image. Windows are nothing new for packed attention: sort the groups by window, and a window is one
more kind of short sequence.

MoCa does not change this tower's attention, which was always bidirectional. Its weights are trained
in both stages, like all others.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nano_moca.attention import Segments, attend, rotary_frequencies, rotate
from nano_moca.config import VisionConfig

NORM_EPS = 1e-6  # fixed in both families, not in their config.json


class RMSNorm(nn.Module):
    """Divide by the root mean square, computed in float32, and scale by a learnt weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the MLP of both towers in Qwen2.5-VL, with bias in the vision
    tower."""

    def __init__(self, width: int, mlp_width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=bias)
        self.up_proj = nn.Linear(width, mlp_width, bias=bias)
        self.down_proj = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, width] -> [rows, width]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class QuickGeluMLP(nn.Module):
    """The older MLP of Qwen2-VL: fc2(h * sigmoid(1.702 h)) with h = fc1(x)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, width] -> [rows, width]."""
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


def vision_norm(config: VisionConfig) -> nn.Module:
    """RMSNorm in Qwen2.5-VL, LayerNorm in Qwen2-VL."""
    if config.act == "silu":
        return RMSNorm(config.width, NORM_EPS)
    return nn.LayerNorm(config.width, NORM_EPS)


class VisionAttention(nn.Module):
    """Multi-head attention among the patches of a segment (a window or an image)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments) -> Tensor:
        """x [P, width], angles [P, d/2] float32 (d: width of a head) -> [P, width]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [P, 3, H, d]
        query, key, value = qkv.unbind(1)
        query, key = (rotate(x.float(), angles).to(x.dtype) for x in (query, key))  # as Qwen does
        out = attend(query, key, value, segments, causal=False)
        return self.proj(out.flatten(1))  # [P, width]


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = vision_norm(config), vision_norm(config)
        self.attn = VisionAttention(config)
        if config.act == "silu":
            self.mlp = SwiGLU(config.width, config.mlp_width, bias=True)
        else:
            self.mlp = QuickGeluMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor, angles: Tensor, segments: Segments) -> Tensor:
        """As VisionAttention."""
        x = x + self.attn(self.norm1(x), angles, segments)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Norm, then the four patches of a group side by side through a two-layer MLP: one image
    token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.group_width = config.merge**2 * config.width
        self.ln_q = vision_norm(config)
        inner, outer = self.group_width, config.out_width
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, outer))

    def forward(self, x: Tensor) -> Tensor:
        """x [P, width], the patches of a group in four rows that follow each other -> [P/4, D]."""
        return self.mlp(self.ln_q(x).view(-1, self.group_width))


def run_block(block: nn.Module, checkpointing: bool, *inputs: object) -> Tensor:
    """block(*inputs); with `checkpointing` its activations are recomputed in backward, not kept."""
    return checkpoint(block, *inputs, use_reentrant=False) if checkpointing else block(*inputs)


@lru_cache(maxsize=4096)
def image_layout(grid: tuple[int, int, int], config: VisionConfig
                 ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Where the patches of one image are, and how its groups sort into windows.

    Returns positions [P, 2] (row and column of each patch, in the order by groups); order [P/4]
    (the groups, window after window); and the number of patches in each window. Without windows the
    order is the identity.
    """
    frames, rows, columns = grid
    m = config.merge
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # [rows * columns, 2]
    cells = cells.view(rows // m, m, columns // m, m, 2).transpose(1, 2)  # groups first
    positions = cells.reshape(-1, 2).repeat(frames, 1)  # [P, 2]
    groups = torch.arange(len(positions) // m**2).view(frames, rows // m, columns // m)
    if not config.window:
        return positions, groups.flatten(), (rows * columns,) * frames
    side = config.window // (config.patch * m)  # groups along a window; the last may be narrower
    windows = [band.flatten() for frame in groups for rows_ in frame.split(side)
               for band in rows_.split(side, dim=1)]
    return positions, torch.cat(windows), tuple(len(window) * m * m for window in windows)


class VisionTower(nn.Module):
    """patches [P, 1176] and grids [I, 3] (frames, rows, columns of patches) -> image tokens [P/4,
    D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in backward, to save memory
        # the checkpoint's 3-D convolution with stride = kernel is a linear map of a flattened patch
        self.patch_embed = nn.Linear(config.patch_values, config.width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Rows of patches are by 2x2 groups; frames, rows and columns are counted in patches."""
        config, device, per_group = self.config, patches.device, self.config.merge**2
        positions, orders, window_lengths, image_lengths, first = [], [], [], [], 0
        for grid in grids.tolist():
            where, order, windows = image_layout(tuple(grid), config)
            positions.append(where)
            orders.append(order + first)
            window_lengths += windows
            image_lengths += [grid[1] * grid[2]] * grid[0]  # frames do not attend to each other
            first += len(order)
        order = torch.cat(orders).to(device)  # [P/4]
        images = Segments(tuple(image_lengths), device)
        windows = Segments(tuple(window_lengths), device) if config.window else images

        # half of each head's dimensions rotate with the patch's row, half with its column
        frequencies = rotary_frequencies(config.width // config.heads // 2, 10000.0, device)
        angles = torch.cat(positions).to(device)[:, :, None] * frequencies  # [P, 2, d/4]
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))  # [P, width]
        x, angles = (rows.view(-1, per_group, rows[0].numel())[order].flatten(0, 1)
                     for rows in (x, angles))  # by window: [P, width], [P, d/2]
        for index, block in enumerate(self.blocks):
            segments = images if index in config.full_blocks else windows
            x = run_block(block, self.checkpointing, x, angles, segments)
        return self.merger(x)[torch.argsort(order)]  # [P/4, D], back in the image's order
