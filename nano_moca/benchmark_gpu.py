"""What a card makes of this code: `python -m nano_moca.benchmark --gpu [--model DIR]`.

Three tables, before those of benchmark.py. What is not installed, or does not fit, gets a
line that says so:

    errors   of each fast function, beside those of its plain twin: against the twin in
             float64 (norm and attention compute in float32 in it)
    losses   the fused loss, full logits, and three fused losses of others
    stages   a step of each stage: tokens a second, share of the card's peak, memory

The model has random weights, so --model needs no more than config.json and the
processor's files; without it they are those of Qwen2.5-VL-3B, from the hub. On a CPU it is
the nano base's: that shows that the command works, and no speed. *MFU*, model FLOPs
utilisation, is what the products of a step need (without what checkpointing computes
twice) over what the card could do in that time at its bfloat16 peak.

3B takes about 66 GB of a card, and more without checkpointing: those lines say so then.
Left out: several cards, and reading data; the log of a run says what both come to.
"""

import gc
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moca.attention import Segments, attend, reference_attention
from nano_moca.batch import Batch
from nano_moca.builtin import BuiltinRecords
from nano_moca.config import BASE, Config
from nano_moca.distributed import World, init_distributed, local_part, shard
from nano_moca.plan.estimate import Ledger, dry_run
from nano_moca.families import load_config
from nano_moca.losses import info_nce, masked_reconstruction_loss, plain_masked_reconstruction_loss
from nano_moca.masking import MaskedBatch, mask_batch
from nano_moca.model import ReconstructionModel, rms_norm, rotate, silu_gate
from nano_moca.processor import Processor
from nano_moca.trainer import make_optimizer
from nano_moca.weights import PROCESSOR_FILES, empty_model, find_checkpoint

# Makers' figures for dense bfloat16 products, TFLOP/s; the first name that fits counts.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}
AREA = 1024 * 28 * 28  # of each image in pixels: 1024 image tokens


def print_row(name: str, figures: Callable[[], str]) -> None:
    """Print a line of a table: its figures, or why they could not be measured."""
    # What was measured before goes first.
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU

    # Whatever a library that is absent, too old or too hungry for memory may raise.
    try:
        said = figures()
    except Exception as error:
        reason = str(error).partition("\n")[0][:80]
        said = f"not measured: {type(error).__name__}: {reason}"
    print(f"{name:42s}{said}", flush=True)


