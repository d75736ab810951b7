"""Images on canvases of another shape: where they lie, and what they measure.

An image that keeps its proportions lies in the top left corner of its canvas; the rest is padding. Boxes, masks and
keypoints are relative to the canvas as long as the network computes with them.

Legend: B images, (H, W) height and width of the canvas. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def content_size(size: tuple[Any, Any], canvas: tuple[int, int]) -> tuple[Any, Any]:
    """Size of an image on a canvas that it fills in one direction, in whole pixels, at least one.

    Args:
        size: of the image: integers, or integers of a traced graph, or `[B]` int64 each.
    """
    (height, width), (most_height, most_width) = size, canvas
    return (
        _between(1, (2 * height * most_width + width) // (2 * width), most_height),
        _between(1, (2 * width * most_height + height) // (2 * height), most_width),
    )


def padding_mask(contents: Tensor, canvas: tuple[int, int]) -> Tensor:
    """`[B, H, W]` bool, True beside images of the sizes `contents` `[B, 2]`."""
    height, width = canvas
    rows = torch.arange(height, device=contents.device)[:, None] >= contents[:, :1, None]
    columns = torch.arange(width, device=contents.device) >= contents[:, 1:, None]
    return rows | columns


def contents_of(padding: Tensor) -> Tensor:
    """`[B, H, W]` bool, True on padding -> `[B, 2]` sizes of the images on the canvas."""
    return torch.stack([(~padding[:, :, 0]).sum(-1), (~padding[:, 0]).sum(-1)], dim=-1)


def canvas_sizes(image_sizes: Tensor, contents: Tensor, canvas: tuple[int, int]) -> Tensor:
    """`[B, 2]` float32: what each canvas measures in pixels of its original image.

    Args:
        image_sizes: `[B, 2]` of the original images.
        contents: `[B, 2]` of the images on the canvas.
    """
    whole = torch.stack([torch.full_like(contents[:, axis], side) for axis, side in enumerate(canvas)], dim=1)
    return image_sizes.float() * whole.float() / contents.float()


def _between(low: int, value: Any, high: int) -> Any:
    if isinstance(value, Tensor):
        return value.clamp(low, high)
    return torch.sym_max(low, torch.sym_min(value, high))
