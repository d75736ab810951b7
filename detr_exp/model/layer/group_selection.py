"""Two-stage selection of reference boxes, for several groups of queries at once.

Deformable DETR (Zhu et al. 2021, section 4.2) proposes a box at every cell and keeps the best; Group DETR (Chen et
al. 2023) does it once for each of G groups, with weights of their own. The weights of all groups are stacked, so that
a step of the work is one batched product.

Legend: B images, S cells of all levels, G groups, Q queries a group, D width, C logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.reference import refine_boxes
from detr_exp.ops.deformable import Shapes


class Selection(NamedTuple):
    """What was selected, group by group; the tensors carry gradients.

    Attributes:
        tokens: `[B, G * Q, D]` cells as the group sees them.
        logits: `[B, G * Q, C]`.
        boxes: `[B, G * Q, 4]` cxcywh.
    """

    tokens: Tensor
    logits: Tensor
    boxes: Tensor


class GroupSelection(nn.Module):
    """Scores every cell, and refines the proposals of the best into boxes.

    Args:
        hidden_dim: D.
        num_logits: C.
        num_queries: cells kept for each group, or all of them where there are fewer.
        num_groups: G.
    """

    def __init__(self, *, hidden_dim: int, num_logits: int, num_queries: int, num_groups: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.project = GroupLinear(num_groups, hidden_dim, hidden_dim)
        self.norm = GroupNorm(num_groups, hidden_dim)
        self.classify = GroupLinear(num_groups, hidden_dim, num_logits)
        self.box = nn.ModuleList(GroupLinear(num_groups, hidden_dim, out) for out in (hidden_dim, hidden_dim, 4))

    def forward(self, memory: Tensor, proposals: Tensor, valid: Tensor, groups: int) -> Selection:
        """Cells `[B, S, D]` with `proposals` `[B, S, 4]`, `valid` `[B, S]` -> the first `groups` groups' selections.

        A cell without valid proposal counts as zero, and its box has no size. Cells are scored without gradients:
        only those selected are computed again with them, which is where all of the gradient goes.
        """
        memory = memory.masked_fill(~valid[..., None], 0.0)
        proposals = proposals.masked_fill(~valid[..., None], 0.0).expand(len(memory), -1, -1)
        with torch.no_grad():
            scores = self.classify(self._seen(memory.expand(groups, -1, -1, -1))).amax(-1)
            best = scores.topk(min(self.num_queries, memory.shape[1]), dim=-1).indices  # [G, B, Q]
        first = torch.arange(len(memory), device=memory.device)[:, None] * memory.shape[1]
        rows = (best + first).flatten()
        tokens = self._seen(memory.flatten(0, 1).index_select(0, rows).view(*best.shape, -1))
        delta = tokens
        for index, linear in enumerate(self.box):
            delta = linear(F.relu(delta) if index else delta)
        boxes = refine_boxes(delta, proposals.flatten(0, 1).index_select(0, rows).view(*best.shape, 4))
        return Selection(*(part.transpose(0, 1).flatten(1, 2) for part in (tokens, self.classify(tokens), boxes)))

    def keep_groups(self, count: int) -> None:
        """Drop all groups but the first `count`, in place."""
        for part in self.modules():
            if isinstance(part, GroupLinear | GroupNorm):
                part.weight = nn.Parameter(part.weight[:count].clone())
                part.bias = nn.Parameter(part.bias[:count].clone())

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
        groups = len(tokens)
        rows = tokens.flatten(1, 2)
        mixed = torch.baddbmm(self.bias[:groups, None], rows, self.weight[:groups].transpose(1, 2))
        return mixed.unflatten(1, tokens.shape[1:3])


class GroupNorm(nn.Module):
    """G layer norms side by side."""

    def __init__(self, num_groups: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_groups, dim))
        self.bias = nn.Parameter(torch.zeros(num_groups, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[g, B, S, D]` -> the same, by the first g norms."""
        groups = len(tokens)
        normal = F.layer_norm(tokens, tokens.shape[-1:])
        return normal * self.weight[:groups, None, None] + self.bias[:groups, None, None]


def grid_proposals(spatial_shapes: Shapes, padding: list[Tensor] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """A square box on every cell, 0.05 of the image on the first level and twice as large on each further one.

    Args:
        spatial_shapes: (height, width) of each level.
        padding: for each level `[B, height, width]` bool, True where there is no picture; boxes are then relative to
            the picture.

    Returns:
        boxes `[B or 1, S, 4]` cxcywh, and `[B or 1, S]` whether a proposal is valid: all of it within 0.01..0.99, and
        not on padding.
    """
    boxes = []
    for level, (height, width) in enumerate(spatial_shapes):
        extent = torch.tensor([[width, height]], device=device) if padding is None else picture_extent(padding[level])
        x = torch.arange(width, device=device).expand(height, width)
        y = torch.arange(height, device=device)[:, None].expand(height, width)
        center = (torch.stack([x, y], dim=-1) + 0.5) / extent[:, None, None].float()
        boxes.append(torch.cat([center, torch.full_like(center, 0.05 * 2**level)], dim=-1).flatten(1, 2))
    proposals = torch.cat(boxes, dim=1)
    valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1)
    if padding is not None:
        valid = valid & ~torch.cat([mask.flatten(1) for mask in padding], dim=1)
    return proposals, valid


def picture_extent(padding: Tensor) -> Tensor:
    """`[B, h, w]` bool, True on padding -> `[B, 2]` (columns, rows) of cells that show the picture."""
    return torch.stack([(~padding[:, 0]).sum(-1), (~padding[:, :, 0]).sum(-1)], dim=-1)