def measured(prepare: Callable[[], Callable[[], object]]) -> tuple[float, float]:
    """Seconds of a call of what `prepare` returns, the median of three after two to warm up
    and to compile; and the most GB that the card held meanwhile (nan on a CPU)."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = prepare()

    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()  # until the card has done all of it
        times.append(time.perf_counter() - began)
    return median(times[2:]), torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")


# --- errors ---------------------------------------------------------------------------


def relative_error(function: Callable, twin: Callable, inputs: list[Tensor]) -> float:
    """How far values and gradients of a function are from those of its twin in float64: the
    largest |difference| / |truth|."""
    def results(chosen: Callable, dtype: torch.dtype) -> list[Tensor]:
        """Values, and the gradient of a weighted sum of them at each input."""
        given = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = chosen(*given).double().flatten()
        weights = torch.linspace(-1, 1, len(out), device=out.device, dtype=out.dtype)
        return [out.detach(), *torch.autograd.grad(out @ weights, given)]

    largest = 0.0
    truth = results(twin, torch.float64)
    for ours, right in zip(results(function, inputs[0].dtype), truth, strict=True):
        largest = max(largest, float((ours.double() - right).norm() / right.norm()))
    return largest


def print_errors(device: torch.device) -> None:
    """Each fast function beside its plain twin."""
    T, V = 300, 5000
    segments = Segments.of((200, 99, 1), device)
    angles = torch.linspace(0, 100, T * 32, device=device).view(T, 32)
    labels = torch.arange(T, device=device)
    pixels = torch.zeros(0, 4, device=device)  # none: the loss of text alone

    # Function, twin, how either is called, and the shapes of its random inputs.
    checks = [
        (rms_norm, rms_norm.__wrapped__, lambda f, x, w: f(x, w, 1e-6), [(T, 256), (256,)]),
        (silu_gate, silu_gate.__wrapped__, lambda f, g, u: f(g, u), [(T, 256), (T, 256)]),
        (rotate, rotate.__wrapped__, lambda f, x: f(x, angles, x.dtype), [(T, 4, 64)]),
        (attend, reference_attention, lambda f, q, k, v: f(q, k, v, segments, False),
         [(T, 4, 64), (T, 2, 64), (T, 2, 64)]),
        (masked_reconstruction_loss, plain_masked_reconstruction_loss,
         lambda f, x, w: f(x, w, labels, pixels, pixels)[0], [(T, 64), (V, 64)])]

    def compare(function: Callable, twin: Callable, inputs: list[Tensor]) -> str:
        """Both errors, and whether ours is more than rounding explains."""
        fast = relative_error(function, twin, inputs)
        plain = relative_error(twin, twin, inputs)
        verdict = "" if fast < 2 * plain + 1e-6 else "   TOO LARGE"
        return f"{fast:10.1e}{plain:10.1e}{verdict}"

    print(f"\n{'distance from float64':42s}{'fast':>10s}{'plain':>10s}")
    torch.manual_seed(0)
    for function, twin, call, shapes in checks:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            both = partial(call, function), partial(call, twin)
            print_row(f"{function.__name__:28s}{dtype}", partial(compare, *both, inputs))


# --- losses ---------------------------------------------------------------------------


def liger(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Liger-Kernel's: Triton, fused with the gradient as ours is."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(head, hidden, labels)


def cut_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Apple's: no logits in memory at all, computed again in backward."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, head, labels)


def chunked_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own, since 2.13."""
    chunked = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head, labels, options=chunked)


