"""FSDP: every rank holds a part of each parameter, and gathers full parameters for computation.

Sharded tensors are torch's `DTensor`s. All other parts of the trainer use these functions to access them; plain
tensors stay unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detr_exp.protocols import Network
from detr_exp.tensor_files import Stored

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

SHARDS, PREFIX = "shards", "shards_"  # key of a checkpoint for the folder of its shards, and prefix of that folder
MIN_UNIT_SHARE = 0.02  # of all parameters; smaller blocks of the backbone are not sharded as separate units


def shard(network: nn.Module) -> nn.Module:
    """Split the parameters over all ranks, in place; blocks of the backbone are gathered one at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # every unit warns that its outputs are views and must not be modified in place, which no code here does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Innermost modules of sequences in the backbone that have enough parameters to be a unit."""
    smallest = MIN_UNIT_SHARE * sum(parameter.numel() for parameter in network.parameters())
    chosen: list[nn.Module] = []
    backbone = dict(network.named_children()).get("backbone", nn.Module())
    for parent in reversed(list(backbone.modules())):
        for child in parent.children() if isinstance(parent, nn.Sequential | nn.ModuleList) else ():
            inside = set(child.modules())
            if isinstance(child, nn.ModuleList) or any(block in inside for block in chosen):
                continue
            if sum(parameter.numel() for parameter in child.parameters()) >= smallest:
                chosen.append(child)
    return chosen


@contextmanager
def gathered_weights(network: Network) -> Iterator[None]:
    """Inside, every rank has all weights and runs forward passes independently: ranks may have different batches."""
    units, root = [module for module in network.modules() if is_fsdp_module(module)], id(network)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(id(unit) != root, recurse=False)


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    return hasattr(tensor, "to_local")


def is_fsdp_module(module: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(module, "unshard")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; shares its memory."""
    detached = tensor.detach()
    return detached.to_local() if is_sharded(detached) else tensor


def from_local_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor sharded like `tensor`, whose part on this rank is `part`."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank; all ranks must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def each_tensor(nest: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """A copy of nested dictionaries and lists with every tensor changed, given its dotted name."""
    if isinstance(nest, dict):
        return {key: each_tensor(value, change, f"{name}.{key}") for key, value in nest.items()}
    if isinstance(nest, list | tuple):
        return type(nest)(each_tensor(value, change, f"{name}.{i}") for i, value in enumerate(nest))
    return change(name, nest) if isinstance(nest, Tensor) else nest


def copied(state: Stored) -> Stored:
    """A state of copies on the host, which training does not change; sharded tensors and those without values stay."""

    def copy(name: str, tensor: Tensor) -> Tensor:
        return tensor if is_sharded(tensor) or tensor.is_meta else tensor.detach().to("cpu", copy=True)

    return each_tensor(state, copy)


def sharded_like(state: Stored, like: Stored) -> Stored:
    """Full tensors, sharded like the tensors of the same name in `like`."""
    return {name: _sharded_like(value, like.get(name)) for name, value in state.items()}


def _sharded_like(value: T, like: object) -> T | Tensor:
    if not is_sharded(like) or is_sharded(value) or not isinstance(value, Tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def optimizer_sharded_like(state: Stored, optimizer: torch.optim.Optimizer) -> Stored:
    """A full optimiser state, sharded like its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: _sharded_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}
