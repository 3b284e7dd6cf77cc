"""The losses of both stages.

Stage 1 restores masked words and patches: one fused function. Stage 2 pulls pairs together: InfoNCE
over the batch of all ranks, and the gradient cache, at the end of this file.

**Why logits eat memory.** The output layer compares every masked token with all V = 151,936 words
of Qwen's vocabulary. For R = 8,192 tokens that is 5 GB of float32 logits; cross entropy keeps their
log-softmax for the backward pass, and the gradients of both come on top of it.

**Why none of it need be kept.** Backward begins at the loss, so the gradient that will arrive there
is one number: 1, or the weight that the caller gives the loss. And the gradient of cross entropy
with respect to a row of logits is softmax - onehot, known as soon as the logits are. So the forward
pass can finish the backward pass there and then, for one chunk of rows after the other:

    logits = hidden_chunk @ head.T        turned in place into losses and (softmax - onehot) / count
    grad_hidden_chunk = logits @ head
    grad_head += logits.T @ hidden_chunk

and forget the logits. What stays are the two gradients; backward multiplies them by the number that
arrives. Peak memory falls from about three times R x V to one chunk, for no extra matmul. What
happens to a chunk's logits between the matmuls is in kernels.py, once in PyTorch and once in
Triton.

Precision: matmuls in the model's dtype, softmax and errors in float32. The gradient of the head is
a sum over chunks: one float32 buffer, rounded to the model's dtype once, at the end of backward.

Where others differ: the paper's released code runs its fused loss (Liger-Kernel's) over all
positions, although only masked ones (40 percent of the text, no image) count; here the caller
passes the masked rows only. Left out: derivatives of the gradient, ignored labels, label smoothing,
a bias in the head, float16.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_moca import kernels

# A chunk's logits cost no more than this, or than half of the head's float32 gradient, which is
# held in any case. The second rule makes the chunks of a big model long (D/2 rows in float32, D in
# bfloat16 on a GPU), for each of them reads and writes the whole of that gradient.
CHUNK_BYTES = 64 * 2**20


def masked_reconstruction_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor, target: Tensor,
    backend: str = "auto", mlm_count: float | None = None, mae_count: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Both losses of stage 1, as scalars: cross entropy per token, squared error per pixel value.

    hidden     [R, D]  the decoder's hidden states at the masked tokens
    head       [V, D]  the output embedding
    labels     [R] int64, the tokens that were masked
    predicted  [G, W]  the MAE decoder's output at the masked groups (W = 4704)
    target     [G, W]  their pixels; gets no gradient
    backend    "torch", "triton", or "auto": Triton on a GPU, where it is installed

    mlm_count, mae_count: what the sums are divided by, in place of R and G: the number of masked
    tokens and groups in the whole batch, when this call sees only one rank's or one micro-batch's
    share. R or G may be 0: a loss over nothing is 0, and so are its gradients. The caller may
    weight and add the two losses, and run backward once, through both together. A label outside the
    vocabulary is an error on the CPU. On a GPU, where looking at it would hold up the queue of
    kernels, the Triton kernel makes the loss NaN and PyTorch's gather stops with a device-side
    assertion.
    """
    if (hidden.ndim != 2 or hidden.shape[1:] != head.shape[1:] or labels.shape != hidden.shape[:1]
            or predicted.ndim != 2 or predicted.shape != target.shape):
        shapes = ", ".join(str([*x.shape]) for x in (hidden, head, labels, predicted, target))
        raise ValueError(f"expected shapes [R, D], [V, D], [R], [G, W], [G, W], not {shapes}")
    # In float16 most of (softmax - onehot) / count would round to zero.
    if labels.dtype != torch.int64 or torch.float16 in (hidden.dtype, predicted.dtype):
        raise ValueError(f"labels must be int64 (they are {labels.dtype}), nothing float16")
    if labels.device.type == "cpu" and ((labels < 0) | (labels >= len(head))).any():
        raise ValueError(f"labels must lie between 0 and {len(head) - 1}, the last word's id")
    if backend == "auto":
        backend = "triton" if hidden.is_cuda and kernels.TRITON_AVAILABLE else "torch"
    if backend not in kernels.BACKENDS:
        raise ValueError(f'backend must be "auto", "torch" or "triton", not {backend!r}')
    mlm_scale = _scale(len(hidden), mlm_count)
    mae_scale = _scale(len(predicted), mae_count) / predicted.shape[1]
    # Whether gradients are enabled has to be asked here: inside a Function they never are. The
    # precisions are chosen by hand inside, so a caller's autocast stays outside.
    with torch.autocast(hidden.device.type, enabled=False):
        return _MaskedReconstruction.apply(hidden, head, labels, predicted, target, backend,
                                           mlm_scale, mae_scale, torch.is_grad_enabled())


