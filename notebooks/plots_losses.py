"""The pictures of notebooks 4 and 7, and the counter of memory that both use.

fused_loss_memory(path) writes the picture of docs/real_models.md, for R = 1,024 masked words of
width 64: it takes seconds. Triton is not needed.
"""

from __future__ import annotations

import io
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from helpers import BLUE, GREY, RED, style, with_palette

from nano_moca import losses
from nano_moca.losses import masked_reconstruction_loss, plain_masked_reconstruction_loss

MB = 2**20
QWEN = 151_936  # words of Qwen2.5-VL's vocabulary


class Memory(TorchDispatchMode):
    """Bytes of the tensors that were made inside `with`, after each operation."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}  # were there before
        self.alive: dict[int, int] = {}  # storage -> bytes
        self.curve: list[int] = []  # bytes alive after each operation

    def __torch_dispatch__(self, operation: Callable, types: Any, arguments: tuple = (),
                           options: dict | None = None) -> Any:
        """Run an operation, and count what it made."""
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.known:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)  # when it is freed
        self.curve.append(sum(self.alive.values()))
        return result

    @property
    def peak(self) -> int:
        """The most bytes that were ever alive."""
        return max(self.curve)


def example(R: int, D: int, V: int) -> tuple[Tensor, ...]:
    """Hidden states, output embedding and labels; and two patch groups of no interest here."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(R, D, generator=generator).requires_grad_()
    head = (torch.randn(V, D, generator=generator) / D**0.5).requires_grad_()
    labels = torch.randint(V, (R,), generator=generator)
    predicted, target = torch.randn(2, 2, 4704, generator=generator)
    return hidden, head, labels, predicted.requires_grad_(), target


def watch(loss: Callable, R: int, D: int, V: int) -> Memory:
    """Run a loss forward and backward; what was alive meanwhile."""
    inputs = example(R, D, V)
    with Memory(*inputs) as memory:
        mlm, _ = loss(*inputs)
        mlm.backward()
    return memory


def count_plain(R: int, D: int, V: int) -> int:
    """Bytes at the peak: log-softmax and the gradients of it and of the logits."""
    return 4 * 3 * R * V


