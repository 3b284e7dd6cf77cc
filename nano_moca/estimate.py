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
forward and backward, and a `Ledger` notes when each tensor begins to take
memory, and when nobody holds it any more. No formula for activations has to be kept in
step with the model. For a token in one layer of 3B's decoder (D 2048, MLP 11008, 16 and 2
heads of 128; bfloat16) it finds that forward keeps, in bytes:

    with --checkpointing    the layer's input                         2 D =   4,096
    without                 both norms: input in float32, and
                            what is scaled                         2 x 8 D ~ 33,000
                            q, k (turned), v, attention's result            16,000
                            gate, silu(gate), up, their product             88,000

Two thirds of a layer's memory are its MLP's. All of it is what checkpointing drops, but for
one layer at a time. The same run gives the time: of matrix products their arithmetic, of
all else the memory traffic, at the rates that `CARDS` assumes (a *roofline*: a limit, if
nothing waits).

The micro-batch is of the costliest kind: records of the largest image (--max-pixels, else
MoCa's 1,024 tokens) and a few words. CUDA, NCCL and gaps of the allocator take memory that
this cannot see: an allowance stands for it (`RESERVE`). Left out: the host, loading data.
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

from nano_moca import kernels
from nano_moca.batch import MARK, Batch, Record
from nano_moca.config import BASE, Config
from nano_moca.families import load_config
from nano_moca.flags import CommonFlags, Parser
from nano_moca.masking import mask_batch, next_token_batch
from nano_moca.model import ReconstructionModel
from nano_moca.processor import Processor
from nano_moca.weights import empty_model, find_checkpoint

GB = 1e9  # a card has a little more than it says
RESERVE = 2 * GB  # on a card: CUDA's context, NCCL's buffers, gaps of the allocator
WORDS = 64  # tokens of text beside an image

# A card of at least so many GB is taken for: its name, FLOP/s of bfloat16 products (two
# thirds of its data sheet's; float32 a tenth), bytes/s of memory (four fifths), and of wire.
CARDS = {0: ("RTX 4090", 110e12, 0.8e12, 20e9), 40: ("A100", 200e12, 1.3e12, 200e9),
         80: ("H100", 650e12, 2.7e12, 350e9), 100: ("H200", 650e12, 3.9e12, 350e9)}

# What bytes are held for.
KINDS = {
    "weights": "float32 (frozen ones in their dtype), divided among the ranks",
    "gradients": "float32, divided, summed over the passes of a step",
    "moments": "AdamW's two, float32, divided",
    "gathered": "complete weights: the root's, those of this block and the next",
    "reduced": "a complete gradient, while the ranks add it up",
    "kept": "what forward keeps for backward",
    "loss": "a chunk's logits, and the head's gradient in float32",
    "working": "what comes and goes in backward",
    "reserve": "CUDA, NCCL, allocator: assumed"}


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold."""
    return sum(parameter.numel() for parameter in parameters)


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Their bytes."""
    return sum(parameter.nbytes for parameter in parameters)


class Ledger(TorchDispatchMode):
    """Inside it every operation is looked at: its arithmetic, and the memory that its
    result takes until nobody holds it."""

    def __init__(self, held: dict[str, float]) -> None:
        """held: bytes that are there already, by kind."""
        super().__init__()
        self.held = Counter(held)
        self.peak = Counter(held)  # the same, when they were the most
        self.known: set[int] = set()  # storages that are counted, or need not be
        self.kind = "kept"  # of what is made now
        self.flops = 0.0
        self.made = 0.0  # bytes

    def hold(self, kind: str, amount: float) -> None:
        """From now on so many bytes of a kind are held."""
        self.held[kind] = amount
        if self.held.total() > self.peak.total():
            self.peak = self.held.copy()

    def drop(self, key: int, kind: str, amount: int) -> None:
        """A storage is gone."""
        self.known.discard(key)
        self.held[kind] -= amount

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        """Run an operation, and note what it costs."""
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        results = [tensor for tensor in results if isinstance(tensor, Tensor) and tensor.is_meta]

        # A view has the storage of another tensor, which is known.
        for tensor in results:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.known.add(key)
                self.made += storage.nbytes()
                self.hold(self.kind, self.held[self.kind] + storage.nbytes())
                weakref.finalize(storage, self.drop, key, self.kind, storage.nbytes())

        # A product [rows, inner] x [inner, columns] multiplies and adds rows * inner * columns
        # times. In attention a query meets each key of its sequence twice, in a score and
        # in a weighted sum; and five times in backward, half of them at half the rate.
        name = func.__name__
        if name.startswith(("mm", "addmm")):
            inner = [arg for arg in args if isinstance(arg, Tensor)][-1].shape[0]
            self.flops += 2.0 * results[0].numel() * inner
        elif "varlen_attn" in name:
            longest = next(arg for arg in args if isinstance(arg, int))
            products = 5 if "backward" in name else 2
            self.flops += 2 * 2.0 * products * results[0].numel() * longest
        return result


@contextmanager
def pretending(device: str, ledger: Ledger) -> Iterator[None]:
    """Inside it the ledger counts, and tensors on "meta" are taken for those of a device,
    so that the model goes the same ways as there."""

    def no_kernel(logits: Tensor, *_: object) -> Tensor:
        return logits.new_empty(len(logits), dtype=torch.float32)  # as Triton's returns

    def flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **_: object) -> Tensor:
        # Which kernel is taken depends on the device; this one is known on "meta".
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, is_causal)[0]

    with (patch.object(Tensor, "is_cuda", device == "cuda", create=True),
          patch.object(kernels, "TRITON_AVAILABLE", True),
          patch.dict(kernels.BACKENDS, triton=no_kernel),
          patch.object(F, "scaled_dot_product_attention", flash),
          patch.object(torch, "autocast", lambda *_, **__: nullcontext()), ledger):
        yield


