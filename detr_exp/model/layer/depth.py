"""Decoders that can be stopped after any of their layers.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Layered(Protocol):
    """A part of one layer after another, of which the first few can be computed alone; an `nn.Module`."""

    depth: int | None  # layers that are computed; None: all in training, in evaluation those that count
    every_layer: bool  # evaluation gives what every computed layer predicts, and not only the last of them

    @property
    def num_layers(self) -> int:
        """L, of which `depth` is at most."""

    def shorten(self) -> None:
        """Drop the layers that evaluation does not compute, in place."""


def layer_by_layer(
    compute: Callable[[Tensor], tuple[Tensor, ...]], states: Tensor, training: bool
) -> tuple[Tensor, ...]:
    """What a head computes from the states `[L, ...]` of several layers, stacked.

    In training from all at once; in evaluation from one after another, because a product of more rows may be rounded in
    another way, and the predictions of a layer must be those that it gives alone.
    """
    if training or len(states) == 1:
        return compute(states)
    return tuple(torch.cat(parts) for parts in zip(*map(compute, states.split(1))))
