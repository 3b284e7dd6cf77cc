"""What turns logits and predicted patches into losses and gradients, in PyTorch and in Triton.

Two steps, each written twice with the same signature: in PyTorch, to read and to run on a CPU, and
as a Triton kernel. A Triton kernel is a Python function compiled for the GPU and run there once per
*program*, many at a time. A program handles whole blocks of numbers, which `tl.load` and `tl.store`
move between the GPU's memory and its registers. That move is what costs: the arithmetic of a
softmax is nothing beside reading its logits. PyTorch's lines below go over the logits five times;
the kernel reads them twice, writes them once, and keeps everything between in float32 registers.

**Online softmax.** The gradient of cross entropy, softmax - onehot, needs the sum of a row's
exponentials, taken relative to the largest logit to avoid overflow. Done naively, that is one pass
for the maximum and another for the sum. But the sum can be kept relative to the largest logit *so
far*: when a block brings a larger one, what was summed before shrinks by exp(old - new). So one
pass finds both, and a second one writes the gradient over the logits, which are no longer needed.

Left out: the matmuls around it (cuBLAS does those, see losses.py). With TRITON_INTERPRET=1, set
before Triton is imported, the kernels run on CPU tensors, one program after the other: slow, but
testable.
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
VOCABULARY_BLOCK, PATCH_BLOCK = 4096, 1024  # columns that a program handles at once: powers of two
jit = triton.jit if triton else lambda function: function


def cross_entropy_torch_(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
    """Each row's cross entropy [rows]; logits [rows, V] then hold (softmax - onehot) * scale."""
    work = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float32: no copy
    work.sub_(work.amax(1, keepdim=True))  # the largest is 0 now, so no exponential overflows
    right = work.gather(1, labels[:, None])  # [rows, 1]
    total = work.exp_().sum(1, keepdim=True)  # [rows, 1]
    if gradient:
        work.mul_(scale / total).scatter_add_(1, labels[:, None], torch.full_like(right, -scale))
        logits.copy_(work)
    return (total.log() - right)[:, 0]  # [rows]


def squared_error_torch(predicted: Tensor, target: Tensor, scale: float, gradient: bool
                        ) -> tuple[Tensor, Tensor | None]:
    """Each row's squared error [G], and in float32 its gradient times scale [G, W] or None."""
    wide = torch.promote_types(predicted.dtype, torch.float32)
    difference = predicted.to(wide) - target.to(wide)  # [G, W]
    errors = difference.square().sum(1)  # [G]
    return errors, difference.mul_(2 * scale) if gradient else None


@jit
def cross_entropy_kernel(logits, labels, losses, scale,
                         V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of logits [rows, V]: its loss [rows], and its gradient in place."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows * V may pass 2^31
    logits += row * V
    columns = tl.arange(0, BLOCK)
    # A label outside the vocabulary reads nothing: its loss and gradient become NaN, which a
    # trainer notices. The label's logit is read before the gradient is written over it.
    label = tl.load(labels + row)
    known = (label >= 0) & (label < V)
    right = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)

    peak = float("-inf")  # the largest logit so far
    total = 0.0  # the sum of exp(logit - peak) so far
    for start in range(0, V, BLOCK):
        inside = start + columns < V  # the last block may reach past the row's end
        block = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(block, axis=0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(block - new_peak), axis=0)
        peak = new_peak
    tl.store(losses + row, tl.log(total) + peak - right)

    if GRADIENT:  # a constant when compiled: without gradient there is no second pass
        factor = tl.where(known, scale, float("nan"))
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            block = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
            onehot = tl.where(start + columns == label, 1.0, 0.0)
            slope = (tl.exp(block - peak) / total - onehot) * factor
            tl.store(logits + start + columns, slope, mask=inside)


@jit
def squared_error_kernel(predicted, target, errors, slopes, scale,
                         W: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of predicted and target [G, W]: its error [G], and its slopes [G, W]."""
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, W, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = row * W + column
        inside = column < W
        guess = tl.load(predicted + place, mask=inside, other=0.0).to(tl.float32)
        difference = guess - tl.load(target + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(difference * difference, axis=0)
        if GRADIENT:
            tl.store(slopes + place, difference * (2.0 * scale), mask=inside)
    tl.store(errors + row, total)


def require_triton(tensor: Tensor) -> None:
    """Refuse, in one line, what the kernels cannot do."""
    if not TRITON_AVAILABLE:
        raise RuntimeError('backend "triton" needs Triton: pip install triton (Linux only)')
    if not (tensor.is_cuda or INTERPRETED):
        raise RuntimeError('backend "triton" needs a GPU, or TRITON_INTERPRET=1 from the start')
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f'backend "triton" takes float32 or bfloat16, not {tensor.dtype}')


def cross_entropy_triton_(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
    """Twin of cross_entropy_torch_, for logits whose rows follow each other in memory."""
    require_triton(logits)
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    cross_entropy_kernel[(len(logits),)](
        logits, labels.contiguous(), losses, scale, V=logits.shape[1],
        GRADIENT=gradient, BLOCK=VOCABULARY_BLOCK, num_warps=8)
    return losses


def squared_error_triton(predicted: Tensor, target: Tensor, scale: float, gradient: bool
                         ) -> tuple[Tensor, Tensor | None]:
    """Twin of squared_error_torch: the same shapes."""
    require_triton(predicted)
    predicted, target = predicted.contiguous(), target.contiguous()
    errors = predicted.new_empty(len(predicted), dtype=torch.float32)
    slopes = torch.empty_like(predicted, dtype=torch.float32) if gradient else None
    if len(predicted):  # a launch of no programs is an error
        squared_error_kernel[(len(predicted),)](
            predicted, target, errors, slopes, scale, W=predicted.shape[1],
            GRADIENT=gradient, BLOCK=PATCH_BLOCK)
    return errors, slopes


BACKENDS = {"torch": (cross_entropy_torch_, squared_error_torch),
            "triton": (cross_entropy_triton_, squared_error_triton)}
