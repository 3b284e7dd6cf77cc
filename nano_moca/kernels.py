"""What turns logits into cross entropies and their gradient, in PyTorch and in Triton.

One step, written twice with the same signature: in PyTorch, to read and to run on a
CPU, and as a Triton kernel. A Triton kernel is a Python function that is compiled
for the GPU and run there once per *program*, many at a time. A program handles
whole blocks of numbers, which `tl.load` and `tl.store` move between the GPU's
memory and its registers. That move is what costs: the arithmetic of a softmax is
nothing beside reading its logits. PyTorch's lines below go over the logits five
times; the kernel reads them twice, writes them once, and keeps everything in
between in float32 registers.

**Online softmax.** The gradient of cross entropy, softmax - onehot, needs the sum of
a row's exponentials, taken relative to the largest logit to avoid overflow. Done
naively, that is one pass for the maximum and another for the sum. But the sum can be
kept relative to the largest logit *so far*: when a block brings a larger one, what
was summed before shrinks by exp(old - new). So one pass finds both, and a second one
writes the gradient over the logits, which are no longer needed.

Left out: the matmuls around it (cuBLAS does those, see losses.py), and the squared
error of stage 1's other half, which is small and needs no kernel. With
TRITON_INTERPRET=1, set before Triton is imported, the kernel runs on CPU tensors,
one program after the other: slow, but testable.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is made for Linux; everything else works without it
    triton = None

TRITON_AVAILABLE = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VOCABULARY_BLOCK = 4096  # columns that a program handles at once: a power of two
jit = triton.jit if triton else lambda function: function


def cross_entropy_torch_(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
    """The cross entropy of each row, [r]. The logits [r, V] are written over: with their
    gradient, (softmax - onehot) * scale, if `gradient` asks for it."""
    work = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [r, V]

    # Subtract the largest logit of a row, so that no exponential overflows.
    work.sub_(work.amax(1, keepdim=True))
    label_logit = work.gather(1, labels[:, None])  # [r, 1], less the largest
    total = work.exp_().sum(1, keepdim=True)  # [r, 1]

    if gradient:
        work.mul_(scale / total)  # softmax * scale
        work.scatter_add_(1, labels[:, None], torch.full_like(label_logit, -scale))
        logits.copy_(work)
    return (total.log() - label_logit)[:, 0]


@jit
def cross_entropy_kernel(logits, labels, losses, scale,
                         V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of logits [r, V]: its loss [r], and its gradient in place."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: r * V may pass 2^31
    logits += row * V
    columns = tl.arange(0, BLOCK)

    # The label's logit is read before the gradient is written over it. A label
    # outside the vocabulary reads nothing: its loss and gradient become NaN, which a
    # trainer notices.
    label = tl.load(labels + row)
    known = (label >= 0) & (label < V)
    label_logit = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)

    # First pass: the largest logit, and the sum of exp(logit - largest), block by block.
    peak = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        inside = start + columns < V  # the last block may reach past the row's end
        block = tl.load(logits + start + columns, mask=inside, other=float("-inf"))
        block = block.to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(block, axis=0))
        block_sum = tl.sum(tl.exp(block - new_peak), axis=0)
        total = total * tl.exp(peak - new_peak) + block_sum
        peak = new_peak
    tl.store(losses + row, tl.log(total) + peak - label_logit)

    # Second pass: the gradient over the logits. GRADIENT is a constant when
    # compiled, so that without it there is no second pass.
    if GRADIENT:
        factor = tl.where(known, scale, float("nan"))
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            block = tl.load(logits + start + columns, mask=inside, other=0.0)
            softmax = tl.exp(block.to(tl.float32) - peak) / total
            onehot = tl.where(start + columns == label, 1.0, 0.0)
            tl.store(logits + start + columns, (softmax - onehot) * factor, mask=inside)


def cross_entropy_triton_(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
    """Twin of cross_entropy_torch_, for logits whose rows follow each other in memory."""
    if not TRITON_AVAILABLE:
        raise RuntimeError('backend "triton" needs Triton: pip install triton (Linux only)')
    if not (logits.is_cuda or INTERPRETED):
        raise RuntimeError('backend "triton" needs a GPU, or TRITON_INTERPRET=1 from the start')
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f'backend "triton" takes float32 or bfloat16, not {logits.dtype}')

    # One program per row. The kernel fills `losses`, and changes `logits`.
    r, V = logits.shape
    losses = logits.new_empty(r, dtype=torch.float32)
    cross_entropy_kernel[(r,)](logits, labels.contiguous(), losses, scale, V=V,
                               GRADIENT=gradient, BLOCK=VOCABULARY_BLOCK, num_warps=8)
    return losses


BACKENDS = {"torch": cross_entropy_torch_, "triton": cross_entropy_triton_}
