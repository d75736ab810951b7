"""Box formats and overlaps, element by element.

All functions take `[..., 4]` tensors whose leading axes broadcast. Boxes with no (or negative) extent are allowed
everywhere: they have no area, overlap nothing and give finite values and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Smallest divisor of areas: far below one pixel of the unit image, far above float32's underflow.
EPS = 1e-7


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert centre and size to corners; negative sizes are clamped to zero."""
    center, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) * 0.5
    return torch.cat((center - half, center + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners to centre and size; the sizes of inverted boxes are negative."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) * 0.5, high - low), dim=-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy boxes, pair by pair, in 0..1."""
    return iou_and_giou(a, b)[0]


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both overlaps of xyxy boxes in one pass (Rezatofighi et al. 2019, "Generalized Intersection over Union").

    Along an axis, the length of the hull of two intervals is the sum of their lengths minus their signed overlap, so
    one minimum and one maximum give both intersection and hull.
    """
    size_a = (a[..., 2:] - a[..., :2]).clamp(min=0)
    size_b = (b[..., 2:] - b[..., :2]).clamp(min=0)
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = _product(overlap.clamp(min=0))
    union = _product(size_a) + _product(size_b) - intersection
    hull = _product(size_a + size_b - overlap)
    iou = intersection / union.clamp(min=EPS)
    return iou, iou - (hull - union) / hull.clamp(min=EPS)


def _product(sides: Tensor) -> Tensor:
    # not `prod`: its gradient has a slow path for zeros
    return sides[..., 0] * sides[..., 1]