def plain_masked_reconstruction_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor, target: Tensor,
    backend: str = "plain", mlm_count: float | None = None, mae_count: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain twin: the same losses as one would write them down, with all logits at once."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ head.to(hidden.dtype).T).to(wide)  # [R, V]
    mlm = F.cross_entropy(logits, labels, reduction="sum")
    mae = (predicted.to(wide) - target.detach().to(wide)).square().sum()
    return (mlm * _scale(len(hidden), mlm_count),
            mae * _scale(len(predicted), mae_count) / predicted.shape[1])


def _scale(rows: int, count: float | None) -> float:
    """What turns a sum over rows into a mean; 1 for a sum over nothing."""
    if rows and count is not None and not count > 0:
        raise ValueError(f"a sum over {rows} rows cannot be divided by a count of {count}")
    return 1 / (count or rows or 1)


class _MaskedReconstruction(torch.autograd.Function):
    """Losses and gradients together in forward; backward only multiplies by what arrives."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor,
                target: Tensor, backend: str, mlm_scale: float, mae_scale: float, enabled: bool
                ) -> tuple[Tensor, Tensor]:
        # Where gradients go. needs_input_grad is true of a parameter even where they are disabled.
        to_hidden, to_head, _, to_predicted = [x and enabled for x in ctx.needs_input_grad[:4]]
        cross_entropy_, squared_error = kernels.BACKENDS[backend]
        (R, D), V = hidden.shape, len(head)
        weight = head.to(hidden.dtype)  # [V, D]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(R, dtype=wide)
        grad_hidden = hidden.new_empty(R, D, dtype=wide) if to_hidden else None
        grad_head = head.new_zeros(V, D, dtype=wide) if to_head else None

        # PyTorch's softmax of bfloat16 logits works on a float32 copy; the kernel needs none.
        cell = hidden.itemsize + (4 if backend == "torch" and hidden.dtype != wide else 0)  # bytes
        rows = max(CHUNK_BYTES // (V * cell), D * wide.itemsize // (2 * cell), 1)
        buffer = hidden.new_empty(min(R, rows), V)  # all the logits there ever are
        for start in range(0, R, rows):
            chunk = slice(start, min(R, start + rows))
            tokens, logits = hidden[chunk], buffer[: chunk.stop - start]  # [rows, D], [rows, V]
            torch.mm(tokens, weight.T, out=logits)
            losses[chunk] = cross_entropy_(logits, labels[chunk], mlm_scale, to_hidden or to_head)
            if to_hidden:
                grad_hidden[chunk] = logits @ weight  # [rows, D]
            if to_head:
                _add_product_(grad_head, logits.T, tokens)  # [V, D]
        errors, grad_predicted = squared_error(predicted, target, mae_scale, to_predicted)
        ctx.save_for_backward(grad_hidden, grad_head, grad_predicted)
        return losses.sum() * mlm_scale, errors.sum() * mae_scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mlm: Tensor, grad_mae: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a saved tensor that was changed cannot be read again, so that a second backward
        # raises. Autograd itself rounds what is returned to the dtype of the input.
        grads = ctx.saved_tensors
        for grad, factor in zip(grads, (grad_mlm, grad_mlm, grad_mae)):
            if grad is not None:
                grad.mul_(factor)
        grad_hidden, grad_head, grad_predicted = grads
        return grad_hidden, grad_head, None, grad_predicted, None, None, None, None, None


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` may be wider: [V, D] += [V, rows] @ [rows, D]."""
    if total.is_cuda and total.dtype != left.dtype:  # tensor cores: bfloat16 factors, float32 sums
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


