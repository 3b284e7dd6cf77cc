"""Does it fit, and how long will it take? `--plan 80` says so without a GPU.

    python train_cpt.py --model FOLDER --plan 80     on one card of 80 GB
    python train_cl.py --model FOLDER --plan 80x8    on eight (under torchrun: on its ranks)

The flags are those of the run; of FOLDER only config.json is read. Nothing is trained,
written or allocated, and all that is printed is computed, not measured.

**What each of W ranks holds.** Of n trained parameters, 16 n / W bytes stay there from
step to step: the weight, its gradient and AdamW's two moments, float32 (FSDP2 divides
them). Frozen weights (`--lora`) cost what their dtype does, and nothing else. While a
block runs, its weights are complete on every rank, in the dtype of the products, and
those of the next block are already on their way; the root, which is all that is in no
block (embedding, head, norms, patch decoder), stays complete from forward to the end of
backward. In backward a block's gradient is complete for a moment too, and float32 while
the ranks add it up. How the rest comes about:

**A dry run.** PyTorch's "meta" device knows the shape and dtype of every tensor, and
keeps no values. So a micro-batch of the true size goes through the true model there,
forward and backward, and a `Ledger` notes when each tensor begins to take memory, and
when nobody holds it any more. No formula for activations has to be kept in step with the
model. For a token in one layer of 3B's decoder (D 2048, MLP 11008, 16 and 2 heads of 128;
bfloat16) it finds that forward keeps, in bytes:

    with --checkpointing    the layer's input                              4,096
    without                 what both norms read, and what they give      16,384
                            q, k (turned), v, attention's result           9,280
                            gate, up, silu(gate) * up                     66,048

72 % of a layer's memory is its MLP's. (It would be 43,000 bytes more without the functions
that model.py fuses on CUDA, which keep their inputs only: see `Fused`.) All of it is what
checkpointing drops, but for one layer at a time. The same run gives the time: of matrix
products their arithmetic, of all else the memory traffic, at the rates that `CARDS`
assumes (a *roofline*: a limit, if nothing waits, and what ranks send each other is hidden
behind what they compute, as with NVLink).

The micro-batch is of the costliest kind: records of the largest image (--max-pixels, else
MoCa's 1,024 tokens) and a few words. What is printed, by kind: *gathered* are the complete
weights of the root and of two blocks, and gradients while they are added up; *batches* those
of this step and the next; *logits* a chunk of them, and the head's gradient; *backward* what
comes and goes there; *reserve* an allowance for what this cannot see: CUDA, NCCL, and gaps
of the allocator. Left out: the host, and loading data.
"""

import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nano_moca import attention, kernels
from nano_moca import model as layers
from nano_moca.attention import Segments, varlen_attention
from nano_moca.batch import MARK, Batch, Record
from nano_moca.config import BASE, Config
from nano_moca.families import load_config
from nano_moca.flags import CommonFlags, Parser
from nano_moca.masking import MaskedBatch, mask_batch, next_token_batch
from nano_moca.processor import Processor
from nano_moca.weights import empty_model, find_checkpoint

GB = 1e9  # a card has a little more than it says
RESERVE = 2 * GB  # on a card: CUDA's context, NCCL's buffers, gaps of the allocator
WORDS = 64  # tokens of text beside an image


