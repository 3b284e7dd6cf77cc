"""The losses of both stages.

Stage 1 restores masked tokens and patches: cross entropy, fused with the
output layer, and squared error. Stage 2 pulls pairs together: InfoNCE over the
batch of all ranks.

**Why logits eat memory.** The output layer compares every masked token with all V =
151,936 words of Qwen's vocabulary. For R = 8,192 tokens that is 5 GB of float32
logits; cross entropy keeps their log-softmax for the backward pass, and the
gradients of both come on top of it.

**Why none of it need be kept.** Backward begins at the loss, so the gradient that
will arrive there is one number: 1, or the weight that the caller gives the loss. And
the gradient of cross entropy with respect to a row of logits is softmax - onehot,
known as soon as the logits are. So the forward pass can finish the backward pass
there and then, for one chunk of tokens after the other:

    logits = hidden_chunk @ head.T        turned in place into (softmax - onehot) / count
    grad_hidden_chunk = logits @ head
    grad_head += logits.T @ hidden_chunk

and forget the logits. What stays are the two gradients; backward multiplies them by the
number that arrives. Peak memory falls from about three times R x V to one chunk (and
the head's gradient, which is held in any case), for no extra matmul. What happens to a
chunk's logits between the matmuls is in kernels.py, once in PyTorch and once in Triton.

Precision: matmuls in the model's dtype, softmax and errors in float32. The gradient
of the head is a sum over chunks: one float32 buffer, rounded to the model's dtype
once, at the end of backward.

Where others differ: the released code runs its fused loss (Liger-Kernel's) over all
positions, although only masked ones (40 percent of the text, no image) count; here
the caller passes the masked ones only. Left out: derivatives of the gradient,
ignored labels, label smoothing, a bias in the head, float16.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_moca import kernels

# A chunk's logits may cost this, or half of the head's float32 gradient, whichever is
# more. The second rule makes the chunks of a big model long (D/2 tokens in float32, D
# in bfloat16 on a GPU), since each chunk reads and writes all of that gradient.
CHUNK_BYTES = 64 * 2**20


def masked_reconstruction_loss(hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor,
        target: Tensor, backend: str = "auto", mlm_count: float | None = None,
        mae_count: float | None = None) -> tuple[Tensor, Tensor]:
    """Both losses of stage 1 (MoCa, section 3.1), as scalars: cross entropy per token,
    squared error per pixel value. plain_masked_reconstruction_loss, below, says the
    same without a trick.

    hidden     [R, D]  the decoder's hidden states at the masked tokens
    head       [V, D]  the output embedding
    labels     [R] int64, the tokens that were masked (or, in the control, the next ones)
    predicted  [G, 4704]  the MAE decoder's output at the masked groups
    target     [G, 4704]  their pixels; gets no gradient
    backend    "torch", "triton", or "auto": Triton on a GPU, where it is installed

    mlm_count, mae_count: what the sums are divided by, in place of R and G: the
    number of masked tokens and groups in the whole step, when this call sees only one
    rank's or one micro-batch's share. R or G may be 0: a loss over nothing is 0, and
    so are its gradients. A label outside the vocabulary is an error on the CPU. On a
    GPU, where looking at it would hold up the queue of kernels, the Triton kernel
    makes the loss NaN and PyTorch's gather stops with a device-side assertion.
    """
    check_inputs(hidden, head, labels, predicted, target)
    if backend == "auto":
        backend = "triton" if hidden.is_cuda and kernels.TRITON_AVAILABLE else "torch"
    if backend not in kernels.BACKENDS:
        raise ValueError(f'backend must be "auto", "torch" or "triton", not {backend!r}')
    mlm_scale = scale_of(len(hidden), mlm_count)
    mae_scale = scale_of(len(predicted), mae_count) / predicted.shape[1]

    # Text. The precisions inside are chosen by hand, so a caller's autocast stays
    # outside. Inside a Function gradients are always disabled: whether the caller has
    # them enabled has to be asked here.
    with torch.autocast(hidden.device.type, enabled=False):
        mlm = FusedCrossEntropy.apply(
            hidden, head, labels, backend, mlm_scale, torch.is_grad_enabled())

    # Images. The errors are small beside the logits (59 MB a copy for 3,125
    # masked groups), so they need no trick. Summed in float32, per group and then
    # over the groups.
    wide = torch.promote_types(predicted.dtype, torch.float32)
    difference = predicted.to(wide) - target.detach().to(wide)  # [G, 4704]
    mae = difference.square().sum(1).sum() * mae_scale
    return mlm, mae


def plain_masked_reconstruction_loss(hidden: Tensor, head: Tensor, labels: Tensor,
        predicted: Tensor, target: Tensor, backend: str = "plain",
        mlm_count: float | None = None, mae_count: float | None = None) -> tuple[Tensor, Tensor]:
    """The plain twin: the same losses as one would write them down, with all logits
    at once. It takes the same arguments; there is one backend."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden @ head.to(hidden.dtype).T  # [R, V]
    mlm = F.cross_entropy(logits.to(wide), labels, reduction="sum")

    difference = predicted.to(wide) - target.detach().to(wide)  # [G, 4704]
    mae = difference.square().sum()

    mlm = mlm * scale_of(len(hidden), mlm_count)
    return mlm, mae * scale_of(len(predicted), mae_count) / predicted.shape[1]


