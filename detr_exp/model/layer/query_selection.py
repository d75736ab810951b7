"""Which cells of the memory become queries, and the anchors their boxes start from (RT-DETR, section 4.3).

Legend: B images, S cells of all levels, C logits per cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.ops.deformable import Shapes

SELECTIONS = ("default", "one2many", "agnostic")

# Sides of the anchors of the finest level; every level doubles them.
ANCHOR_SIZE = 0.05
# Anchors closer than this to 0 or 1 in any coordinate are not used.
ANCHOR_MARGIN = 0.01
# Used instead of infinity, which some exporters do not support: its sigmoid is 1 in every precision.
FAR = 1e4
# Keypoints, unlike boxes, count as at least so far from 0 and 1 where their logits are needed (EdgeCrafter).
POINT_EPS = 1e-3


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits of values in 0..1; both the value and its complement count as at least `eps`."""
    values = values.clamp(0, 1)
    return (values.clamp(min=eps) / (1 - values).clamp(min=eps)).log()


def anchor_logits(
    spatial_shapes: Shapes, dtype: torch.dtype, device: torch.device, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A square box around the centre of each cell.

    Args:
        padding: `[B, S]` bool, True for padded cells, which have no anchor.

    Returns:
        `[S, 4]` (or `[B, S, 4]`) logits of cxcywh, and `[S, 1]` (or `[B, S, 1]`) bool, False where there is none.
    """
    levels = []
    for level, (height, width) in enumerate(spatial_shapes):
        x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
        y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
        side = torch.full((height, width), ANCHOR_SIZE * 2**level, dtype=dtype, device=device)
        boxes = torch.stack([x.expand(height, width), y[:, None].expand(height, width), side, side], dim=-1)
        levels.append(boxes.flatten(0, 1))
    anchors = torch.cat(levels)
    valid = ((anchors > ANCHOR_MARGIN) & (anchors < 1 - ANCHOR_MARGIN)).all(-1, keepdim=True)
    if padding is not None:
        valid = valid & ~padding[..., None]
    return torch.where(valid, (anchors / (1 - anchors)).log(), FAR), valid


def checked_selection(method: str) -> str:
    """`method`, if it is one."""
    if method not in SELECTIONS:
        raise ValueError(f"model.query_select_method is {method!r}; use one of {', '.join(SELECTIONS)}")
    return method


def top_cells(logits: Tensor, count: int, method: str, activation: str, padded: Tensor | None = None) -> Tensor:
    """Indices `[B, count]` of the best cells, best first.

    Args:
        logits: `[B, S, C]`.
        method: "default" ranks cells by their best class; "one2many" ranks pairs of cell and class, so that a cell
            can be chosen several times; "agnostic" means logits of a single class and ranks like "default".
        activation: "sigmoid", or "softmax" with the background in the last column, which does not count.
        padded: `[B, S]` bool, cells that are not chosen; see `best_cells`.
    """
    scores = logits if activation == "sigmoid" else logits.softmax(-1)[..., :-1]
    if method == "one2many":
        per_cell = scores.shape[-1]
        pairs = None if padded is None else padded.repeat_interleave(per_cell, dim=1)
        return best_cells(scores.flatten(1), count, pairs) // per_cell
    return best_cells(scores.amax(-1), count, padded)


def best_cells(scores: Tensor, count: int, padded: Tensor | None) -> Tensor:
    """Indices `[..., B, count]` of the highest scores `[..., B, S]`.

    Args:
        padded: `[B, S]` bool, cells outside of the image, which are not chosen: with fewer others than `count`, the
            best one is chosen again.
    """
    if padded is None:
        return scores.topk(count, dim=-1).indices
    best = scores.masked_fill(padded, -FAR).topk(count, dim=-1).indices
    return torch.where(padded.expand_as(scores).gather(-1, best), best[..., :1], best)
