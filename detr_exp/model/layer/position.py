"""Sine embeddings of positions, and learned ones on other grids."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@runtime_checkable
class Positioned(Protocol):
    """A module whose learned positions are resampled for every size of images."""

    def fit_positions(self, image_size: tuple[int, int]) -> None:
        """Resample them once, in place, for images of (height, width) pixels."""


def fit_positions(network: nn.Module, image_size: tuple[int, int]) -> None:
    """`Positioned.fit_positions` of all modules of a network."""
    for module in network.modules():
        if isinstance(module, Positioned):
            module.fit_positions(image_size)


def resample_position(position: Tensor, grid: tuple[int, int] | torch.Size, *, antialias: bool = True) -> Tensor:
    """Position embedding `[1, C, rows, columns]` on another grid."""
    if position.shape[-2:] == tuple(grid):
        return position
    resampled = F.interpolate(
        position.to(torch.promote_types(position.dtype, torch.float32)),
        size=tuple(grid),
        mode="bicubic",
        align_corners=False,
        antialias=antialias and position.device.type != "mps",  # which has no antialiased kernel
    )
    return resampled.to(position.dtype)


def sine_position_embedding(
    height: int, width: int, dim: int, temperature: float, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Sine and cosine of row and column of each cell ("Attention is all you need", section 3.5, in two dimensions).

    Args:
        dim: a multiple of four; a quarter each for sin(row), cos(row), sin(column), cos(column).
        temperature: the slowest wave is about this many cells long, over 2 pi.

    Returns:
        `[height * width, dim]`, row by row.
    """
    if dim % 4:
        raise ValueError(f"a sine embedding has {dim} channels but needs a multiple of 4; change model.neck.hidden_dim")
    exact = torch.promote_types(dtype, torch.float32)
    quarter = dim // 4
    speed = temperature ** (-torch.arange(quarter, dtype=exact, device=device) / quarter)
    rows = torch.arange(height, dtype=exact, device=device)[:, None] * speed
    columns = torch.arange(width, dtype=exact, device=device)[:, None] * speed
    by_row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, width, -1)
    by_column = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(height, -1, -1)
    return torch.cat([by_row, by_column], dim=-1).flatten(0, 1).to(dtype)