def count_fused(R: int, D: int, V: int) -> int:
    """Bytes at the peak: the two gradients that have to come out in any case, and one chunk of
    logits, as long as the rule of losses.py says for float32."""
    rows = max(losses.CHUNK_BYTES // (4 * V), D // 2, 1)
    return 4 * (R * D + V * D + min(R, rows) * V)


def draw_alive(axes: Sequence[Axes], memories: Sequence[Memory], titles: Sequence[str],
               height: float | None = None) -> None:
    """What is alive while each of two ways runs, in MB; the plain one in red."""
    for axis, memory, colour, title in zip(axes, memories, (RED, BLUE), titles):
        sizes = np.array(memory.curve) / MB
        axis.fill_between(range(len(sizes)), sizes, step="post", color=colour, alpha=0.3)
        axis.step(range(len(sizes)), sizes, where="post", color=colour, linewidth=2)
        axis.set(title=title, xlabel="operation", xlim=(0, len(sizes)), ylim=(0, height))
    axes[0].set_ylabel("MB alive")


def draw_curves(plain: Memory, fused: Memory, logits: int, embedding: int) -> None:
    """What is alive during forward and backward of both losses; all in bytes."""
    _, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    titles = "plain: all logits at once", "fused: chunk by chunk"
    draw_alive(axes, (plain, fused), titles, 240)
    for axis in axes:
        for k in (1, 2, 3):
            axis.axhline(k * logits / MB, color=GREY, linestyle=":", linewidth=1)
            axis.annotate(f"{k} R V", (1, k * logits / MB), (-4, 4), ha="right", color=GREY,
                          xycoords=axis.get_yaxis_transform(), textcoords="offset points")
    axes[0].text(3.3, 0.4 * logits / MB, "the logits")
    axes[0].text(3.3, 1.4 * logits / MB, "their log-softmax,\nkept for backward")
    axes[0].text(int(np.argmax(plain.curve)) - 0.3, 2.4 * logits / MB,
                 "backward: two gradients,\nand the log-softmax", ha="right")
    axes[1].text(0.45, 0.1, f"peak {fused.peak / MB:.1f} MB, of which {embedding / MB:.0f} MB are\n"
                 "the gradient of the embedding", transform=axes[1].transAxes, ha="center")
    plt.show()


def memory_figure(R: int, D: int, measured: dict[str, dict[int, int]]) -> Figure:
    """Peak memory over the vocabulary, counted and measured. measured: of "plain" and "fused",
    vocabulary -> bytes."""
    wide = np.geomspace(1024, QWEN, 50).astype(int)
    figure, axis = plt.subplots(figsize=(9, 4.8))
    for name, count, colour in (("plain", count_plain, RED), ("fused", count_fused, BLUE)):
        counted = [count(R, D, int(size)) / MB for size in wide]
        axis.plot(wide, counted, "--", color=colour, linewidth=1.5, label=f"{name}, counted")
        peaks = np.array(list(measured[name].values())) / MB
        axis.plot(list(measured[name]), peaks, "o", color=colour, markersize=8,
                  label=f"{name}, measured")
    axis.plot(wide, 4 * wide * D / MB, ":", color=GREY, linewidth=2,
              label="gradient of the embedding alone")

    much, little = count_plain(R, D, QWEN) / MB, count_fused(R, D, QWEN) / MB
    axis.axvline(QWEN, color=GREY, linewidth=1)
    axis.text(QWEN * 0.93, 0.75, "Qwen's vocabulary", ha="right", color=GREY)
    axis.text(QWEN * 1.06, much, f"{much:,.0f} MB", va="center", color=RED)
    axis.text(QWEN * 1.06, little, f"{little:,.0f} MB", va="center", color=BLUE)
    axis.set(xscale="log", yscale="log", xlabel="vocabulary V", xlim=(900, 290_000),
             ylabel="peak above the inputs, MB", ylim=(0.5, 6000))
    axis.set_xticks([1024, 4096, 16_384, 65_536], ["1,024", "4,096", "16,384", "65,536"])
    axis.set_xticks([], minor=True)
    axis.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axis.legend(ncols=2, fontsize=10, loc="upper left", frameon=False)
    return figure


def measure(R: int, D: int, sizes: Sequence[int]) -> dict[str, dict[int, int]]:
    """The peaks of both losses for vocabularies of these sizes."""
    named = ("plain", plain_masked_reconstruction_loss), ("fused", masked_reconstruction_loss)
    return {name: {size: watch(loss, R, D, size).peak for size in sizes} for name, loss in named}


def fused_loss_memory(path: Path | str) -> None:
    """Write the picture: memory of the plain and of the fused loss over the vocabulary."""
    style()
    budget, losses.CHUNK_BYTES = losses.CHUNK_BYTES, 2 * MB  # small, as all else here
    figure = memory_figure(1024, 64, measure(1024, 64, [2**k for k in range(10, 16)]))
    losses.CHUNK_BYTES = budget
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    with_palette(Image.open(picture).convert("RGB")).save(path, optimize=True)
    plt.close(figure)


def draw_online(row: Tensor, steps: Sequence[tuple[float, float]]) -> None:
    """A row of 16 logits in four blocks, and how peak and sum follow. steps: (peak, sum)."""
    _, (above, below) = plt.subplots(2, 1, figsize=(10, 6), sharex=True, height_ratios=(3, 2.6))
    shades = "#b9cbe8", "#7fa3d6", "#4674b8", "#1f4e9c"
    above.bar(range(16), row, color=[shades[k // 4] for k in range(16)], width=0.8)
    above.axhline(0, color="black", linewidth=0.8)
    for k, (peak, total) in enumerate(steps):
        left, middle, right = 4 * k - 0.5, 4 * k + 1.5, 4 * k + 3.5
        name = "peak so far" if k == 0 else None
        above.plot((left, right), (peak, peak), color=RED, linewidth=2.5, label=name)
        below.bar(middle, total, width=3.4, color=shades[k])
        below.text(middle, total + 0.05, f"sum {total:.2f}", ha="center")
        if k:
            old_peak, old_total = steps[k - 1]
            rest = old_total * np.exp(old_peak - peak)
            name = "what is left of the sum before" if k == 1 else None
            below.bar(middle, rest, width=3.4, color="#d9d9d9", label=name)
            below.text(middle, rest / 2, f"{old_total:.2f} shrinks to {rest:.2f}", ha="center",
                       va="center")
        for axis in (above, below):
            axis.axvline(left, color=GREY, linestyle=":", linewidth=1)
    above.set(ylabel="logit", title="One row of 16 logits, in four blocks")
    above.legend(loc="upper left", frameon=False)
    below.set(ylabel="sum so far", xlabel="position in the vocabulary", ylim=(0, 2.6),
              xlim=(-0.6, 15.6))
    below.legend(loc="upper right", frameon=False)
    plt.show()


def draw_cache(pairs: Sequence[int], wrong: dict, right_way: dict) -> None:
    """Loss and error of the gradient by pairs per chunk, accumulated and with the cache."""
    _, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    places = range(len(pairs))
    for results, colour, name in ((wrong, RED, "accumulated over chunks"),
                                  (right_way, BLUE, "gradient cache")):
        found, errors = zip(*(results[n] for n in pairs))
        look = {"color": colour, "marker": "o", "linewidth": 2.5, "markersize": 8, "label": name}
        axes[0].plot(places, found, **look)
        axes[1].plot(places, np.maximum(errors, 1e-8), **look)
    axes[0].set(title="Loss", ylim=(0, None))
    axes[1].set(title="Error of the gradient, relative to its norm", yscale="log", ylim=(3e-9, 30))
    for axis in axes:
        axis.set_xticks(places, [f"{n}" for n in pairs])
        axis.set_xlabel(f"pairs per chunk (of a batch of {pairs[0]})")
    axes[0].legend(frameon=False, loc="lower left")
    plt.show()


def draw_steps(plain: Memory, cached: Memory) -> None:
    """What is alive during a step of stage 2, without and with the gradient cache."""
    _, axes = plt.subplots(1, 2, figsize=(12, 3.8), sharey=True)
    titles = "direct: one graph for the whole batch", "gradient cache: a graph per chunk"
    draw_alive(axes, (plain, cached), titles)
    plt.show()
