"""What a card makes of this code: `python -m nano_moca.benchmark --gpu [--model DIR]`.

Three tables, before those of benchmark.py. What is not installed, or does not fit, gets a
line that says so:

    errors   of each fast function against float64, beside those of its plain twin
    losses   the fused loss, full logits, and three fused losses of others
    stages   a step of each stage: tokens a second, share of the card's peak, memory

The model has random weights, so --model needs no more than config.json and the
processor's files; without it the shape is Qwen2.5-VL-3B's. On a CPU it is the nano base's:
that shows that the command works, and no speed. *MFU*, model FLOPs utilisation, is what
the products of a step need (without what checkpointing computes twice) over what the
card could do in that time at its bfloat16 peak.

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
from nano_moca.convert.configs import parse_config
from nano_moca.distributed import World, init_distributed, local_part, shard
from nano_moca.families import load_config
from nano_moca.losses import (info_nce, masked_reconstruction_loss,
                              plain_masked_reconstruction_loss)
from nano_moca.masking import MaskedBatch, mask_batch
from nano_moca.model import ReconstructionModel, rms_norm, rotate, silu_gate
from nano_moca.processor import Processor
from nano_moca.trainer import make_optimizer
from nano_moca.weights import empty_model, find_checkpoint

# Makers' figures for dense bfloat16 products, TFLOP/s; the first name that fits counts.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}
# What Qwen2.5-VL-3B's config.json says otherwise than the nano base's.
SHAPE_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
VISION_3B = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
             "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
AREA = 1024 * 28 * 28  # of each image in pixels: 1024 image tokens


def measure(run: Callable[[], object], cuda: bool) -> tuple[float, float]:
    """Seconds of a call, the median of three after two to warm up; and the most GB that
    the card held meanwhile (nan on a CPU)."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()  # until the card has done all of it
        times.append(time.perf_counter() - began)
    return median(times[2:]), torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")


def print_row(name: str, prepare: Callable[[], Callable], flops: float = 0.0, tokens: int = 0,
              peak: float | None = None) -> None:
    """Measure what `prepare` returns, and print it: or why it could not be measured."""
    cuda = torch.cuda.is_available()
    gc.collect()  # what was measured before
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    # Whatever a library that is absent, too old or too hungry for memory may raise.
    try:
        seconds, memory = measure(prepare(), cuda)
    except Exception as error:
        said = str(error).partition("\n")[0][:80]
        print(f"{name:24s}not measured: {type(error).__name__}: {said}", flush=True)
        return
    share = flops / seconds / (peak * 1e12) if peak else float("nan")
    rate = f"{tokens / seconds:12,.0f}{share:8.2f}" if tokens else ""
    print(f"{name:24s}{1e3 * seconds:10.1f}{memory:10.1f}{rate}", flush=True)


def relative_error(function: Callable, twin: Callable, call: Callable, inputs: list[Tensor]
                   ) -> float:
    """How far values and gradients of a function are from those of its twin in float64:
    the largest |difference| / |truth|. call: gives either the inputs, and what else it
    takes."""
    def results(chosen: Callable, dtype: torch.dtype) -> list[Tensor]:
        """Values, and the gradient of a weighted sum of them at each input."""
        given = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = call(chosen, *given).double().flatten()
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

    print(f"\n{'distance from float64':42s}{'fast':>10s}{'plain':>10s}")
    torch.manual_seed(0)
    for function, twin, call, shapes in checks:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            fast = relative_error(function, twin, call, inputs)
            plain = relative_error(twin, twin, call, inputs)
            verdict = "" if fast < 2 * plain + 1e-6 else "   TOO LARGE"
            print(f"{function.__name__:28s}{str(dtype):14s}{fast:10.1e}{plain:10.1e}{verdict}")


def print_losses(world: World, config: Config, R: int) -> None:
    """The output layer with its loss, forward and backward, for R masked tokens."""
    options = {"device": world.device, "dtype": world.dtype}
    hidden = torch.randn(R, config.width, **options).requires_grad_()  # [R, D]
    head = torch.randn(config.vocabulary, config.width, **options).requires_grad_()  # [V, D]
    labels = torch.randint(config.vocabulary, (R,), device=world.device)  # [R]
    pixels = hidden.new_zeros(0, 4)

    def liger() -> Callable:
        """Liger-Kernel's: Triton, fused with the gradient as ours is."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return lambda: LigerFusedLinearCrossEntropyLoss()(head, hidden, labels)

    def cut_cross_entropy() -> Callable:
        """Apple's: no logits in memory at all, computed again in backward."""
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(hidden, head, labels)

    def linear_cross_entropy() -> Callable:
        """PyTorch's own, since 2.13."""
        chunked = nn.LinearCrossEntropyOptions()
        return lambda: F.linear_cross_entropy(hidden, head, labels, options=chunked)

    def ours(loss: Callable, backend: str) -> Callable:
        """The fused loss or its plain twin."""
        return lambda: loss(hidden, head, labels, pixels, pixels, backend)[0]

    def prepare_loss(engine: Callable[[], Callable]) -> Callable[[], object]:
        """Forward and backward. A library is imported, or not found, only now."""
        loss = engine()
        return lambda: torch.autograd.grad(loss(), (hidden, head))

    engines = {"fused, Triton": partial(ours, masked_reconstruction_loss, "triton"),
               "fused, PyTorch": partial(ours, masked_reconstruction_loss, "torch"),
               "full logits": partial(ours, plain_masked_reconstruction_loss, "plain"),
               "F.linear_cross_entropy": linear_cross_entropy, "Liger": liger,
               "cut cross entropy": cut_cross_entropy}
    print(f"\n{f'loss of {R:,} tokens':24s}{'ms':>10s}{'GB':>10s}")
    for name, engine in engines.items():
        print_row(name, partial(prepare_loss, engine))


