"""Where the host waits for the device, and what is sent to it, counted without a GPU.

PyTorch's device "meta" takes the GPU's part: its tensors have shapes and no numbers, so nothing
can be read from them, which is what makes a host wait. `Watch` notes whoever tries, by line, and
answers 1. It notes as well what would be sent to a GPU while the host waits. What would fail on a
GPU (tensors of two devices in one operation) or has no shape before it is computed (`nonzero`, a
mask as an index, `repeat_interleave` without its output's size) is an error on meta too.

Not seen: waits inside of a GPU's own kernels and of NCCL, FSDP2's, and those of the allocator.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nano_moca.attention import Segments
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = str(Path(__file__).resolve().parents[1])
READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")
MAKERS = ("tensor", "as_tensor", "asarray")  # of tensors from a list or an array


def on_meta(value: Any) -> bool:
    """Whether this is a tensor of the device that takes the GPU's part."""
    return isinstance(value, Tensor) and value.is_meta


def on_host(value: Any) -> bool:
    """Whether this is a tensor of the host's, and more than a number."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() > 0


def line_of_ours() -> str:
    """The innermost line of the package or a script."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT) and "/tests/" not in frame.filename:
            return f"{frame.filename.removeprefix(ROOT)}:{frame.lineno}"
    return "elsewhere"


def attend_nowhere(query: Tensor, key: Tensor, value: Tensor, segments: Segments, causal: bool
                   ) -> Tensor:
    """In place of a GPU's kernel: it reads the offsets, as int32, on the device."""
    assert segments.offsets.device == query.device and segments.offsets.dtype == torch.int32
    return query + 0.0 * (key.sum() + value.sum())


class Watch(TorchFunctionMode):
    """`with Watch() as watch:` what this thread does. `waits` and `copies` count by what and where:
    reads of the device, and what is sent to it while the host waits. `sent` are the bytes that are
    sent without."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.sent = 0
        self.operations = Operations(self)

    def __enter__(self) -> "Watch":
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.operations.__exit__(*error)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in READS and args and on_meta(args[0]):
            self.waits[name, line_of_ours()] += 1
            ones = torch.ones(args[0].shape, dtype=args[0].dtype)
            return getattr(ones, name)(*args[1:], **kwargs)
        made = name in MAKERS and torch.device(kwargs.get("device") or "cpu").type == "meta"
        indexed = name in ("__getitem__", "__setitem__") and on_meta(args[0])
        if made or indexed and isinstance(args[1], list):  # a list is an index of the host's
            self.copies[name, line_of_ours()] += 1
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    """The part of `Watch` that sees what PyTorch does inside of a function."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if name == "_local_scalar_dense" and on_meta(args[0]):
            self.watch.waits[name, line_of_ours()] += 1
            return 1
        if name == "_to_copy" and on_meta(args[0]) and str(kwargs.get("device")) == "cpu":
            self.watch.waits[name, line_of_ours()] += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)

        # What is sent: in the background, or while the host waits. An index on the host into a
        # tensor on the device is sent too.
        out = function(*args, **kwargs)
        copied = name in ("_to_copy", "copy_")
        if any(map(on_host, tensors)) and (on_meta(out) or any(map(on_meta, tensors))):
            if copied and (kwargs.get("non_blocking") or True in args[2:]):
                self.watch.sent += out.nbytes
            else:
                self.watch.copies[name, line_of_ours()] += 1
        return out
