"""Networks with an adapter: their own tensors, those of the base file they started from, and both merged.

Checkpoints of such a network are slim: they hold the trained parameters and the buffers, and name their base, the file
with all frozen parameters, by its hash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from detr_exp.protocols import Network
from detr_exp.tensor_files import Stored, sha256_of

T = TypeVar("T")


@dataclass(frozen=True)
class BaseFile:
    """The file of weights that an adapter belongs to.

    Attributes:
        path: of the file when the training started.
        sha256: of its content, in hex digits.
    """

    path: str
    sha256: str


def find_base(record: Stored, checkpoint: Path) -> Path:
    """The base that a checkpoint names: at its original path, or beside the checkpoint under any name.

    Raises:
        ValueError: it is at neither place.
    """
    path, wanted = Path(str(record.get("path"))), record.get("sha256")
    beside = (file for file in sorted(checkpoint.parent.glob(f"*{path.suffix}")) if not file.samefile(checkpoint))
    for file in (path, *beside):
        if file.is_file() and sha256_of(file) == wanted:
            return file
    problem = f"{path} is another file" if path.is_file() else f"{path} does not exist"
    raise ValueError(
        f"{checkpoint} holds an adapter for the base with sha256 {str(wanted)[:12]}..., but {problem}; put that base "
        "there, or beside the checkpoint under a name that is free"
    )


@torch.no_grad()
def undetermined_by(load: Callable[[], T], network: nn.Module) -> tuple[set[str], T]:
    """Load weights into a network; parameters that they do not determine keep their values.

    Returns:
        names of the parameters with at least one value that is not from these weights, and the result of `load`.
    """
    parameters = {name: tensor for name, tensor in network.named_parameters() if tensor.is_floating_point()}
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    for tensor in parameters.values():
        tensor.fill_(torch.nan)
    result = load()
    missing = {name: tensor.isnan() for name, tensor in parameters.items()}
    for name, tensor in parameters.items():
        tensor.copy_(torch.where(missing[name], before[name], tensor))
    return {name for name, where in missing.items() if where.any()}, result


def own_state(network: Network) -> dict[str, Tensor]:
    """The state dict without the frozen parameters, which are in the base."""
    frozen = _frozen(network)
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def load_own_state(network: Network, state: Stored) -> None:
    """Load a result of `own_state`.

    Raises:
        RuntimeError: the tensors belong to another network or adapter.
    """
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unlike := set(missing) ^ _frozen(network) | set(unexpected):
        raise RuntimeError(f"the adapter is of another kind in {len(unlike)} tensors: {', '.join(sorted(unlike)[:5])}")


@torch.no_grad()
def merge(network: Network) -> Network:
    """Replace the weights by the adapted ones, in place; the network computes the same.

    All that an adapter registers by `torch.nn.utils.parametrize` is merged.
    """
    adapted = [
        (module, name, getattr(module, name).clone())
        for module in list(network.modules())
        if parametrize.is_parametrized(module)
        for name, made in module.parametrizations.items()  # type: ignore[union-attr, operator]
        if made.is_tensor  # one tensor computed from another, as adapters do
    ]
    for module, name, weight in adapted:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        getattr(module, name).copy_(weight)  # in place: a weight that several layers share stays shared
    return network


def _frozen(network: Network) -> set[str]:
    return {name for name, tensor in network.named_parameters(remove_duplicate=False) if not tensor.requires_grad}