def check_inputs(hidden: Tensor, head: Tensor, labels: Tensor, predicted: Tensor,
                 target: Tensor) -> None:
    """ValueError for shapes and dtypes that would give a wrong loss, or a strange error."""
    tokens_fit = head.shape[1:] == hidden.shape[1:] and labels.shape == hidden.shape[:1]
    pixels_fit = predicted.ndim == 2 and target.shape == predicted.shape
    if not (hidden.ndim == 2 and tokens_fit and pixels_fit):
        shapes = [list(x.shape) for x in (hidden, head, labels, predicted, target)]
        raise ValueError(f"expected shapes [R, D], [V, D], [R], [G, pixels] twice, not {shapes}")

    # In float16 most of (softmax - onehot) / count would round to zero.
    if labels.dtype != torch.int64 or torch.float16 in (hidden.dtype, predicted.dtype):
        raise ValueError(f"labels must be int64 (they are {labels.dtype}), nothing float16")

    # On a GPU this comparison would wait for all kernels in the queue.
    if labels.device.type == "cpu" and ((labels < 0) | (labels >= len(head))).any():
        raise ValueError(f"labels must lie between 0 and {len(head) - 1}, the last word's id")


def scale_of(terms: int, count: float | None) -> float:
    """What a sum of `terms` terms is multiplied by: 1 / count; without a count 1 /
    terms, for the mean. A sum over nothing is 0, whatever it is multiplied by."""
    if terms and count is not None and not count > 0:
        raise ValueError(f"a sum over {terms} rows cannot be divided by a count of {count}")
    return 1 / (count or terms or 1)


class FusedCrossEntropy(torch.autograd.Function):
    """Output layer, cross entropy and their gradients together in forward, chunk by
    chunk; backward only multiplies by what arrives."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, backend: str,
                scale: float, grad_enabled: bool) -> Tensor:
        R, D = hidden.shape
        V = len(head)
        cross_entropy_ = kernels.BACKENDS[backend]
        weight = head.to(hidden.dtype)  # [V, D]
        wide = torch.promote_types(hidden.dtype, torch.float32)

        # Where gradients go. `needs_input_grad` is true of a parameter even under no_grad.
        to_hidden = ctx.needs_input_grad[0] and grad_enabled
        to_head = ctx.needs_input_grad[1] and grad_enabled
        losses = hidden.new_empty(R, dtype=wide)
        grad_hidden = hidden.new_empty(R, D, dtype=wide) if to_hidden else None
        grad_head = head.new_zeros(V, D, dtype=wide) if to_head else None

        # How many tokens a chunk takes, by the larger of the two rules of CHUNK_BYTES.
        # PyTorch's softmax of bfloat16 logits works on a copy of 4 more bytes a logit.
        copied = backend == "torch" and hidden.dtype != wide
        logit_bytes = hidden.itemsize + (4 if copied else 0)
        by_memory = CHUNK_BYTES // (V * logit_bytes)
        by_head = D * wide.itemsize // (2 * logit_bytes)
        chunk_size = max(by_memory, by_head, 1)
        buffer = hidden.new_empty(min(R, chunk_size), V)  # all the logits there ever are

        for start in range(0, R, chunk_size):
            chunk = slice(start, min(R, start + chunk_size))
            hidden_chunk = hidden[chunk]  # [r, D]

            # Logits, and in their place the gradient of the loss with respect to them.
            logits = buffer[: len(hidden_chunk)]  # [r, V]
            torch.mm(hidden_chunk, weight.T, out=logits)
            losses[chunk] = cross_entropy_(logits, labels[chunk], scale, to_hidden or to_head)

            # From there to the inputs of the matmul.
            if to_hidden:
                grad_hidden[chunk] = logits @ weight  # [r, D]
            if to_head:
                add_product_(grad_head, logits.T, hidden_chunk)  # [V, D]

        ctx.save_for_backward(grad_hidden, grad_head)
        return losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a saved tensor that was changed cannot be read again, so
        # that a second backward raises. Autograd rounds what is returned to the
        # dtype of the input.
        grads = ctx.saved_tensors
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_loss)
        return *grads, None, None, None, None


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` may be wider: [V, D] += [V, r] @ [r, D]."""
    # Tensor cores multiply bfloat16 factors and add them up in float32.
    if total.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