# A card of at least so many GB is taken for: its name, FLOP/s of bfloat16 products (two
# thirds of its data sheet's; float32: a tenth), bytes/s of its memory (four fifths).
CARDS = {0: ("RTX 4090", 110e12, 0.8e12), 40: ("A100", 200e12, 1.3e12),
         80: ("H100", 650e12, 2.7e12), 100: ("H200", 650e12, 3.9e12)}


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold."""
    return sum(parameter.numel() for parameter in parameters)


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Their bytes."""
    return sum(parameter.nbytes for parameter in parameters)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- a dry run ------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Inside it every operation is looked at: its arithmetic, and the memory that its
    result takes until nobody holds it."""

    def __init__(self, held: dict[str, float]) -> None:
        """held: bytes that are there already, by kind."""
        super().__init__()
        self.held = Counter(held)
        self.peak = Counter(held)  # the same, when they were the most
        self.known = weakref.WeakSet()  # storages that are counted, or need not be
        self.kind = "activations"  # of what is made now
        self.work: Counter[str] = Counter()  # FLOP of products and of attention; bytes made

    def hold(self, kind: str, amount: float) -> None:
        """From now on so many bytes of a kind are held."""
        self.held[kind] = amount
        if self.held.total() > self.peak.total():
            self.peak = self.held.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        """Run an operation, and note what it costs."""
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        for tensor in results:
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.see(tensor.untyped_storage())

        # [rows, inner] x [inner, columns] takes rows * inner * columns multiplications, and
        # as many additions.
        if func.__name__.startswith(("mm", "addmm")):
            right = [arg for arg in args if isinstance(arg, Tensor)][-1]
            self.work["products"] += 2 * result.numel() * len(right)
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        """Count a result's memory, unless it is known: a view has that of another."""
        if storage not in self.known:
            self.known.add(storage)
            amount = storage.nbytes()
            self.work["made"] += amount
            self.hold(self.kind, self.held[self.kind] + amount)
            weakref.finalize(storage, self.held.subtract, {self.kind: amount})


class Fused(torch.autograd.Function):
    """Stands for an elementwise function of two tensors that is one kernel on a GPU: nothing
    is made but its result, of the first one's shape, and then the gradients."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, linear: bool) -> Tensor:
        """linear: in the first one, which backward then does without."""
        ctx.save_for_backward(None if linear else first, second)
        return torch.empty_like(first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the shapes of both."""
        _, second = ctx.saved_tensors
        to_second = torch.empty_like(second) if ctx.needs_input_grad[1] else None
        return torch.empty_like(grad), to_second, None


# What model.py has fused on CUDA. A rotation is linear.
FUSED = {"rms_norm": lambda x, weight, eps: Fused.apply(x, weight, False),
         "silu_gate": lambda gate, up: Fused.apply(gate, up, False),
         "rotate": lambda x, angles, dtype: Fused.apply(x, angles, True)}


@contextmanager
def pretending(device: str, ledger: Ledger) -> Iterator[None]:
    """Inside it the ledger counts, and tensors on "meta" are taken for those of a device,
    so that the model goes the same ways as there."""

    def flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **_: object) -> Tensor:
        """Which kernel is taken depends on the device; this one is known on "meta"."""
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, is_causal)[0]

    def counted(query: Tensor, key: Tensor, value: Tensor, segments: Segments,
                causal: bool) -> Tensor:
        """A query meets each key of its sequence twice, in a score and in a weighted sum; and
        four times in backward, beside the scores, which are computed again."""
        out = varlen_attention(query, key, value, segments, causal)
        pairs = sum(length**2 for length in segments.lengths)
        flops = 4 * pairs * query[0].numel()
        ledger.work["attention"] += flops
        if out.requires_grad:
            out.register_hook(lambda _: ledger.work.update(attention=2 * flops))
        return out

    # Nothing is compiled, as there are no values to run it on. (The loss has a twin in
    # PyTorch for its kernel, and makes its chunks such that both need as much.)
    fused = FUSED if device == "cuda" else {}
    with (patch.object(Tensor, "is_cuda", device == "cuda", create=True),
          patch.object(kernels, "TRITON_AVAILABLE", False),
          patch.multiple(layers, TRITON_AVAILABLE=False, **fused),
          patch.object(attention, "varlen_attention", counted),
          patch.object(F, "scaled_dot_product_attention", flash),
          patch.object(torch, "autocast", lambda *_, **__: nullcontext()), ledger):
        yield


