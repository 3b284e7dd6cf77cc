"""The ranks of a run, and how the parameters are divided among them (FSDP2).

torchrun starts W copies of a script. Each copy is a *rank*, and a `World` says which
one it is. A step's records are divided among the ranks, and so is every parameter: a
rank keeps 1/W of each weight, of its gradient and of its optimiser state. Just before
a block runs, its weights are gathered from all ranks, and dropped again after it ran;
backward averages the gradients and leaves each rank the part that it keeps.

The precision policy, in one place: master weights, summed gradients and optimiser
state are float32; matrix products and activations are in `--dtype` (bfloat16 on CUDA,
from Ampere on); norms, softmax and losses are computed in float32 whatever the dtype.

Left out: tensor and pipeline parallelism.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nano_moca.files import MocaError

# So long ranks wait for each other: one may write a model to a slow disk.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among the ranks that torchrun started (one, without torchrun)."""

    rank: int
    size: int  # W
    device: torch.device
    dtype: torch.dtype  # of matrix products

    @property
    def main(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 is used: for more than one rank, and for products in another
        dtype than that of the weights."""
        return self.size > 1 or self.dtype != torch.float32

    def total(self, *amounts: float | Tensor) -> Tensor:
        """The sum of each amount, a number or a scalar on the device, over all ranks: float64,
        one for each, on the device. The host waits when it reads them."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.stack([zero + amount for amount in amounts])
        if self.size > 1:
            dist.all_reduce(sums)
        return sums

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()


def choose_dtype(device: torch.device, asked: torch.dtype | None,
                 usual: torch.dtype) -> torch.dtype:
    """The dtype of matrix products: the one asked for, else the usual one of the device.

    GPUs before Ampere (2020) compute in float32: they have no bfloat16, nor the kernel
    for packed sequences. MocaError if less than float32 is asked of one.
    """
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if old and asked is not None and asked.itemsize < 4:
        raise MocaError(f"{asked} needs a GPU of Ampere (2020) or later: use dtype float32")
    return asked or (torch.float32 if old else usual)


def init_distributed(device: str | None, dtype: str | None) -> World:
    """Choose device and dtype (None: the best there is), and join the group of ranks.

    MocaError if CUDA is asked for and there is none, or it cannot compute in `dtype`.
    """
    # Torchrun says who we are in three variables; without it we are alone.
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    # Each rank takes the GPU of its number on this machine.
    if device == "cuda" and not torch.cuda.is_available():
        raise MocaError("--device cuda: no CUDA device is visible: use --device cpu")
    chosen, usual, backend = torch.device("cpu"), torch.float32, "gloo"
    if device != "cpu" and torch.cuda.is_available():
        chosen, usual, backend = torch.device("cuda", local_rank), torch.bfloat16, "nccl"
        torch.cuda.set_device(chosen)
    asked = getattr(torch, dtype) if dtype else None
    world = World(rank, size, chosen, choose_dtype(chosen, asked, usual))

    # bfloat16 products over float32 weights are FSDP2's work too: a group even if alone.
    if world.sharded and not dist.is_initialized():
        alone = {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group(
            backend, timeout=PATIENCE, **({} if "RANK" in os.environ else alone))
    return world


def shard(root: nn.Module, blocks: Sequence[nn.Module], world: World) -> None:
    """Divide the parameters among the ranks (FSDP2), and give them memory.

    root: the module that each step calls, still on the meta device: shapes, no memory.
    blocks: modules inside it that run one after another; a block's weights are complete
    only while it runs. The memory holds nothing yet: see `copy_into_shard`.
    """
    if world.sharded:
        mesh = init_device_mesh(world.device.type, (world.size,))

        # Inputs keep their dtype: the rotary angles have to stay float32.
        policy = MixedPrecisionPolicy(
            param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

        # Last the root, which takes what is in no block: embeddings, norms, heads.
        for module in [*blocks, root]:
            fully_shard(module, mesh=mesh, mp_policy=policy)

    # Memory comes only now, so that no rank ever holds a complete model.
    root.to_empty(device=world.device)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_into_shard(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Copy a complete tensor into a parameter of its shape, sharded or not."""
    if isinstance(parameter, DTensor):
        # Every rank has the tensor and cuts out its part: nothing is sent.
        tensor = tensor.to(parameter.device, parameter.dtype)
        tensor = distribute_tensor(
            tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(tensor)
