"""A network with an adapter: what is its own, what the file that it was begun from has, and both put together.

Checkpoints of such a network are slim: they hold what was trained and what follows the data, and name their base, the
file with all that is frozen, by its hash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from detr_exp.protocols import Network
from detr_exp.tensor_files import Stored, sha256_of


@dataclass(frozen=True)
class BaseFile:
    """The file of weights that an adapter belongs to.

    Attributes:
        path: where it was.
        sha256: of its content, in hex digits.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> BaseFile:
        return cls(str(path.resolve()), sha256_of(path))


def find_base(record: Stored, checkpoint: Path) -> Path:
    """The base that a checkpoint names: where it was, or beside the checkpoint.

    Raises:
        ValueError: neither is there, or with another content.
    """
    path, wanted = Path(str(record.get("path"))), record.get("sha256")
    there = [place for place in (path, checkpoint.parent / path.name) if place.is_file()]
    for place in there:
        if sha256_of(place) == wanted:
            return place
    found = f"{there[0]} is another one" if there else f"{path} is not there"
    raise ValueError(
        f"{checkpoint} holds an adapter for the base with sha256 {str(wanted)[:12]}..., but {found}; put that base "
        f"there, or as {path.name} beside the checkpoint"
    )


@torch.no_grad()
def undetermined_by(load: Callable[[], None], network: nn.Module) -> set[str]:
    """Load weights into a network; what they do not determine keeps its values.

    Returns:
        names of the parameters of which some value is not from these weights.
    """
    parameters = {name: tensor for name, tensor in network.named_parameters() if tensor.is_floating_point()}
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    for tensor in parameters.values():
        tensor.fill_(torch.nan)
    load()
    missing = {name: tensor.isnan() for name, tensor in parameters.items()}
    for name, tensor in parameters.items():
        tensor.copy_(torch.where(missing[name], before[name], tensor))
    return {name for name, where in missing.items() if where.any()}


def own_state(network: Network) -> dict[str, Tensor]:
    """The state dict without the frozen parameters, which the base has."""
    frozen = _frozen(network)
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def load_own_state(network: Network, state: Stored) -> None:
    """Load what `own_state` gave.

    Raises:
        RuntimeError: it is of another network or adapter.
    """
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unlike := set(missing) ^ _frozen(network) | set(unexpected):
        raise RuntimeError(f"the adapter is of another kind in {len(unlike)} tensors: {', '.join(sorted(unlike)[:5])}")


@torch.no_grad()
def merge(network: Network) -> Network:
    """Put adapted weights in the place of those they are computed from, in place; the network computes the same.

    Whatever an adapter registers by `torch.nn.utils.parametrize` is merged.
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
