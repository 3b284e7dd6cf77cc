"""What kernels ask of their arguments, and FakeTensors do not check.

A FakeTensor knows the shape that an operator would give, but the operator's CUDA code is not
there, and neither are its assertions. These are the ones that matter on our path, from the
source of PyTorch and FlashAttention. Each is RuntimeError that names the line of our code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def check(op: Any, name: str, args: tuple, kwargs: dict, line: str) -> None:
    """RuntimeError if the operator's kernel would refuse these arguments."""
    demand = DEMANDS.get(name)
    if demand is None:
        return
    names = [argument.name for argument in op._schema.arguments]
    try:
        demand(**dict(zip(names, args, strict=False)) | kwargs)
    except AssertionError as error:
        raise RuntimeError(f"{line}: {name} would refuse: {error}") from None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
                    max_q: int, max_k: int, enable_gqa: bool = False, **rest: object) -> None:
    """FlashAttention 2 over packed sequences (flash_api.cpp, mha_varlen_fwd and mha_varlen_bwd)."""
    assert query.dtype in HALF, f"only bfloat16 and float16, not {query.dtype}"
    assert query.dtype == key.dtype == value.dtype, "query, key and value of one dtype"
    assert all(x.stride(-1) == 1 for x in (query, key, value)), "heads without gaps"

    # Offsets are read as int32, whatever they are.
    for offsets in (cu_seq_q, cu_seq_k):
        assert offsets.dtype == torch.int32, f"offsets of int32, not {offsets.dtype}"
        assert offsets.is_contiguous(), "offsets without gaps"
        assert offsets.device == query.device, "offsets on the device"
    assert type(max_q) is int and type(max_k) is int, "the longest length as a number"

    # Heads. In 2.11 the argument `enable_gqa` is not there yet, and the operator does not look.
    width, heads, kv_heads = query.shape[-1], query.shape[1], key.shape[1]
    assert width % 8 == 0 and width <= 256, f"heads of a multiple of 8 up to 256, not {width}"
    assert key.shape == value.shape, "key and value of one shape"
    assert heads % kv_heads == 0, f"{kv_heads} kv heads do not divide {heads}"
    assert enable_gqa or heads == kv_heads, f"{kv_heads} kv heads for {heads}: repeat them"


def flash_attention_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor,
                             cu_seq_q: Tensor, cu_seq_k: Tensor, **rest: object) -> None:
    """The same, on the way back."""
    assert grad_out.dtype == query.dtype, f"a gradient of {query.dtype}, not {grad_out.dtype}"
    rest = {"max_q": 1, "max_k": 1, "enable_gqa": True}  # looked at on the way forward
    flash_attention(query, key, value, cu_seq_q, cu_seq_k, **rest)


def matmul(mat2: Tensor, **rest: Any) -> None:
    """cuBLAS multiplies two matrices of one dtype, and adds to a third of the same."""
    first = rest.get("mat1", rest.get("self"))
    assert first.dtype == mat2.dtype, f"factors of one dtype, not {first.dtype} and {mat2.dtype}"
    for other in ("self", "out"):
        tensor = rest.get(other)
        assert tensor is None or tensor.dtype == mat2.dtype, (
            f"{other} of the factors' dtype, not {tensor.dtype}")


def wide_matmul(self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype,
                out: Tensor | None = None, **rest: object) -> None:
    """addmm(..., out_dtype=): half factors, added up in float32 (Blas.cpp, since 2.10)."""
    assert mat1.dtype == mat2.dtype, f"factors of one dtype, not {mat1.dtype} and {mat2.dtype}"
    assert out_dtype == mat1.dtype or (out_dtype == torch.float32 and mat1.dtype in HALF), (
        f"{mat1.dtype} factors do not give {out_dtype}")
    assert self.dtype in (out_dtype, mat1.dtype), f"what is added to is {self.dtype}"
    assert out is None or out.dtype == out_dtype, f"an output of {out_dtype}, not {out.dtype}"


DEMANDS: dict[str, Callable[..., None]] = {
    "torch_attn::_varlen_attn": flash_attention,
    "torch_attn::_varlen_attn_backward": flash_attention_backward,
    "aten::mm": matmul, "aten::mm.out": matmul, "aten::bmm": matmul, "aten::addmm": matmul,
    "aten::addmm_": matmul, "aten::addmm.out": matmul,
    "aten::addmm.dtype": wide_matmul, "aten::addmm.dtype_out": wide_matmul}


# --- Triton ---------------------------------------------------------------------------

# The dtypes that test_kernels.py compiles for real GPUs, by kernel and argument.
COMPILED = {"cross_entropy_kernel": {"logits": (torch.float32, torch.bfloat16),
                                     "labels": (torch.int64,), "losses": (torch.float32,)}}


class Launch:
    """Stands in for a Triton kernel: looks at what it is launched with, and runs nothing."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.arguments = arguments
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """kernel[grid](...), as Triton writes it."""
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
            self.count += 1
            given = dict(zip(self.arguments, args, strict=False)) | kwargs
            lacking = set(self.arguments) ^ set(given)
            assert not lacking, f"{self.name}: arguments {sorted(lacking)}"
            assert all(size > 0 for size in grid) or 0 in given["logits"].shape

            # A kernel reads memory by address: on which device, and with gaps or not, it
            # does not know.
            tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
            for key, tensor in tensors.items():
                assert tensor.device.type == "cuda", f"{self.name}: {key} is on the CPU"
                assert tensor.is_contiguous(), f"{self.name}: {key} has gaps"
                allowed = COMPILED.get(self.name, {}).get(key, (tensor.dtype,))
                assert tensor.dtype in allowed, f"{self.name}: {key} is {tensor.dtype}"
            for size in (num_warps, given.get("BLOCK", 1)):
                assert size & (size - 1) == 0, f"{self.name}: {size} is no power of two"

        return launch


def stand_in_for_kernels(module: Any) -> list[Launch]:
    """Put stand-ins in the place of all Triton kernels of a module."""
    stand_ins = []
    for name, value in list(vars(module).items()):
        if hasattr(value, "arg_names") and hasattr(value, "fn"):
            stand_ins.append(Launch(name, list(value.arg_names)))
            setattr(module, name, stand_ins[-1])
    return stand_ins
