"""The make-believe device: what happens on it, and what the host sends to it and waits for.

The host runs ahead of a GPU: it puts kernels into a queue and goes on. That is how a GPU stays
busy, and so these are what a training step should have few of:

    wait            the host needs a number from the device (`.item()`, `.tolist()`, `.cpu()`, a
                    shape that depends on values): it stands still until the queue is empty
    blocking copy   a copy to the device without non_blocking=True: PyTorch waits for it, and so
                    for all that is before it in the queue. An index on the CPU makes one unseen:
                    `hidden[index]` sends it
    unpinned copy   with non_blocking=True, from ordinary memory: CUDA copies it aside first, and
                    the host does that work
    pinned copy     from pinned memory: the only kind that costs the host nothing
"""

import contextlib
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_cuda import demands
from fake_cuda.memory import Memory
from fake_cuda.start import ROOT

aten = torch.ops.aten
SMALL = 65_536  # copies of at most so many elements are remembered, see `FakeCuda.send`
ORDINARY = {Tensor, torch.nn.Parameter, FakeTensor}  # other kinds unpack themselves, as DTensor
INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index")
# What returns a view, or memory as it is, puts no kernel into the queue.
VIEWS = set("view _unsafe_view _reshape_alias t transpose permute unsqueeze squeeze expand slice "
            "select detach alias as_strided".split())
FREE = VIEWS | set("split split_with_sizes unbind set_ lift_fresh empty empty_like empty_strided "
                   "new_empty new_empty_strided record_stream is_pinned".split())