def ours(loss: Callable, backend: str, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The fused loss or its plain twin."""
    pixels = hidden.new_zeros(0, 4)
    return loss(hidden, head, labels, pixels, pixels, backend)[0]


ENGINES = {"fused, Triton": partial(ours, masked_reconstruction_loss, "triton"),
           "fused, PyTorch": partial(ours, masked_reconstruction_loss, "torch"),
           "full logits": partial(ours, plain_masked_reconstruction_loss, "plain"),
           "F.linear_cross_entropy": chunked_cross_entropy, "Liger": liger,
           "cut cross entropy": cut_cross_entropy}


def print_losses(world: World, config: Config, R: int) -> None:
    """The output layer with its loss, forward and backward, for R masked tokens."""
    options = {"device": world.device, "dtype": world.dtype}
    hidden = torch.randn(R, config.width, **options).requires_grad_()  # [R, D]
    head = torch.randn(config.vocabulary, config.width, **options).requires_grad_()  # [V, D]
    labels = torch.randint(config.vocabulary, (R,), device=world.device)  # [R]

    def figures(loss: Callable) -> str:
        """Time and memory of a loss and its gradients."""
        def run() -> object:
            """Forward and backward."""
            return torch.autograd.grad(loss(hidden, head, labels), (hidden, head))

        seconds, memory = measured(lambda: run)
        return f"{1e3 * seconds:10.1f}{memory:10.1f}"

    print(f"\n{f'loss of {R:,} tokens':42s}{'ms':>10s}{'GB':>10s}")
    for name, loss in ENGINES.items():
        print_row(name, partial(figures, loss))


# --- stages ---------------------------------------------------------------------------


def stage_1(root: nn.Module, masked: MaskedBatch) -> Tensor:
    """MLM and MAE."""
    mlm, mae = root(masked, causal=False)
    return mlm + 0.5 * mae


def stage_2(root: nn.Module, batch: Batch) -> Tensor:
    """InfoNCE, without hard negatives: the first half of the records are the queries."""
    vectors = root.embed(batch, causal=False, pooling="mean")  # [N, D]
    n = len(vectors) // 2
    queries, positives, _ = vectors.tensor_split([n, 2 * n])
    local_index = torch.arange(n, device=vectors.device)
    excluded = torch.zeros(n, n, dtype=torch.bool, device=vectors.device)
    return info_nce(queries, positives, vectors[:0], local_index, excluded, 0.03)[0]


def build(config: Config, loss: Callable) -> nn.Module:
    """The model of a stage, without memory."""
    vlm = empty_model(config)
    return ReconstructionModel(vlm) if loss is stage_1 else vlm


def step_flops(config: Config, loss: Callable, batch: Batch | MaskedBatch) -> float:
    """Floating-point operations of the products of a step, forward and backward."""
    ledger = Ledger({})
    dry_run(build(config, loss).bfloat16(), batch, 1, "cuda", ledger)
    return ledger.work["products"] + ledger.work["attention"]


def prepare_step(world: World, config: Config, loss: Callable, batch: Batch | MaskedBatch,
                 checkpointing: bool) -> Callable[[], None]:
    """A whole step of a stage: forward, backward, AdamW."""
    # Memory as in training, and random weights.
    root = build(config, loss)
    vlm = getattr(root, "vlm", root)
    shard(root, [*vlm.visual.blocks, *vlm.language.layers], world)
    for name, parameter in root.named_parameters():
        weight = local_part(parameter.detach())
        weight.normal_(std=0.02)
        if weight.dim() == 1:
            weight.fill_(float("norm" in name or "ln_q" in name))

    vlm.set_checkpointing(checkpointing)
    optimizer = make_optimizer(root, 1e-6)

    def step() -> None:
        """What a script does with one micro-batch."""
        loss(root, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def print_stages(world: World, config: Config, masked: MaskedBatch, batch: Batch,
                 peak: float) -> None:
    """A step of each stage. batch: the same records as `masked` has, unmasked. peak: TFLOP/s."""
    tokens = len(batch.tokens)

    def figures(loss: Callable, given: Batch | MaskedBatch, checkpointing: bool) -> str:
        """Time, memory, and what they come to."""
        prepare = partial(prepare_step, world, config, loss, given.to(world.device), checkpointing)
        seconds, memory = measured(prepare)
        mfu = step_flops(config, loss, given) / seconds / (peak * 1e12)
        return f"{1e3 * seconds:10.1f}{memory:10.1f}{tokens / seconds:12,.0f}{mfu:8.2f}"

    print(f"\n{f'step of {tokens:,} tokens':42s}{'ms':>10s}{'GB':>10s}{'tokens/s':>12s}{'MFU':>8s}")
    for name, loss, given in (("stage 1", stage_1, masked), ("stage 2", stage_2, batch)):
        print_row(f"{name}, checkpointing", partial(figures, loss, given, True))
        print_row(name, partial(figures, loss, given, False))


def benchmark_gpu(name: str | None, records: int, peak: float | None) -> World:
    """Print the three tables, and return where and in which dtype they were measured.

    name: of the folder or hub id of a model's shape. records: in a batch. peak: of the
    card in TFLOP/s, if PEAKS does not have it.
    """
    world = init_distributed(None, None)
    cuda = world.device.type == "cuda"
    card = torch.cuda.get_device_name() if cuda else "a CPU"
    if not peak:
        known = [figure for part, figure in PEAKS.items() if part in card]
        peak = known[0] if known else float("nan")
    print(f"{card}, torch {torch.__version__}, {world.dtype}; peak for MFU: {peak} TFLOP/s "
          "(if not known: --peak)")

    # The shape, and a batch of built-in records with images as large as pages.
    folder = find_checkpoint(name or ("Qwen/Qwen2.5-VL-3B-Instruct" if cuda else BASE),
                             PROCESSOR_FILES)
    config = load_config(folder)
    processor = Processor.load(folder, config, *((AREA, AREA) if cuda else ()))
    data = BuiltinRecords("train")
    batch = processor.batch([data[number] for number in range(records)])
    keys = [(0, number) for number in range(records)]
    masked = mask_batch(batch, processor, 0.4, 0.5, keys)

    print_errors(world.device)
    print_losses(world, config, R=4096 if cuda else 256)
    print_stages(world, config, masked, batch, peak)
    return world