def follow_shards(model: nn.Module, blocks: list[nn.Module], ledger: Ledger, ranks: int,
                  summed: bool) -> None:
    """Have the ledger note what a rank holds of weights and gradients on the way back.

    blocks: those that FSDP gathers one by one; without FSDP none. summed: earlier passes
    have left their gradients, and new ones are added to them.
    """
    # What is in no block is the root's.
    inside = set(nn.ModuleList(blocks).parameters())
    root = size(set(model.parameters()) - inside)

    def arrived(parameter: nn.Parameter) -> None:
        """A gradient is divided, and added to the sum; the root's at the end."""
        if not blocks or parameter in inside:
            parameter.grad = None
            if not summed:
                part = 4 * parameter.numel() / ranks
                ledger.hold("gradients", ledger.held["gradients"] + part)

    def enter(block: nn.Module) -> None:
        """It and the next block are complete; so is the gradient of the one before, which
        is sent in float32."""
        reduced = size(trained(block)) + 4 * count(trained(block))
        ledger.hold("gathered", root + 2 * size(block.parameters()) + reduced)

    def watch(block: nn.Module, _: tuple, output: Tensor) -> None:
        """Backward enters a block when the gradient of its output is there."""
        if output.requires_grad:
            output.register_hook(lambda _: enter(block))

    for parameter in trained(model):
        parameter.register_post_accumulate_grad_hook(arrived)
    for block in blocks:
        block.register_forward_hook(watch)
        ledger.hold("gathered", root + 2 * size(block.parameters()))  # in forward


def dry_run(model: nn.Module, batch: Batch | MaskedBatch, passes: int, device: str,
            ledger: Ledger) -> Counter[str]:
    """Forward and backward of one of a step's passes over a model on "meta", followed by the
    ledger. Returns the work of forward alone."""
    with pretending(device, ledger):
        # All batches of this step and of the next are there.
        ledger.kind = "batches"
        batch = batch.to("meta")
        ledger.hold("batches", 2 * passes * ledger.held["batches"])

        # Stage 1's logits begin after its patch decoder.
        ledger.kind = "activations"
        if isinstance(batch, MaskedBatch):
            model.patch_decoder.register_forward_hook(lambda *_: setattr(ledger, "kind", "logits"))
            result = sum(model(batch, causal=False))
        else:
            result = model.embed(batch, causal=False, pooling="mean").sum()
        forward = ledger.work.copy()

        ledger.kind = "backward"
        torch.autograd.backward(result)
    return forward


# --- the run that the flags describe --------------------------------------------------


