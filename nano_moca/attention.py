"""Attention over packed sequences, causal or bidirectional, written by hand; and rotary embedding.

Sequences of different lengths lie end to end along one axis of T tokens, with no padding;
`Segments` says where each begins. Attention never crosses a border, so a record gets the same
result whatever it is packed with. The pattern inside a sequence is the `causal` argument, and it
has no default: turning a causal decoder into a bidirectional encoder (MoCa, section 3.1) is this
one boolean.

Three paths compute the same function:

- `reference_attention`: softmax(Q K^T / sqrt(d)) V with the whole T x T mask written out. The one
  to read.
- `grouped_attention`: PyTorch's fused attention, once per distinct length. Fast on CPU and right on
  any device.
- `varlen_attention`: PyTorch's variable-length flash kernel, for half precision on CUDA.

What is left out: key-value caches, sliding windows, dropout. Captions are short here, so decoding
recomputes.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch: the grouped path serves CUDA too
    varlen_attn = None


@dataclass
class Segments:
    """Where the N sequences of a packed axis lie: n is rows offsets[n] to offsets[n + 1]."""

    lengths: tuple[int, ...]  # N, on the host: looping over them costs no GPU synchronisation
    device: torch.device
    offsets: Tensor = field(init=False)  # [N+1] int32, on the device
    groups: list[tuple[int, Tensor]] = field(init=False)  # (length, [n * length] rows)
    inverse: Tensor = field(init=False)  # [T] where each row of the concatenated groups belongs

    def __post_init__(self) -> None:
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        self.offsets, self.groups = offsets.to(self.device, torch.int32), []
        for length in sorted(set(self.lengths) - {0}):  # empty sequences have no rows
            rows = offsets[:-1][lengths == length, None] + torch.arange(length)  # [n, length]
            self.groups.append((length, rows.flatten().to(self.device)))
        order = torch.cat([rows for _, rows in self.groups] or [torch.arange(0)])
        self.inverse = torch.argsort(order)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Attention by the fastest path for this device and dtype.

    query [T, H, d]; key and value [T, K, d] with K dividing H (grouped queries). Returns [T, H, d].
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and varlen_attn is not None:
        return varlen_attention(query, key, value, segments, causal)
    return grouped_attention(query, key, value, segments, causal)


def reference_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
                        causal: bool) -> Tensor:
    """The definition: every pair of tokens is scored, and a mask forbids what must not be seen.

    Costs T^2 memory, so it is for reading and testing. Shapes as in `attend`; softmax in float32.
    """
    T, H, d = query.shape
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))  # [T, H, d]
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / d**0.5  # [H, T, T]
    lengths = torch.tensor(segments.lengths, device=query.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths)  # [T]
    allowed = owner[:, None] == owner[None, :]  # [T, T]: the same sequence
    if causal:
        allowed = allowed & torch.ones_like(allowed).tril()  # and not later than oneself
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)  # [T, H, d]


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
                      causal: bool) -> Tensor:
    """Sequences of one length become an ordinary batch: one fused call per length. Shapes as in
    `attend`."""
    outputs, grouped = [], query.shape[1] != key.shape[1]
    for length, rows in segments.groups:
        q, k, v = query, key, value
        if len(segments.groups) > 1:  # else the rows are in order already: views, no copies
            q, k, v = q[rows], k[rows], v[rows]  # [n * length, H or K, d]
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n, H, length, d] -> [n * length, H, d]
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs)[segments.inverse] if outputs else torch.empty_like(query)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
                     causal: bool) -> Tensor:
    """PyTorch's kernel for packed sequences, half precision on CUDA only. Shapes as in `attend`."""
    H, longest = query.shape[1], max(segments.lengths)
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))  # [T, H, d]
    window = (-1, 0 if causal else -1)  # how far a token sees left and right; -1: to the border
    starts = segments.offsets
    return varlen_attn(query, key, value, starts, starts, longest, longest, window_size=window)


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """The angles turned per position, float32 [dim / 2]: from 1 down to almost 1 / theta."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding: turn the pair (x[i], x[i + d/2]) by angles[i].

    x [T, H, d]; angles [T, d/2] float32. After it, the product of a query and a key depends on the
    difference of their positions only. Sines are taken in float32 whatever x's dtype.
    """
    cos, sin = (f(angles)[:, None, :].to(x.dtype) for f in (torch.cos, torch.sin))  # [T, 1, d/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