# --- stage 2 --------------------------------------------------------------------------


class Gather(torch.autograd.Function):
    """The embeddings of all ranks in one matrix, differentiable.

    Forward: each rank writes its rows into zeros, and the matrices are summed.
    Backward: the gradients that all ranks have for all rows are summed, and each rank
    keeps those of its own rows. Without the second half a positive would get no
    gradient from other ranks' queries. (The released code, src/model.py:282-288,
    gathers without gradient but computes the whole loss on every rank: averaged over W
    ranks, its gradient is 1/W of this one.)
    """

    @staticmethod
    def forward(ctx, local: Tensor, local_index: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(local_index)
        zeros = local.new_zeros(total, local.shape[1])
        gathered = zeros.index_copy(0, local_index, local)  # [total, D]
        if dist.is_initialized():
            dist.all_reduce(gathered)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (local_index,) = ctx.saved_tensors
        grad = grad.clone()  # [total, D]; all_reduce changes it in place
        if dist.is_initialized():
            dist.all_reduce(grad)
        return grad[local_index], None, None


def gather(local: Tensor, local_index: Tensor, total: int) -> Tensor:
    """The matrix [total, D], on every rank. local [n, D]: this rank's rows of it, which
    are number `local_index` [n]."""
    return Gather.apply(local, local_index, total)


def info_nce(queries: Tensor, positives: Tensor, negatives: Tensor, local_index: Tensor,
             excluded: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """This rank's share of the contrastive loss (MoCa, section 3.2; released code:
    src/model.py:265-278), and how many of its queries were answered correctly.

    queries      [n, D]  this rank's, unit length
    positives    [n, D]  theirs
    negatives    [M, D]  all hard negatives of these queries
    local_index  [n] int64, which of the step's B pairs these are
    excluded     [n, B + M] bool, candidates that a query is not compared with

    A query's candidates are the positives of all B pairs, gathered from all ranks,
    and its own hard negatives. (`excluded` takes away those of this rank's other
    queries, and whatever equals its own positive: see batches.excluded_candidates.)
    The loss is the cross entropy of telling its positive among them by cosine /
    temperature, in float32. The shares of all ranks add up to the mean over B
    pairs, and so do their gradients. A query is answered correctly if its positive
    is nearer than all others: a tie is wrong.
    """
    M = len(negatives)
    B = excluded.shape[1] - M

    # In-batch negatives: the positives of all other pairs, whichever rank has them.
    all_positives = gather(positives.float(), local_index, B)  # [B, D]
    candidates = torch.cat([all_positives, negatives.float()])  # [B + M, D]

    # Cosines, since all vectors have unit length; an excluded candidate gets no weight.
    logits = queries.float() @ candidates.T / temperature  # [n, B + M]
    logits = logits.masked_fill(excluded, float("-inf"))

    # Query number i of the step has candidate number i as its positive.
    loss = F.cross_entropy(logits, local_index, reduction="sum") / B
    own = logits.gather(1, local_index[:, None])  # [n, 1]
    others = logits.scatter(1, local_index[:, None], float("-inf"))  # [n, B + M]
    correct = (own > others).all(1).sum()
    return loss, correct