@dataclass
class Notes:
    """What was seen, and on which line of our code."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # of (what, line)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)  # of (kind of copy, line)
    sent: Counter[str] = field(default_factory=Counter)  # bytes by kind of copy
    collectives: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)  # bytes by collective
    launches: Counter[str] = field(default_factory=Counter)  # operations that run a kernel

    def clear(self) -> None:
        """Forget all, as at the end of a step."""
        for counter in vars(self).values():
            counter.clear()

    def of_kind(self, kind: str) -> int:
        """How many copies of a kind, such as "blocking"."""
        return sum(count for (what, _), count in self.copies.items() if what == kind)


class FakeCuda(TorchDispatchMode):
    """While this is on, tensors can be made on "cuda", moved there and computed with.

    It stands between Python and PyTorch's operators, forward and backward. One that has to do
    with CUDA tensors runs on FakeTensors; all others run as ever. RuntimeError where a real GPU
    would refuse, with the line of our code.
    """

    def __init__(self, other: "FakeCuda | None" = None) -> None:
        """other: of another thread, on the same device."""
        super().__init__()
        self.fake = other.fake if other else FakeTensorMode(allow_non_fake_inputs=True)
        self.notes = other.notes if other else Notes()
        self.memory = other.memory if other else Memory()
        self.lock = other.lock if other else threading.RLock()  # one operator after the other

    def __enter__(self) -> "FakeCuda":
        # `torch.tensor(numbers, device="cuda")` then makes a tensor on the CPU and sends it,
        # through us.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def watch_threads(self) -> None:
        """Follow what threads do that start from now on. (A mode is on for one thread only.)"""
        run = threading.Thread.run

        def watched(thread: threading.Thread) -> None:
            with FakeCuda(self):
                run(thread)

        threading.Thread.run = watched

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
                           ) -> Any:
        """Every operator of PyTorch passes here."""
        if op is torch.ops.prim.device.default:  # a FakeTensor asks for its own device
            return args[0].fake_device
        kwargs = kwargs or {}
        if not set(types) <= ORDINARY:
            return NotImplemented

        # DTensor tries shapes out for itself: nothing runs on the device then.
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return op(*args, **kwargs)

        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        if device is None and not any(map(is_cuda, tensors)):
            return op(*args, **kwargs)
        if not any(map(is_cuda, tensors)) and torch.device(device).type != "cuda":
            return op(*args, **kwargs)

        with self.lock:
            return self.follow(op, tensors, args, kwargs)

    def follow(self, op: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """An operator that has to do with CUDA tensors."""
        name = op.name().removesuffix(".default")
        here = our_line()

        # Numbers that go to the host.
        if op is aten._local_scalar_dense.default:
            self.notes.waits["item", here] += 1
            return came_back(args[0]).flatten()[0].item()
        target = torch.device(kwargs.get("device") or "cuda").type
        if op is aten._to_copy.default and target == "cpu":
            # With non_blocking, PyTorch takes pinned memory for what comes back.
            self.receive(args[0], bool(kwargs.get("non_blocking")), here)
            return came_back(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if op is aten.copy_.default and not is_cuda(args[0]):
            self.receive(args[1], args[2:] == (True,) and args[0].is_pinned(), here)
            return args[0].copy_(came_back(args[1]))

        # Numbers that go to the device.
        if op is aten._to_copy.default and not is_cuda(args[0]):
            return self.send(op, args[0], args, kwargs, here)
        if op is aten.copy_.default and not is_cuda(args[1]):
            return self.send(op, args[1], args, kwargs, here)
        self.check_places(name, args, tensors, here)

        # A result whose shape depends on numbers.
        if name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.notes.waits["repeat_interleave without output_size", here] += 1
            kwargs = kwargs | {"output_size": int(came_back(args[0]).sum())}

        # What the kernel asks for; then the shape, dtype and device of what it makes.
        demands.check(op, name, args, kwargs, here)
        with self.fake:
            try:
                result = op(*args, **kwargs)
            except fake_tensor.DynamicOutputShapeException:
                raise RuntimeError(f"{here}: {name} makes a tensor whose shape depends on numbers, "
                                   "so the host waits for them") from None
            except RuntimeError as error:
                raise RuntimeError(f"{here}: {name}: {error}") from error
        self.count(name, tensors)
        if short_name(name) in VIEWS and hasattr(args[0], "sent"):
            result.sent = op(args[0].sent, *args[1:], **kwargs)

        # All of backward stands on one line; so say which operator.
        in_backward = torch._C._current_graph_task_id() != -1
        self.born(result, f"{here} in {name}" if in_backward else here)
        return result

    def receive(self, tensor: Tensor, ahead: bool, here: str) -> None:
        """A copy from the device to the host. ahead: the host goes on before it is there."""
        if ahead:
            self.notes.copies["back", here] += 1
        else:
            self.notes.waits[f"to the host {list(tensor.shape)}", here] += 1

    def send(self, op: Any, source: Tensor, args: tuple, kwargs: dict, here: str) -> Any:
        """A copy from the host to the device."""
        kind = "blocking"
        if kwargs.get("non_blocking") or args[2:] == (True,):  # of copy_ it is the third argument
            kind = "pinned" if source.is_pinned() else "unpinned"
        with self.fake:
            result = op(*args, **kwargs)
        if source.numel():
            self.notes.copies[kind, here] += 1
            self.notes.sent[kind] += source.numel() * result.itemsize

        # Small ones are remembered, for what later asks for their numbers.
        if source.numel() <= SMALL and op is aten._to_copy.default:
            result.sent = source.to(result.dtype)
        self.born(result, here)
        return result

    def check_places(self, name: str, args: tuple, tensors: list[Tensor], here: str) -> None:
        """Tensors on the CPU beside tensors on CUDA."""
        # A single number is handed to the kernel as an argument; an index on the CPU into a
        # tensor on CUDA is legal, and slow: PyTorch sends it, and waits.
        left = [x for x in tensors if x.device.type == "cpu" and x.dim()]
        if left and not (name.startswith(INDEXING) and is_cuda(args[0])):
            raise RuntimeError(f"{here}: {name} takes tensors on CUDA and one of shape "
                               f"{list(left[0].shape)} that was left on the CPU")
        for index in left:
            self.notes.copies["blocking", here] += 1
            self.notes.sent["blocking"] += index.nbytes

    def count(self, name: str, tensors: list[Tensor]) -> None:
        """Kernels that were launched, and collectives with their bytes."""
        if name.startswith("c10d"):
            self.notes.collectives[name] += 1
            self.notes.moved[name] += max((x.numel() * x.itemsize for x in tensors), default=0)
        elif short_name(name) not in FREE:
            self.notes.launches[name] += 1

    def born(self, result: Any, here: str) -> None:
        """Note the storages of what was made."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and is_cuda(tensor):
                self.memory.see(tensor.untyped_storage(), here)


