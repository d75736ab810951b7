"""Matching costs of every (target, query) pair of an image, for all layers at once.

Legend: S stacked layers, B images, Q queries of an image (all groups), C logits, T objects of the whole batch.

A cost is `[S, T, Q]`: an object meets only the queries of its own image, and queries are innermost, which is both the
layout the elementwise kernels like and the one the solver likes (targets as rows). Nothing is padded, so a batch with
one crowded image costs no more than its objects. The tensors are planes (x, y, width, height apart), because a
trailing axis of four defeats vectorisation. Runs without gradient, in place where a buffer is its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_exp.ops.boxes import EPS


def object_logits(logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
    """What the queries of each object's image say about its class.

    Args:
        logits: `[S, B, Q, C]`.
        image: `[T]` int64, image of each object.
        labels: `[T]` int64 below C.

    Returns:
        `[S, T, Q]`.
    """
    return logits.transpose(2, 3)[:, image, labels]


def sigmoid_class_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of calling a query its object less that of calling it background (Zhu et al. 2021, Deformable DETR).

    Args:
        logits: `[S, T, Q]` of each object's class.
    """
    probability = logits.sigmoid()
    surprise = F.softplus(-logits)  # -log p; and -log(1 - p) is this plus the logit
    cost = (1 - probability).pow_(gamma).mul_(surprise).mul_(alpha)
    return cost.sub_(probability.pow_(gamma).mul_(surprise.add_(logits)).mul_(1 - alpha))


def softmax_class_cost(log_probabilities: Tensor) -> Tensor:
    """Negative probability of each object's class (Carion et al. 2020, DETR, section 3.1)."""
    return log_probabilities.exp().neg_()


def box_cost(boxes: Tensor, target_boxes: Tensor, image: Tensor, *, cost_bbox: float, cost_giou: float) -> Tensor:
    """L1 distance of the box coordinates and negative generalised IoU, weighted.

    Args:
        boxes: `[S, B, Q, 4]` cxcywh.
        target_boxes: `[T, 4]` cxcywh.
        image: `[T]` int64, image of each object.

    Returns:
        `[S, T, Q]`.
    """
    x, y, width, height = boxes.permute(3, 0, 1, 2).index_select(2, image)
    target_x, target_y, target_width, target_height = target_boxes.t().unsqueeze(-1)

    cost = (x - target_x).abs_()
    cost += (y - target_y).abs_()
    cost += (width - target_width).abs_()
    cost += (height - target_height).abs_()
    cost *= cost_bbox

    width, height = width.clamp_(min=0), height.clamp_(min=0)
    overlap_x, overlap_y = _overlap(x, width, target_x, target_width), _overlap(y, height, target_y, target_height)
    # The hull of two intervals is as long as both together less their signed overlap.
    hull = (width + target_width).sub_(overlap_x).mul_((height + target_height).sub_(overlap_y))
    intersection = overlap_x.clamp_(min=0).mul_(overlap_y.clamp_(min=0))
    union = width.mul_(height).add_(target_width * target_height).sub_(intersection)
    gap = (hull - union).div_(hull.clamp_(min=EPS))
    giou = intersection.div_(union.clamp_(min=EPS)).sub_(gap)
    return cost.sub_(giou, alpha=cost_giou)


def _overlap(center: Tensor, size: Tensor, target_center: Tensor, target_size: Tensor) -> Tensor:
    """Signed overlap of two intervals, negative where they lie apart."""
    half, target_half = size * 0.5, target_size * 0.5
    low = torch.maximum(center - half, target_center - target_half)
    return torch.minimum(half.add_(center), target_center + target_half).sub_(low)
