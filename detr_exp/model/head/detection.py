"""Classes and boxes of queries."""

from __future__ import annotations

import math

from torch import Tensor, nn

from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.reference import refine_boxes

PRIOR = 0.01  # score of every class before training, so that the many negatives do not dominate the first steps


class DetectionHead(nn.Module):
    """Class logits, and boxes relative to the queries' reference boxes; both shared by all decoder layers.

    Args:
        hidden_dim: D.
        num_logits: C.
        activation: of the logits, "sigmoid" or "softmax".
    """

    def __init__(self, *, hidden_dim: int, num_logits: int, activation: str) -> None:
        super().__init__()
        self.classes = nn.Linear(hidden_dim, num_logits)
        self.box = MLP(hidden_dim, hidden_dim, 4, 3)
        if activation == "sigmoid":
            nn.init.constant_(self.classes.bias, -math.log((1 - PRIOR) / PRIOR))
        for parameter in self.box.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, queries: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[..., Q, D]` at boxes `[Q, 4]` cxcywh -> logits `[..., Q, C]` and boxes `[..., Q, 4]`."""
        return self.classes(queries), refine_boxes(self.box(queries), reference)
