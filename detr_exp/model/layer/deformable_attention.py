"""Multi-scale deformable attention (RT-DETRv2, arXiv 2407.17140, section 3): a number of points for each level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detr_exp.model.layer.memory import Memory
from detr_exp.ops.deformable import METHODS, deformable_sample
from detr_exp.ops.transfer import filled


class DeformableAttention(nn.Module):
    """Each query reads a few points around its reference box from the maps of all levels.

    Args:
        points_per_level: points each head reads on each level.
        method: "bilinear", or "discrete", which reads single cells. No gradient reaches the offsets then; they are
            frozen, and a network is fine-tuned so from a bilinear one.
        offset_scale: how far, in box sizes, an offset as large as its level's number of points reaches.
        project: whether what is read is projected, before and after (D-FINE reads the memory as it is).
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        points_per_level: list[int],
        method: str = "bilinear",
        offset_scale: float = 0.5,
        project: bool = True,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(
                f"model.hidden_dim {hidden_dim} cannot be split into {num_heads} heads; change model.num_heads"
            )
        if method not in METHODS:
            raise ValueError(f"unknown sampling method {method!r}; use one of {', '.join(METHODS)}")
        self.num_heads = num_heads
        self.points_per_level = list(points_per_level)
        self.method = method
        points = sum(points_per_level)
        self.sampling_offsets = nn.Linear(hidden_dim, num_heads * points * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_heads * points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim) if project else nn.Identity()
        self.output_proj = nn.Linear(hidden_dim, hidden_dim) if project else nn.Identity()
        self.reach: Tensor
        reach = [offset_scale / count for count in points_per_level for _ in range(count)]
        self.register_buffer("reach", torch.tensor(reach)[:, None], persistent=False)
        self._initialise()
        if method == "discrete":
            self.sampling_offsets.requires_grad_(False)

    def _initialise(self) -> None:
        """Offsets of heads point in evenly spaced directions, those of later points of a level farther."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, count + 1) for count in self.points_per_level])
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Queries `[B, Q, D]` -> features that they read `[B, Q, D]`.

        Args:
            reference: `[B, Q, 4]` boxes cxcywh in 0..1, or `[B, Q, 2]` points, around which offsets count in cells of
                their level; its dtype is that of the locations.
            memory: maps to read; padded cells count as zero.
        """
        value, padding = self.value_proj(memory.cells), memory.padded_cells()
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, -1, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        weights = weights.softmax(-1, dtype=reference.dtype)
        center, size = reference[:, :, None, None, :2], reference[:, :, None, None, 2:]
        reach = self.reach.to(reference.dtype) * size if size.shape[-1] else self._cells(memory).to(reference.dtype)
        locations = center + offsets * reach
        sampled = deformable_sample(value, memory.shapes, locations, weights, self.points_per_level, self.method)
        return self.output_proj(sampled)

    def _cells(self, memory: Memory) -> Tensor:
        """Width and height of a cell on the level of each point, in image sizes: `[P, 2]`."""
        sides = filled([side for height, width in memory.shapes for side in (width, height)], memory.cells.device)
        levels = zip(sides.view(-1, 1, 2), self.points_per_level, strict=True)
        return 1 / torch.cat([level.expand(count, -1) for level, count in levels]).to(
            torch.promote_types(memory.cells.dtype, torch.float32)
        )