def short_name(name: str) -> str:
    """An operator's name, whichever arguments it takes: "aten::slice.Tensor" is "slice"."""
    return name.removeprefix("aten::").partition(".")[0]


def is_cuda(tensor: Tensor) -> bool:
    """Whether a tensor is on the make-believe device."""
    return tensor.device.type == "cuda"


def came_back(tensor: Tensor) -> Tensor:
    """What the host gets if it asks for the numbers of a CUDA tensor: those that it sent, and
    views of them (what has been added to them in place is overlooked); else invented ones."""
    sent = getattr(tensor, "sent", None)
    return invented(tensor) if sent is None else sent


def invented(tensor: Tensor) -> Tensor:
    """Numbers in place of a CUDA tensor's: rows of unit length; ones, if it holds integers."""
    ones = torch.ones(tensor.shape, dtype=tensor.dtype)
    return ones / tensor.shape[-1] ** 0.5 if tensor.dim() and ones.is_floating_point() else ones


def our_line() -> str:
    """The innermost line of the package or the scripts on the stack; in backward, that is the
    line that called it."""
    frame: FrameType | None = sys._getframe(1)
    package, scripts = str(ROOT / "nano_moca"), str(ROOT / "train_")
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith((package, scripts)):
            return f"{name.removeprefix(str(ROOT) + '/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the package"


# --- what Python asks of a GPU --------------------------------------------------------


class Stream:
    """The one stream, and any event in it: everything in it is done."""

    wait_for_all = lambda: None  # what is called where the host waits; `pretend` sets it

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def synchronize(self) -> None:
        """The host waits until the device has come here."""
        Stream.wait_for_all()

    def record_event(self, event: object = None) -> "Stream":
        """An event after all that is in the stream."""
        return self

    def query(self) -> bool:
        """Whether it is done."""
        return True

    def is_capturing(self) -> bool:
        """No graph is being recorded."""
        return False

    def nothing(self, *args: object, **kwargs: object) -> None:
        """Streams that wait for each other cost the host nothing."""

    wait_stream = wait_event = wait = record = nothing


def pretend(cuda: FakeCuda) -> None:
    """Make torch.cuda say that there is an H100."""
    stream = Stream()
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "set_device": None, "get_device_capability": (9, 0), "is_bf16_supported": True,
        "get_device_name": "make-believe H100", "empty_cache": None, "current_stream": stream,
        "default_stream": stream, "stream": contextlib.nullcontext()}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.accelerator.current_stream = lambda *args: stream

    def wait_for_all(*args: object) -> None:
        cuda.notes.waits["synchronize", our_line()] += 1

    Stream.wait_for_all = torch.cuda.synchronize = wait_for_all

    # FakeTensors must not look for a real device, and backward has to stay in the thread
    # that is watched.
    fake_tensor.init_gpu_context = lambda *args: None
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    torch._C._ensureCUDADeviceGuardSet()
    torch.autograd.set_multithreading_enabled(False)

    # One copy brings a whole list back. A list of CUDA scalars is read one by one.
    FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()
    make = torch.tensor
    torch.tensor = lambda data, **options: make(read_scalars(data), **options)


def read_scalars(data: Any) -> Any:
    """Numbers in place of the CUDA scalars in nested lists."""
    if isinstance(data, (list, tuple)):
        return [read_scalars(item) for item in data]
    return data.item() if isinstance(data, FakeTensor) else data
