"""Patches of images in windows, for attention that mostly stays within them.

Legend: B images, W windows a side, n = W * W windows an image, C width, (h, w) patches a side, t = 1 + h * w / n tokens
a window, the class token first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def refuse_uneven(image_size: Sequence[int], patch_size: int, num_windows: int) -> None:
    """Refuse images that cannot be cut into windows of whole patches.

    Raises:
        ValueError: names the nearest sizes (height, width) that can.
    """
    (height, width), unit = image_size, patch_size * num_windows
    if height % unit == 0 and width % unit == 0:
        return
    lower = [max(1, side // unit) * unit for side in (height, width)]
    upper = [-(-side // unit) * unit for side in (height, width)]
    raise ValueError(
        f"model.image_size is [{height}, {width}], but this backbone needs sides that are multiples of {unit} "
        f"(patch_size {patch_size} x num_windows {num_windows}); the nearest are "
        f"model.image_size=[{lower[0]},{lower[1]}] and model.image_size=[{upper[0]},{upper[1]}]"
    )


def split_windows(patches: Tensor, num_windows: int) -> Tensor:
    """`[B, h, w, C]` -> `[B * n, h * w / n, C]`, windows and the patches within them row by row."""
    cells = patches.unflatten(2, (num_windows, -1)).unflatten(1, (num_windows, -1))
    return cells.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def attended(padded: Tensor, num_windows: int, *, with_class: bool = True) -> tuple[Tensor, Tensor]:
    """Which tokens are attended to, `[B * n, t]` within windows and `[B, n * t]` across them: those of the image.

    There is something to see in a window without image, too: its class token, or without class tokens all of it. Across
    windows, class tokens are seen only of windows with image.

    Args:
        padded: `[B, h, w]` bool, patches outside of the image.
        with_class: whether windows have a class token.
    """
    seen = split_windows(~padded[..., None], num_windows)[..., 0]
    with_image = seen.any(1, keepdim=True)
    if not with_class:
        return seen | ~with_image, seen.unflatten(0, (len(padded), -1)).flatten(1)
    within = torch.cat([torch.ones_like(with_image), seen], dim=1)
    return within, torch.cat([with_image, seen], dim=1).unflatten(0, (len(padded), -1)).flatten(1)


def visible(padding_mask: Tensor, patch_size: int, num_others: int) -> Tensor:
    """Which tokens are attended to where there are no windows, `[B, 1, 1, num_others + h * w]` bool.

    Args:
        padding_mask: `[B, H, W]` bool, True where there is no image; a patch is left out if all of it is padding.
        num_others: tokens before the patches, such as a class token; they are always attended to.
    """
    seen = ~padding_mask[:, ::patch_size, ::patch_size].flatten(1)
    return F.pad(seen, (num_others, 0), value=True)[:, None, None]


def merge_windows(tokens: Tensor, num_windows: int, grid: torch.Size) -> Tensor:
    """`[B * n, h * w / n, C]` -> `[B, h, w, C]`, the reverse of `split_windows`."""
    rows, columns = grid[0] // num_windows, grid[1] // num_windows
    cells = tokens.view(-1, num_windows, num_windows, rows, columns, tokens.shape[-1])
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
