"""Multi-layer perceptron."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from detr_exp.model.layer.activation import activation
from detr_exp.ops.products import activated


class MLP(nn.Module):
    """`num_layers` linear layers with an activation between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, act: str = "relu") -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        self.act = activation(act)

    def forward(self, tokens: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            tokens = activated(layer, self.act, tokens)
        return last(tokens)
