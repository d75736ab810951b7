"""Queries in groups: their content and reference boxes before the decoder.

Two-stage selection (Deformable DETR, Zhu et al. 2021, section 4.2) proposes a box at every cell and keeps the best;
with groups (Group DETR, Chen et al. 2023) each does so with weights of its own. The weights of all groups are stacked,
so that a step of the work is one batched product.

Legend: B images, S cells of all levels, G groups, Q queries a group, D width, C logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.memory import Memory
from detr_exp.model.layer.mlp import MLP
from detr_exp.model.layer.query_selection import best_cells
from detr_exp.model.layer.reference import embed_boxes, refine_boxes


class Selection(NamedTuple):
    """Cells selected in the image, group by group; the tensors have gradients.

    Attributes:
        tokens: `[B, G * Q, D]` cells as the group sees them.
        logits: `[B, G * Q, C]`.
        boxes: `[B, G * Q, 4]` cxcywh.
    """

    tokens: Tensor
    logits: Tensor
    boxes: Tensor


class Start(NamedTuple):
    """Inputs of the decoder.

    Attributes:
        content: `[B, G * Q, D]`.
        position: `[B, G * Q, D]`, of `reference`.
        reference: `[B, G * Q, 4]` boxes cxcywh, without gradient into the image.
        groups: G, which do not see each other.
    """

    content: Tensor
    position: Tensor
    reference: Tensor
    groups: int


class GroupQueries(nn.Module):
    """Queries whose content is learned, and whose boxes are selected in the image and moved by a learned change.

    Args:
        hidden_dim: D.
        num_logits: C.
        num_queries: Q; fewer where the image has fewer cells.
        num_groups: G.
    """

    def __init__(self, *, hidden_dim: int, num_logits: int, num_queries: int, num_groups: int) -> None:
        super().__init__()
        for name, count in (("num_queries", num_queries), ("num_groups", num_groups)):
            if count < 1:
                raise ValueError(f"model.{name} is {count}; it must be at least 1: model.{name}=1")
        self.num_queries = num_queries
        self.project = GroupLinear(num_groups, hidden_dim, hidden_dim)
        self.norm = GroupNorm(num_groups, hidden_dim)
        self.class_head = GroupLinear(num_groups, hidden_dim, num_logits)
        self.box_head = GroupMLP(num_groups, hidden_dim, 4)
        self.content = nn.Parameter(torch.randn(num_groups, num_queries, hidden_dim))
        self.delta = nn.Parameter(torch.zeros(num_groups, num_queries, 4))
        self.position_mlp = MLP(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        for layer in self.position_mlp.children():
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, memory: Memory, groups: int) -> tuple[Selection, Start]:
        """Select the queries of the first `groups` groups."""
        selected = self._select(memory, groups)
        per_group = selected.boxes.shape[1] // groups
        reference = refine_boxes(self.delta[:groups, :per_group].flatten(0, 1), selected.boxes.detach())
        content = self.content[:groups, :per_group].flatten(0, 1).expand(memory.cells.shape[0], -1, -1)
        position = self.position_mlp(embed_boxes(reference, content.shape[-1] // 2).to(content.dtype))
        return selected, Start(content, position, reference, groups)

    def keep_groups(self, count: int) -> None:
        """Drop all groups but the first `count`, and queries that are not used, in place."""
        self.content = nn.Parameter(self.content[:count, : self.num_queries].clone())
        self.delta = nn.Parameter(self.delta[:count, : self.num_queries].clone())
        for part in (self.project, self.norm, self.class_head, *self.box_head.layers):
            part.keep_groups(count)

    def _select(self, memory: Memory, groups: int) -> Selection:
        """A cell without valid proposal counts as zero, and its box has no size.

        Cells are scored without gradients: only those selected are computed again with them, which is where all of the
        gradient goes.
        """
        proposals, valid = memory.proposals()
        cells = memory.cells.masked_fill(~valid[..., None], 0.0)
        proposals = proposals.masked_fill(~valid[..., None], 0.0).expand(cells.shape[0], -1, -1)
        with torch.no_grad():
            scores = self.class_head(self._seen(cells.expand(groups, -1, -1, -1))).amax(-1)
            padded = memory.padded_cells()
            best = best_cells(scores, min(self.num_queries, cells.shape[1]), padded)  # [G, B, Q]
        first = torch.arange(cells.shape[0], device=cells.device)[:, None] * cells.shape[1]
        rows = (best + first).flatten()
        tokens = self._seen(cells.flatten(0, 1).index_select(0, rows).view(*best.shape, -1))
        proposals = proposals.flatten(0, 1).index_select(0, rows).view(*best.shape, 4)
        boxes = refine_boxes(self.box_head(tokens), proposals)
        return Selection(*(part.transpose(0, 1).flatten(1, 2) for part in (tokens, self.class_head(tokens), boxes)))

    def _seen(self, cells: Tensor) -> Tensor:
        """`[G, B, S, D]` -> the same, projected and normalised by every group."""
        return self.norm(self.project(cells))


class GroupLinear(nn.Module):
    """G linear layers side by side, each for its own slice of the input."""

    def __init__(self, num_groups: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(num_groups, out_dim))
        bound = 1 / math.sqrt(in_dim)
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[g, B, S, in]` -> `[g, B, S, out]` by the first g layers."""
        groups = tokens.shape[0]
        rows = tokens.flatten(1, 2)
        mixed = torch.baddbmm(self.bias[:groups, None], rows, self.weight[:groups].transpose(1, 2))
        return mixed.unflatten(1, tokens.shape[1:3])

    def keep_groups(self, count: int) -> None:
        self.weight = nn.Parameter(self.weight[:count].clone())
        self.bias = nn.Parameter(self.bias[:count].clone())

    @torch.no_grad()
    def copy_(self, linear: nn.Linear) -> None:
        """Make every layer a copy of `linear`."""
        self.weight.copy_(linear.weight)
        self.bias.copy_(linear.bias)


class GroupNorm(nn.Module):
    """G layer norms side by side."""

    def __init__(self, num_groups: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_groups, dim))
        self.bias = nn.Parameter(torch.zeros(num_groups, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[g, B, S, D]` -> the same, by the first g norms."""
        groups = tokens.shape[0]
        normal = F.layer_norm(tokens, tokens.shape[-1:])
        return normal * self.weight[:groups, None, None] + self.bias[:groups, None, None]

    def keep_groups(self, count: int) -> None:
        self.weight = nn.Parameter(self.weight[:count].clone())
        self.bias = nn.Parameter(self.bias[:count].clone())


class GroupMLP(nn.Module):
    """G perceptrons of three layers side by side, as the heads of the decoder."""

    def __init__(self, num_groups: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GroupLinear(num_groups, dim, out) for out in (dim, dim, out_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[g, B, S, D]` -> `[g, B, S, out]`."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(tokens)))))

    def copy_(self, mlp: MLP) -> None:
        """Make every perceptron a copy of `mlp`."""
        for layer, linear in zip(self.layers, mlp.layers):
            cast(GroupLinear, layer).copy_(cast(nn.Linear, linear))
