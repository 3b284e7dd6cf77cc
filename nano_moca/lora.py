"""Adapters (LoRA, arXiv 2106.09685): train a small correction beside frozen weights.

Full training keeps 16 bytes for each weight: the weight, its gradient and AdamW's two
moments, 4 bytes each. For 3B that is 60 GB. But what training adds to a weight matrix
W [out, in] is close to a matrix of low rank, so it can be written as a product of two
narrow ones:

    y = W x + b + (alpha / a) B A x        A [a, in], B [out, a], a = --lora

W and b are frozen. They need no gradient and no moments, nor a float32 copy: they lie in
the dtype of the matrix products, bfloat16 on CUDA. Only A and B are trained, float32 as
all that is trained. There is an adapter beside each linear layer of the decoder's layers
(q, k, v, o, gate, up, down); all else is frozen: vision tower, embeddings, norms, head.

    Qwen2.5-VL, a = 16          3B         7B
    parameters of adapters      30 M       40 M
    bytes for what is trained   0.5 GB     0.6 GB     (16 each)
    frozen weights              7.5 GB     16.6 GB    (2 each)
    instead of                  60 GB      133 GB     (16 each)

What it does not save: activations, since gradients still pass through every layer on the
way down (only the vision tower, with nothing to train in or below it, keeps none and has
no backward pass); the complete weights of the blocks at work; much time, for of the three
matrix products of a layer (forward, gradient of x, gradient of W) only the third one goes.
Stage 1's patch decoder is new, and thrown away: it is trained in full, and costs another
1.4 GB (3B) or 4 GB (7B).

A begins random, such that A x is of x's size, and B as zero, so that the first step sees
the model as it was. alpha is 32 whatever a is, as the authors advise: the pull of the
learning rate on W then changes little with a, and for the usual a = 16 the factor is 2.
Adapters want a higher learning rate. For billions of weights, ten times that of full
training is usual (2e-5 in stage 1, 2e-4 in stage 2). In the miniature, whose rates are
high as they are, that was too much in the few runs tried so far (RESULTS.md).

When the model is saved the adapters are merged, W + (alpha / a) B A, into a folder like
any other. That sum is taken in float32 and rounded once to the dtype of W: of bfloat16
weights, 2^-9 of each is lost, and with it a part of a small correction.

**MoCa trains all weights in both stages.** This is for those who have one GPU. The
embedding of a mask token that the checkpoint lacks is frozen too, and stays what it
began as, the mean of all others: the first layer's adapters learn what to make of it.

The authors call the width a the rank r; here a *rank* is a process. Left out: dropout
before A, adapters in the vision tower, several adapters for one model, 4-bit weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nano_moca.distributed import World, copy_into_shard, local_part
from nano_moca.files import MocaError
from nano_moca.model import VLM

ALPHA = 32.0


class AdaptedLinear(nn.Linear):
    """A linear layer whose weights are frozen, and the adapter beside it."""

    def __init__(self, linear: nn.Linear, width: int) -> None:
        """linear: gives its weights, which keep their names. width: a."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = ALPHA / width
        self.lora_a = nn.Parameter(torch.empty(width, self.in_features, device="meta"))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, width, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        narrow = self.scale * F.linear(x, self.lora_a)  # [..., a]
        return super().forward(x) + F.linear(narrow, self.lora_b)

    def begin(self, generator: torch.Generator) -> None:
        """The first values. Every rank draws all of A, and keeps its part."""
        shape = self.lora_a.shape
        drawn = torch.randn(shape, generator=generator) * self.in_features**-0.5
        copy_into_shard(self.lora_a, drawn)
        copy_into_shard(self.lora_b, torch.zeros(self.lora_b.shape))

    @torch.no_grad()
    def merge(self) -> None:
        """Move the correction into W: the layer computes the same, and B is zero again."""
        # Of W and of B a rank has the same rows; it needs all of A.
        a = self.lora_a.full_tensor() if isinstance(self.lora_a, DTensor) else self.lora_a
        b = local_part(self.lora_b)
        weight = local_part(self.weight)
        weight.copy_(weight.float() + self.scale * (b @ a))  # rounded here, once
        b.zero_()


def add_adapters(vlm: VLM, width: int, dtype: torch.dtype) -> None:
    """Freeze all weights of a model, and put an adapter beside each linear layer of its
    decoder's layers.

    vlm: still without memory, on the meta device. width: a. dtype: of what is frozen.
    """
    vlm.to(dtype).requires_grad_(False)
    for module in list(vlm.language.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, AdaptedLinear(child, width))


def begin(model: nn.Module, seed: int, world: World, saved: dict | None) -> float:
    """Give the adapters of a new run their first values; a resumed run has them already.

    saved: the checkpoint's state of a resumed run. Its checkpoint holds only what is
    trained, and --model the rest. MocaError if that is not what it was: then the run
    would be neither the old one nor a new one. Returns what `saved` will have to agree
    with, under "data" and "frozen".
    """
    # The sum of all frozen bits, read as integers, is the same on any number of ranks. It
    # is taken in bfloat16, so that --device may change what is frozen to that.
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            bits = local_part(parameter).bfloat16().view(torch.int16)
            total += bits.sum(dtype=torch.int64).item()
    (frozen,) = world.total(total).tolist()
    if saved is not None and saved["data"].get("frozen") != frozen:
        raise MocaError("--resume: the weights in --model are not those that this run began "
                        "with: give the same checkpoint, or start anew without --resume")

    # One generator for all, in the order of the layers.
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and saved is None:
            module.begin(generator)
    return frozen


def merge_adapters(model: nn.Module) -> None:
    """Merge every adapter of a model into its layer; all ranks take part."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.merge()