def step_flops(root: nn.Module, config: Config, batch: Batch, R: int = 0, G: int = 0) -> float:
    """Floating-point operations of the products of a step: forward, and twice as many
    backward. A weight is multiplied and added once for each row that comes by."""
    T, P, J = len(batch.tokens), len(batch.patches), len(batch.image_index)
    rows = {"patch_embed": P, "visual.blocks": P, "merger": J, "language.layers": T,
            "patch_decoder.layer": T, "patch_decoder.head": G}
    forward = 2.0 * R * config.vocabulary * config.width
    for name, module in root.named_modules():
        for part, count in rows.items():
            if isinstance(module, nn.Linear) and part in name:
                forward += 2.0 * count * module.weight.numel()

    # Attention: a product for the scores, and one for the values, for each pair of tokens
    # that see each other. (A window at the border of an image is smaller than counted.)
    pairs = sum(length**2 for length in batch.lengths)
    forward += 4.0 * pairs * config.heads * config.head_width * (config.layers + (R > 0))
    vision = config.vision
    full = len(vision.full_blocks) if vision.window else vision.depth
    whole = int((batch.grids[:, 1] * batch.grids[:, 2]).square().sum())
    windows = P * (vision.window // vision.patch) ** 2
    forward += 4.0 * vision.width * (full * whole + (vision.depth - full) * windows)
    return 3 * forward


def prepare_step(world: World, config: Config, stage: int, loss: Callable, checkpointing: bool
                 ) -> Callable[[], None]:
    """A whole step of a stage: forward, backward, AdamW. loss: of the stage's model."""
    # Memory as in training, and random weights.
    vlm = empty_model(config)
    root = ReconstructionModel(vlm) if stage == 1 else vlm
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
        loss(root).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def print_stages(world: World, config: Config, masked: MaskedBatch, batch: Batch,
                 peak: float | None) -> None:
    """A step of each stage. batch: the same records as `masked` has, unmasked.

    Without checkpointing 3B fits no single card of 80 GB: its line says so then.
    """
    n = len(batch.lengths) // 2  # pairs: the first half of the records are the queries
    excluded = torch.zeros(n, n, dtype=torch.bool, device=world.device)
    local_index = torch.arange(n, device=world.device)

    def stage_1(root: nn.Module) -> Tensor:
        """MLM and MAE."""
        mlm, mae = root(masked, causal=False)
        return mlm + 0.5 * mae

    def stage_2(root: nn.Module) -> Tensor:
        """InfoNCE, without hard negatives."""
        vectors = root.embed(batch, causal=False, pooling="mean")  # [N, D]
        queries, positives, rest = vectors.split([n, n, len(vectors) - 2 * n])
        return info_nce(queries, positives, rest[:0], local_index, excluded, 0.03)[0]

    tokens = len(batch.tokens)
    print(f"\n{f'step of {tokens:,} tokens':24s}{'ms':>10s}{'GB':>10s}{'tokens/s':>12s}{'MFU':>8s}")
    vlm = empty_model(config)
    of_both = [step_flops(ReconstructionModel(vlm), config, batch, len(masked.labels),
                          len(masked.target)), step_flops(vlm, config, batch)]
    for number, (loss, flops) in enumerate(zip((stage_1, stage_2), of_both, strict=True), 1):
        for checkpointing, how in ((True, ", checkpointing"), (False, "")):
            prepare = partial(prepare_step, world, config, number, loss, checkpointing)
            print_row(f"stage {number}{how}", prepare, flops, tokens, peak)


def benchmark_gpu(name: str | None, records: int, peak: float | None) -> World:
    """Print the three tables, and return where and in which dtype they were measured.

    name: of the folder or hub id of a model's shape. records: in a batch. peak: of the
    card in TFLOP/s, if PEAKS does not have it.
    """
    world = init_distributed(None, None)
    cuda = world.device.type == "cuda"
    card = torch.cuda.get_device_name() if cuda else "a CPU"
    known = [figure for part, figure in PEAKS.items() if part in card]
    peak = peak or (known[0] if known else None)
    print(f"{card}, torch {torch.__version__}, {world.dtype}; peak for MFU: "
          + (f"{peak} TFLOP/s" if peak else "unknown, give it as --peak"))

    # The shape, and a batch of built-in records with images as large as pages.
    folder = find_checkpoint(name or BASE)
    config = load_config(folder)
    if cuda and not name:
        vision = config.raw["vision_config"] | VISION_3B
        config = parse_config(config.raw | SHAPE_3B | {"vision_config": vision})
    processor = Processor.load(folder, config, *((AREA, AREA) if cuda else ()))
    data = BuiltinRecords("train")
    batch = processor.batch([data[number] for number in range(records)])
    keys = [(0, number) for number in range(records)]
    masked = mask_batch(batch, processor, 0.4, 0.5, keys)

    print_errors(world.device)
    print_losses(world, config, R=4096 if cuda else 256)
    print_stages(world, config, masked.to(world.device), batch.to(world.device), peak)
    return world
