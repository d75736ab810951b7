"""The decoder of RF-DETR Keypoint: as `rfdetr.py`, with the keypoints of every query as a second stream.

Legend: as there, and N keypoints of all classes.
"""

from __future__ import annotations

from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from detr_exp.model.layer.group_queries import Start
from detr_exp.model.layer.keypoint_decoder_layer import KeypointDecoderLayer, KeypointStart
from detr_exp.model.layer.memory import Memory


class Decoder(Protocol):
    """What `RFDETRKeypoint` needs of its decoder; an `nn.Module`."""

    def __call__(self, start: Start, keypoint_start: KeypointStart, memory: Memory) -> tuple[Tensor, Tensor]:
        """`forward`: queries `[L, B, G * Q, D]` and keypoints `[L, B, G * Q, N, D]` after each layer.

        In evaluation only after the last one, L = 1.
        """


class KeypointDecoder(nn.ModuleList):
    """Layers one after another; arguments as in `GroupDecoder`."""

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
            KeypointDecoderLayer(
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

    def forward(self, start: Start, keypoint_start: KeypointStart, memory: Memory) -> tuple[Tensor, Tensor]:
        """Queries `[L, B, G * Q, D]` and keypoints `[L, B, G * Q, N, D]` after each layer, or only after the last."""
        queries, keypoints, hidden, keypoint_hidden = start.content, keypoint_start.content, [], []
        for layer in islice(self, self.depth):
            queries, keypoints = layer(queries, keypoints, start, keypoint_start, memory)
            hidden.append(queries)
            keypoint_hidden.append(keypoints)
        first = 0 if self.training or self.every_layer else -1
        return torch.stack(hidden[first:]), torch.stack(keypoint_hidden[first:])