# --- stage 2 -------------------------------------------------------------------------------------

class _Gather(torch.autograd.Function):
    """All ranks' rows in one matrix, differentiable.

    Forward: each rank writes its rows into zeros, and the matrices are summed. Backward: the
    gradients that all ranks have for all rows are summed, and each rank keeps its own rows.
    (Without the second half a positive would get no gradient from other ranks' queries. The
    released code gathers without gradient but computes the whole loss on every rank: averaged over
    W ranks, its gradient is 1/W of this one.)
    """

    @staticmethod
    def forward(ctx, mine: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        whole = mine.new_zeros(total, mine.shape[1]).index_copy(0, rows, mine)
        if dist.is_initialized():
            dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), grad = ctx.saved_tensors, grad.clone()
        if dist.is_initialized():
            dist.all_reduce(grad)
        return grad[rows], None, None


def gather(mine: Tensor, rows: Tensor, total: int) -> Tensor:
    """mine [n, D], which stand in `rows` [n] of the whole -> the whole [total, D] on every rank."""
    return _Gather.apply(mine, rows, total)


def info_nce(queries: Tensor, positives: Tensor, negatives: Tensor, mine: Tensor,
             forbidden: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """This rank's share of the contrastive loss (MoCa, section 3.2), and how many queries were
    right.

    queries    [n, D]  this rank's, unit length
    positives  [n, D]  theirs
    negatives  [M, D]  all hard negatives of these queries
    mine       [n] int64, which of the batch's B pairs these are
    forbidden  [n, B + M] bool, candidates that a query is not compared with

    A query's candidates are the positives of the whole batch, gathered from all ranks, and its own
    hard negatives; the loss is the cross entropy of telling its positive among them by cosine /
    temperature, in float32. The shares of all ranks add up to the mean over B pairs, and so do
    their gradients. A query is right if its positive is nearer than all others: a tie is wrong.
    """
    B = forbidden.shape[1] - len(negatives)
    candidates = torch.cat([gather(positives.float(), mine, B), negatives.float()])  # [B + M, D]
    logits = queries.float() @ candidates.T / temperature  # [n, B + M]
    logits = logits.masked_fill(forbidden, float("-inf"))
    loss = F.cross_entropy(logits, mine, reduction="sum") / B
    own = logits.gather(1, mine[:, None])  # [n, 1]
    others = logits.scatter(1, mine[:, None], float("-inf"))  # [n, B + M]
    return loss, (own > others).all(1).sum()


def backward_through_cache(embed: Callable[[list], Tensor], chunks: list[list],
                           loss: Callable[[Tensor], Tensor]) -> None:
    """Backward through loss(embed(everything)) with one chunk's activations at a time (GradCache).

    The loss needs all embeddings at once, and its gradient at each of them; but what lies below an
    embedding needs nothing of the others. So: embed all chunks without a graph [M, D]; take the
    loss and its gradient [M, D]; then embed each chunk again, now with a graph, and go on backward
    from that gradient. Twice the forward passes, for the memory of one chunk. One chunk alone
    needs no cache.
    """
    if len(chunks) == 1:
        loss(embed(chunks[0])).backward()
        return
    with torch.no_grad():
        vectors = torch.cat([embed(chunk) for chunk in chunks])  # [M, D]
    loss(vectors.requires_grad_()).backward()
    for chunk, grad in zip(chunks, vectors.grad.split([len(c) for c in chunks]), strict=True):
        (embed(chunk) * grad).sum().backward()