def costly_records(flags: CommonFlags, config: Config, tokens: float, records: int
                   ) -> tuple[Processor, Batch]:
    """Records with the largest image and a few words: so many of them, or if that is 0, as
    many as hold so many tokens."""
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
    records = records or math.ceil(tokens / len(encoded.tokens))
    return processor, processor.pack([encoded] * records)


def follow_shards(model: nn.Module, blocks: list[nn.Module], ledger: Ledger, ranks: int,
                  summed: bool) -> None:
    """Have the ledger note what a rank holds of weights and gradients on the way back.

    blocks: those that FSDP gathers one by one; without FSDP none. summed: earlier passes
    have left their gradients, and new ones are added to them.
    """
    # What is in no block is the root's: its weights, and their gradients, stay complete.
    inside = {parameter for block in blocks for parameter in block.parameters()}
    root = [parameter for parameter in model.parameters() if parameter not in inside]

    def arrived(parameter: nn.Parameter) -> None:
        # A gradient is divided, and added to the sum; the root's at the end.
        if not blocks or parameter in inside:
            parameter.grad = None
            if not summed:
                part = 4 * parameter.numel() / ranks
                ledger.hold("gradients", ledger.held["gradients"] + part)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)

    def enter(block: nn.Module) -> None:
        # It and the next block are complete; so is the gradient of the one before, which
        # is sent in float32.
        ledger.hold("gathered", size(root) + 2 * size(block.parameters()))
        sent = [parameter for parameter in block.parameters() if parameter.requires_grad]
        ledger.hold("reduced", size(sent) + 4 * count(sent))

    def watch(block: nn.Module, _: tuple, output: Tensor) -> None:
        # Backward enters a block when the gradient of its output is there.
        if output.requires_grad:
            output.register_hook(lambda _: enter(block))

    for block in blocks:
        block.register_forward_hook(watch)
    if blocks:
        ledger.hold("gathered", size(root) + 2 * size(blocks[-1].parameters()))


@dataclass
class Estimate:
    """What was computed for each rank."""

    model: nn.Module
    batch: Batch  # of one pass: a micro-batch, or a chunk
    passes: int  # in a step
    peak: Counter[str]  # bytes by kind
    step_seconds: float


