"""Patches of images in windows, for attention that mostly stays within them.

Legend: B images, W windows a side, n = W * W windows an image, C width, (h, w) patches a side, t = 1 + h * w / n tokens
a window, the class token first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_windows(patches: Tensor, num_windows: int) -> Tensor:
    """`[B, h, w, C]` -> `[B * n, h * w / n, C]`, windows and the patches within them row by row."""
    cells = patches.unflatten(2, (num_windows, -1)).unflatten(1, (num_windows, -1))
    return cells.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def attended(padded: Tensor, num_windows: int) -> tuple[Tensor, Tensor]:
    """Which tokens are attended to, `[B * n, t]` within windows and `[B, n * t]` across them: those of the image.

    A window's class token is always seen within it, so that there is something to see in a window without image; across
    windows, only that of a window with image.

    Args:
        padded: `[B, h, w]` bool, patches outside of the image.
    """
    seen = split_windows(~padded[..., None], num_windows)[..., 0]
    with_image = seen.any(1, keepdim=True)
    within = torch.cat([torch.ones_like(with_image), seen], dim=1)
    return within, torch.cat([with_image, seen], dim=1).unflatten(0, (len(padded), -1)).flatten(1)


def merge_windows(tokens: Tensor, num_windows: int, grid: torch.Size) -> Tensor:
    """`[B * n, h * w / n, C]` -> `[B, h, w, C]`, the reverse of `split_windows`."""
    rows, columns = grid[0] // num_windows, grid[1] // num_windows
    cells = tokens.view(-1, num_windows, num_windows, rows, columns, tokens.shape[-1])
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
