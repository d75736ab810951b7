"""Batches of images at another size, on their device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resized(images: Tensor, padding_mask: Tensor | None, size: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
    """Images, and where there are none, at another size.

    Args:
        images: `[B, 3, H, W]`.
        padding_mask: `[B, H, W]` bool, or None.
        size: (height, width); None: the same.
    """
    if size is None or images.shape[-2:] == size:
        return images, padding_mask
    images = F.interpolate(images, size, mode="bilinear", antialias=True)
    if padding_mask is not None:
        padding_mask = F.interpolate(padding_mask[:, None].float(), size)[:, 0].bool()
    return images, padding_mask
