"""The decoder of RF-DETR: light layers that read the image around fixed reference boxes.

Legend: B images, G groups of Q queries, L layers, D width.
"""

from __future__ import annotations

from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from detr_exp.model.layer.group_decoder_layer import GroupDecoderLayer
from detr_exp.model.layer.group_queries import Start
from detr_exp.model.layer.memory import Memory


class Decoder(Protocol):
    """What `RFDETR` needs of its decoder; an `nn.Module`."""

    def __call__(self, start: Start, memory: Memory) -> Tensor:
        """`forward`: queries after each layer `[L, B, G * Q, D]`; in evaluation only after the last one, L = 1."""


class GroupDecoder(nn.ModuleList):
    """Layers one after another.

    Args:
        hidden_dim: D.
        num_layers: L.
        num_levels: maps in the memory.
        num_heads: heads of the self-attention.
        num_cross_heads: heads of the deformable attention.
        num_points: points each of them reads on each level.
        dim_feedforward: width of the feed-forward networks.
    """

    def __init__(
        self,
        *,
        hidden_dim: int,
        num_layers: int,
        num_levels: int,
        num_heads: int,
        num_cross_heads: int,
        num_points: int,
        dim_feedforward: int,
    ) -> None:
        super().__init__(
            GroupDecoderLayer(
                hidden_dim=hidden_dim,
                num_heads=num_heads,
                num_cross_heads=num_cross_heads,
                points_per_level=[num_points] * num_levels,
                dim_feedforward=dim_feedforward,
            )
            for _ in range(num_layers)
        )
        self.depth: int | None = None
        self.every_layer = False

    @property
    def num_layers(self) -> int:
        return len(self)

    def shorten(self) -> None:
        """Drop the layers that evaluation does not compute, in place."""
        del self[self.depth or len(self) :]

    def forward(self, start: Start, memory: Memory) -> Tensor:
        """Queries after each layer `[L, B, G * Q, D]`; in evaluation only after the last one, L = 1."""
        queries, hidden = start.content, []
        for layer in islice(self, self.depth):
            queries = layer(queries, start, memory)
            hidden.append(queries)
        return torch.stack(hidden if self.training or self.every_layer else hidden[-1:])
