"""Attention over packed sequences, causal or bidirectional, written by hand.

Sequences of different lengths lie end to end along one axis of T tokens, with no
padding; `Segments` says where each begins. Attention never crosses a border, so a
record gets the same result whatever it is packed with. The pattern inside a sequence
is the argument `causal`, and it has no default: turning a causal decoder into a
bidirectional encoder (MoCa, section 3.1; the released code sets `is_causal = False`
in each layer, qwen2_5_vl_embed.py:316-321) is this one boolean.

Three paths compute the same function:

- `reference_attention`: softmax(Q K^T / sqrt(d)) V with the T x T mask written out. The
  one to read.
- `grouped_attention`: PyTorch's fused attention, once per distinct length. Fast on CPU
  and right on any device.
- `varlen_attention`: PyTorch's variable-length flash kernel, for half precision on CUDA.

Left out: key-value caches, sliding windows, dropout. Captions are short here, so
decoding recomputes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch: the grouped path serves CUDA too
    varlen_attn = None
# Whether it takes fewer heads of keys and values than of queries: torch 2.13's does.
TAKES_GROUPS = varlen_attn and "enable_gqa" in signature(varlen_attn).parameters


@dataclass
class Segments:
    """Where N sequences lie on a packed axis: number i is offsets[i] to offsets[i + 1].

    They are made on the host, and sent with the batch that they belong to. What only
    `grouped_attention` reads is made when it asks.
    """

    lengths: tuple[int, ...]  # N, on the host: looping over them costs no GPU synchronisation
    offsets: Tensor  # [N+1] int32, with the batch on the device

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | None = None) -> "Segments":
        """Sequences of these lengths, one after the other. device None: on the host."""
        ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)  # [N]
        return cls(tuple(lengths), F.pad(ends, (1, 0)).to(device, torch.int32))

    @cached_property
    def same_length(self) -> list[tuple[int, Tensor]]:
        """(length, [s * length] index) for each length: sequences of equal length form an
        ordinary batch. Empty ones have no tokens."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)  # [N]
        starts = lengths.cumsum(0) - lengths  # [N]
        index_of = []
        for length in sorted(set(self.lengths) - {0}):
            own = starts[lengths == length]  # [s]
            index = (own[:, None] + torch.arange(length)).flatten()  # [s * length]
            index_of.append((length, index.to(self.offsets.device)))
        return index_of

    @cached_property
    def inverse(self) -> Tensor:
        """[T] int64: from the order of `same_length` back to the axis."""
        return torch.argsort(torch.cat([index for _, index in self.same_length]))


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
           causal: bool) -> Tensor:
    """Attention by the fastest path for this device and dtype.

    query [T, H, d]; key and value [T, K, d] with K dividing H (grouped-query
    attention: H / K query heads share one key and value head). Returns [T, H, d].
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and varlen_attn is not None:
        return varlen_attention(query, key, value, segments, causal)
    return grouped_attention(query, key, value, segments, causal)


def reference_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
                        causal: bool) -> Tensor:
    """The definition: every pair of tokens gets a score, and a mask excludes some pairs.

    Costs T^2 memory, so it is for reading and testing. Shapes as in `attend`;
    softmax in float32.
    """
    H, d = query.shape[1:]
    K = key.shape[1]

    # Grouped queries: each key and value head is repeated for the queries that share it.
    key = key.repeat_interleave(H // K, dim=1)  # [T, H, d]
    value = value.repeat_interleave(H // K, dim=1)  # [T, H, d]

    # The score of a query and a key: their dot product, scaled.
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / d**0.5  # [H, T, T]

    # Which pairs may see each other: those of one sequence ...
    lengths = torch.tensor(segments.lengths, device=query.device)  # [N]
    owner = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths)  # [T]
    allowed = owner[:, None] == owner[None, :]  # [T, T]

    # ... and if causal, only a key that does not stand after the query. MoCa drops this.
    if causal:
        allowed = allowed & torch.ones_like(allowed).tril()

    # Each query's result is the mean of the values that it sees, weighted by softmax.
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)  # [H, T, T]
    out = torch.einsum("hqk,khd->qhd", weights, value.float())  # [T, H, d]
    return out.to(query.dtype)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
                      causal: bool) -> Tensor:
    """Sequences of one length form an ordinary batch: one fused call per distinct length.

    Shapes as in `attend`.
    """
    H, d = query.shape[1:]
    K = key.shape[1]
    outputs = []
    in_order = len(segments.same_length) == 1  # then views suffice, and no copies are made
    for length, index in segments.same_length:
        q = query if in_order else query[index]  # [s * length, H, d]
        k = key if in_order else key[index]  # [s * length, K, d]
        v = value if in_order else value[index]  # [s * length, K, d]

        # What `scaled_dot_product_attention` expects: batch, heads, length, head width.
        q = q.view(-1, length, H, d).transpose(1, 2)  # [s, H, length, d]
        k = k.view(-1, length, K, d).transpose(1, 2)  # [s, K, length, d]
        v = v.view(-1, length, K, d).transpose(1, 2)  # [s, K, length, d]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H != K)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [s * length, H, d]

    if not outputs:
        return torch.empty_like(query)
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs)[segments.inverse]  # [T, H, d]


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
                     causal: bool) -> Tensor:
    """PyTorch's kernel for packed sequences, half precision on CUDA only.

    Shapes as in `attend`.
    """
    # How far a token sees to its left and right; -1: to the border of its sequence.
    options: dict[str, object] = {"window_size": (-1, 0) if causal else (-1, -1)}

    # Grouped queries: the kernel reads one head for all that share it, or gets copies.
    H, K = query.shape[1], key.shape[1]
    if TAKES_GROUPS:
        options["enable_gqa"] = True
    elif H != K:
        key = key.repeat_interleave(H // K, dim=1)  # [T, H, d]
        value = value.repeat_interleave(H // K, dim=1)  # [T, H, d]

    offsets, longest = segments.offsets, max(segments.lengths)
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)
