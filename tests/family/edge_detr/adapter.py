"""An adapter: a factor for each output of the attention's linear layers."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Gain(nn.Module):
    """A weight `[O, I]` -> the weight times a factor for each output, at first 1."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones_like(weight[:, :1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


class Gains:
    """The member of `protocols.Adapter`.

    Args:
        where: part of the names of the layers that are adapted.
    """

    def __init__(self, *, where: str) -> None:
        self.where = where

    def adapt(self, network: nn.Module, anew: Collection[str]) -> None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in anew)
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Linear) and self.where in name:
                parametrize.register_parametrization(module, "weight", Gain(module.weight))