def estimate(flags: CommonFlags, memory: int, ranks: int) -> Estimate:
    """Run one pass of a step without memory or values, and add up what it would need.

    memory: of a card, in GB. MocaError for a config.json that does not serve.
    """
    device = flags.device or "cuda"
    dtype = getattr(torch, flags.dtype or ("bfloat16" if device == "cuda" else "float32"))
    first_stage = hasattr(flags, "batch_tokens")

    # The model as the scripts build it, but of shapes only.
    config = load_config(find_checkpoint(flags.model, ("config.json",)))
    vlm = empty_model(config)
    if getattr(flags, "lora", 0):
        from nano_moca.lora import add_adapters

        add_adapters(vlm, flags.lora, dtype)
    vlm.set_checkpointing(flags.checkpointing)
    model = ReconstructionModel(vlm) if first_stage else vlm
    blocks = [*vlm.visual.blocks, *vlm.language.layers]

    # What a rank computes at once, and how often in a step.
    if first_stage:
        passes = flags.accumulate
        processor, batch = costly_records(flags, config, flags.batch_tokens / ranks / passes, 0)
        keys = [(0, number) for number in range(len(batch.lengths))]
        masked = mask_batch(batch, processor, flags.text_mask, flags.image_mask, keys)
        if flags.objective == "next-token":
            masked = next_token_batch(batch, processor)
    else:
        records = math.ceil(flags.batch * (2 + flags.hard_negatives) / ranks)
        at_once = min(flags.chunk or records, records)
        passes = math.ceil(records / at_once)
        _, batch = costly_records(flags, config, 0, at_once)

    # What stays from step to step. Parameters are counted here, not when they are used.
    trained = count(p for p in model.parameters() if p.requires_grad)
    ledger = Ledger({"weights": size(model.parameters()) / ranks, "moments": 8 * trained / ranks,
                     "gradients": 4 * trained / ranks if passes > 1 else 0,
                     "reserve": RESERVE if device == "cuda" else 0})
    for parameter in model.to(dtype).parameters():
        ledger.known.add(parameter.untyped_storage()._cdata)
    sharded = ranks > 1 or dtype != torch.float32  # as World.sharded
    follow_shards(model, blocks if sharded else [], ledger, ranks, passes > 1)

    # Forward, and backward.
    with pretending(device, ledger):
        if first_stage:
            causal = flags.attention == "causal" or flags.objective == "next-token"
            model.patch_decoder.register_forward_hook(lambda *_: setattr(ledger, "kind", "loss"))
            result = sum(model(masked.to("meta"), causal, 1.0, 1.0))
        else:
            result = model.embed(batch.to("meta"), flags.attention == "causal", "last").sum()
        forward = ledger.flops, ledger.made
        ledger.kind = "working"
        torch.autograd.backward(result)

    # At the end the root's gradients are divided. AdamW's step needs nothing more on a GPU,
    # where it is one kernel, and on a CPU two copies of a parameter.
    complete = [p for p in model.parameters() if p.grad is not None]
    ledger.hold("gathered", 0)
    ledger.hold("reduced", 4 * count(complete))
    for parameter in complete:
        parameter.grad = None
    ledger.hold("reduced", 0)
    ledger.hold("gradients", 4 * trained / ranks)
    if device == "cpu":
        ledger.hold("working", 8 * max(p.numel() for p in model.parameters()) / ranks)

    # Time. Each result is written and read. Complete weights are sent for forward and for
    # backward, and gradients once, while others are computed.
    _, products, traffic, wire = card_like(memory)
    products /= 1 if dtype == torch.bfloat16 else 10
    sent = size(model.parameters()) if ranks > 1 else 0

    def seconds(flops: float, made: float, sent: float) -> float:
        return max(flops / products + 2 * made / traffic, sent / wire)

    # The gradient cache embeds all once more before. AdamW reads four numbers, writes three.
    gradients = 4 * trained if ranks > 1 else 0
    step = passes * seconds(ledger.flops, ledger.made, 2 * sent + gradients)
    if passes > 1 and not first_stage:
        step += passes * seconds(*forward, sent)
    step += 28 * trained / ranks / traffic
    return Estimate(model, batch, passes, ledger.peak, step)


def card_like(memory: int) -> tuple[str, float, float, float]:
    """Of `CARDS` the one that a card of so many GB is taken for."""
    return [card for least, card in CARDS.items() if least <= memory][-1]


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
    print(f"computed, not measured, for {ranks} x {memory} GB (as {card_like(memory)[0]}), with "
          f"{'' if flags.checkpointing else 'no '}--checkpointing")

    # Parameters, by part.
    vlm = getattr(found.model, "vlm", found.model)
    tables = {vlm.head, vlm.language.embed_tokens.weight}
    parts = {"vision tower": count(vlm.visual.parameters()), "embedding and head": count(tables)}
    parts["decoder"] = count(vlm.parameters()) - sum(parts.values())
    parts["patch decoder"] = count(found.model.parameters()) - count(vlm.parameters())
    parts["trained"] = count(p for p in found.model.parameters() if p.requires_grad)
    listed = ", ".join(f"{name} {number / 1e6:,.1f}" for name, number in parts.items())
    print(f"millions of parameters: {listed}")

    # What is in the model at once, and what that takes.
    tokens, images = len(found.batch.tokens), len(found.batch.image_index)
    print(f"{found.passes} pass(es) a step on each rank, of {len(found.batch.lengths)} records: "
          f"{tokens:,} tokens, {images:,} of them of images")
    print("GB on each rank, at the moment when they are the most:")
    for kind, why in KINDS.items():
        print(f"{found.peak[kind] / GB:9.2f}  {kind:10} {why}")
    total = found.peak.total() / GB
    advice = "fits" if total <= memory else (
        "DOES NOT FIT. What helps: --checkpointing, a larger --accumulate or a smaller --chunk, "
        "a smaller --max-pixels, --lora 16, more cards")
    print(f"{total:9.2f}  in all, of {memory}: {advice}")

    # Time.
    minutes = found.step_seconds / 60
    print(f"minutes: {minutes:.2g} a step, {minutes * flags.steps:,.0f} for {flags.steps:,} steps, "
          "if nothing waits")
