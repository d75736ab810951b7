"""Outlines of masks, for tools and formats that need polygons."""

from __future__ import annotations

from typing import cast

import numpy as np
from contourpy import FillType, contour_generator


def polygons_of_mask(mask: np.ndarray) -> list[list[float]]:
    """The outlines of a mask's parts in COCO's format, halfway between the pixels inside and those outside.

    Filling them restores the mask, except its holes, which COCO's polygons cannot have.

    Args:
        mask: `[H, W]` bool.

    Returns:
        x0, y0, x1, y1, ... in pixels for every part; nothing for an empty mask.
    """
    inside = np.pad(mask, 1).astype(np.float32)
    y, x = (np.arange(side) - 0.5 for side in inside.shape)  # centres of the pixels, in the padded mask
    contours = contour_generator(x, y, inside, fill_type=FillType.OuterOffset)
    points, rings = cast(tuple[list[np.ndarray], list[np.ndarray]], contours.filled(0.5, 2.0))
    # the first ring of a part goes around it, others around its holes; a ring ends where it began
    return [part[: ring[1] - 1].reshape(-1).tolist() for part, ring in zip(points, rings)]
