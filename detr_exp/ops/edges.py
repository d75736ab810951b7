"""Boxes as the distances of their edges from a reference box, in bins (D-FINE, arXiv 2410.13842, section 4.1).

A distance is in units of 1 / scale of the reference's width (left, right) or height (top, bottom); zero is the
reference's own edge, and outwards is positive. The bins are dense around zero and sparse far from it.

Legend: N bins, K = N + 1 positions; the four edges are left, top, right, bottom. Boxes are cxcywh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.ops.boxes import cxcywh_to_xyxy


def edge_positions(num_bins: int, bound: float, scale: float) -> Tensor:
    """Distances that the bins stand for, W(n): `[K]` float64, ascending, antisymmetric around zero.

    They grow exponentially up to `bound * scale`; the first and the last one are twice as far.

    Args:
        num_bins: N, even and at least 4.
        bound: of all but the outermost positions, in sizes of the reference box.
        scale: distances in one size of the reference box.

    Raises:
        ValueError: no such number of bins.
    """
    if num_bins < 4 or num_bins % 2:
        raise ValueError(
            f"model.num_bins is {num_bins}, but as many bins lie on both sides of an edge: use an even number of at "
            "least 4, model.num_bins=32"
        )
    farthest = bound * scale
    base = (farthest + 1) ** (2 / (num_bins - 2))
    grown = base ** torch.arange(1, num_bins // 2, dtype=torch.float64) - 1
    outwards = torch.cat([grown, grown.new_tensor([2 * farthest])])
    return torch.cat([-outwards.flip(0), outwards.new_zeros(1), outwards])


def boxes_from_edges(distances: Tensor, reference: Tensor, scale: float) -> Tensor:
    """Boxes with their edges at these distances from those of the reference.

    Nothing is clamped: edges may pass each other, and the size is then negative.

    Args:
        distances: `[..., 4]`.
        reference: `[..., 4]`.
        scale: as in `edge_positions`.

    Returns:
        `[..., 4]`.
    """
    center, size = reference.split(2, dim=-1)
    low, high = distances.split(2, dim=-1)
    unit = size / scale
    return torch.cat([center + (high - low) * unit * 0.5, size + (low + high) * unit], dim=-1)


def edges_from_boxes(boxes: Tensor, reference: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The two neighbouring bins that together make each edge of a box, and their shares; no gradient.

    A distance beyond the outermost positions is the outermost one.

    Args:
        boxes: `[..., 4]`.
        reference: `[..., 4]`, of positive size.
        positions, scale: see `edge_positions`.

    Returns:
        `[..., 4]` int64, the lower bin n in 0..N - 1, and `[..., 4]`, the share of bin n + 1 in 0..1; that of bin n is
        the rest.
    """
    boxes, reference = boxes.detach(), reference.detach()
    apart = cxcywh_to_xyxy(boxes) - cxcywh_to_xyxy(reference)
    outwards = torch.cat([-apart[..., :2], apart[..., 2:]], dim=-1)
    distances = outwards / (reference[..., 2:] / scale + 1e-16).tile(2)
    positions = positions.to(distances)
    lower = (torch.bucketize(distances, positions, right=True) - 1).clamp(0, len(positions) - 2)
    low, high = positions[lower], positions[lower + 1]
    return lower, ((distances - low) / (high - low)).clamp(0, 1)