def costly_batch(flags: CommonFlags, config: Config, ranks: int
                 ) -> tuple[Batch | MaskedBatch, int]:
    """What a rank computes at once, a micro-batch or a chunk, of records with the largest
    image and a few words; and how often it does so in a step."""
    # What tokens they are does not matter: the nano base's tokenizer does for all.
    side = config.vision.patch * config.vision.merge  # pixels along an image token
    settings = {"min_pixels": 1, "max_pixels": flags.max_pixels or 1024 * side**2,
                "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    processor = Processor(tokenizer, replace(config, raw={}, vocabulary=10**6), settings)

    # A square of no more image tokens than a record may have.
    area = min(settings["max_pixels"] // side**2, max(1, flags.max_tokens - WORDS))
    length = side * math.isqrt(area)
    record = Record(MARK + " word" * WORDS, [Image.new("RGB", (length, length))])
    encoded = processor.encode(record, min(flags.max_tokens, area + WORDS))
    tokens = len(encoded.tokens)

    # Stage 2: a rank's share of the pairs, in chunks of a budget of tokens.
    if not hasattr(flags, "batch_tokens"):
        records = math.ceil(flags.batch * (2 + flags.hard_negatives) / ranks)
        at_once = min(max(1, flags.chunk // tokens), records) if flags.chunk else records
        return processor.pack([encoded] * at_once), math.ceil(records / at_once)

    # Stage 1: micro-batches of a budget of tokens, masked.
    records = math.ceil(flags.batch_tokens / ranks / flags.accumulate / tokens)
    batch = processor.pack([encoded] * records)
    keys = [(0, number) for number in range(records)]
    image_mask = flags.image_mask if flags.mae_weight else 0.0
    masked = mask_batch(batch, processor, flags.text_mask, image_mask, keys)
    if flags.objective == "next-token":
        masked = next_token_batch(batch, processor)
    return masked, flags.accumulate


@dataclass
class Estimate:
    """What was computed for each rank."""

    model: nn.Module
    batch: Batch  # of one pass: a micro-batch, or a chunk
    passes: int  # in a step
    card: str
    peak: Counter[str]  # bytes by kind
    step_seconds: float


def estimate(flags: CommonFlags, memory: int, ranks: int) -> Estimate:
    """Run one pass of a step without memory or values, and add up what it would need.

    memory: of a card, in GB. MocaError for a config.json that does not serve.
    """
    device = flags.device or "cuda"
    dtype = getattr(torch, flags.dtype or ("bfloat16" if device == "cuda" else "float32"))

    # The model as the scripts build it, but of shapes only; and what goes through it.
    config = load_config(find_checkpoint(flags.model, ("config.json",)))
    vlm = empty_model(config)
    vlm.set_checkpointing(flags.checkpointing)
    if flags.lora:
        from nano_moca.lora import add_adapters

        add_adapters(vlm, flags.lora, dtype)
    batch, passes = costly_batch(flags, config, ranks)
    masked = isinstance(batch, MaskedBatch)
    model = layers.ReconstructionModel(vlm) if masked else vlm

    # What stays from step to step. Parameters are counted here, not when they are used.
    state = 4 * count(trained(model)) / ranks
    ledger = Ledger({"weights": size(model.parameters()) / ranks,
                     "gradients": state if passes > 1 else 0, "moments": 2 * state})
    ledger.known.update(parameter.untyped_storage() for parameter in model.to(dtype).parameters())
    sharded = ranks > 1 or dtype != torch.float32  # as World.sharded
    blocks = [*vlm.visual.blocks, *vlm.language.layers] if sharded else []
    follow_shards(model, blocks, ledger, ranks, passes > 1)

    forward = dry_run(model, batch, passes, device, ledger)

    # At the end the root's gradients are added up and divided. AdamW's step needs nothing
    # more on a GPU, where it is one kernel.
    complete = count(parameter for parameter in trained(model) if parameter.grad is not None)
    ledger.hold("gathered", 4 * complete)
    ledger.hold("gradients", ledger.held["gradients"] + 4 * complete / ranks)

    # Time. The gradient cache embeds all once more before. Flash attention reaches half the
    # rate of other products; what is made is written once and read once. AdamW reads four
    # numbers a parameter and writes three.
    work = ledger.work
    if passes > 1 and not masked:
        work += forward
    card, rate, traffic = [card for least, card in CARDS.items() if least <= memory][-1]
    rate /= 1 if dtype == torch.bfloat16 else 10
    seconds = passes * (work["products"] + 2 * work["attention"]) / rate
    seconds += (passes * 2 * work["made"] + 7 * state) / traffic
    return Estimate(model, batch.batch if masked else batch, passes, card, ledger.peak, seconds)


def print_estimate(flags: CommonFlags) -> None:
    """Print what `--plan` asks for: 80, or 80x8 for eight cards. What is neither ends the
    program with one line and exit code 2."""
    match = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,4}))?", flags.plan)
    if match is None:
        Parser().error(f"--plan {flags.plan} is not the GB of a card, as 80, or 80x8 for eight")
    memory = int(match[1])
    ranks = int(match[2] or os.environ.get("WORLD_SIZE", "1"))

    # Under torchrun every rank comes here.
    if os.environ.get("RANK", "0") != "0":
        return
    found = estimate(flags, memory, ranks)
    print(f"computed, not measured, for {ranks} x {memory} GB, taken for {found.card}")

    # What is in the model, and goes through it at once.
    print(f"{count(found.model.parameters()):,} parameters, "
          f"{count(trained(found.model)):,} of them trained")
    print(f"{found.passes} pass(es) a step on each rank, of {len(found.batch.lengths)} records: "
          f"{len(found.batch.tokens):,} tokens, {len(found.batch.image_index):,} of images")

    # What that takes. The reserve is the card's.
    print("GB on each rank, at the moment when they are the most:")
    held = found.peak | {"reserve": RESERVE}
    for kind, amount in held.items():
        print(f"{amount / GB:9.2f}  {kind}")
    total = sum(held.values()) / GB
    advice = "fits" if total <= memory else (
        "DOES NOT FIT. What helps: --checkpointing, a larger --accumulate or a smaller --chunk, "
        "a smaller --max-pixels, --lora 16, more cards")
    print(f"{total:9.2f}  in all, of {memory}: {advice}")

    # Time.
    minutes = found.step_seconds / 60
    print(f"minutes: {minutes:.2g} a step, {minutes * flags.steps:,.0f} for {flags.steps:,} steps, "
          "if nothing waits")
