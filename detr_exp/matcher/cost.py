"""Matching costs of every (target, query) pair of an image, for all layers at once.

Legend: S stacked layers, B images, Q queries of an image (all groups), C logits, T objects of the whole batch.

A cost is `[S, T, Q]`: an object meets only the queries of its own image, and queries are innermost, which is both the
layout that elementwise kernels and the solver need (targets as rows). Nothing is padded, so the cost of a batch depends
only on its number of objects. Box tensors are planes (x, y, width, height apart), because a trailing axis of four
prevents vectorisation. Runs without gradient, in place where possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_exp.ops.boxes import EPS, cxcywh_to_xyxy, iou_and_giou
from detr_exp.ops.keypoints import (
    existing_keypoints,
    keypoint_distance,
    keypoint_errors,
    keypoint_similarity,
    slot_keypoints,
)
from detr_exp.ops.points import PIXELS_PER_POINT, sample_bilinear, sample_nearest
from detr_exp.ops.transfer import to_device
from detr_exp.structures import MaskLogits, Targets


class TaskWeights(NamedTuple):
    """Weights of mask and keypoint terms: the same number serves the loss and the matching cost."""

    mask_ce: float = 0.0
    mask_dice: float = 0.0
    keypoint_l1: float = 0.0
    keypoint_findable: float = 0.0
    keypoint_visible: float = 0.0
    keypoint_nll: float = 0.0
    keypoint_distance: float = 0.0
    keypoint_oks: float = 0.0


def object_logits(logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
    """The logits of each object's class, of the queries of its image.

    Args:
        logits: `[S, B, Q, C]`.
        image: `[T]` int64, image of each object.
        labels: `[T]` int64 below C.

    Returns:
        `[S, T, Q]`.
    """
    return logits.transpose(2, 3)[:, image, labels]


def sigmoid_class_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of the object's class minus that of background (Zhu et al. 2021, Deformable DETR).

    Args:
        logits: `[S, T, Q]` of each object's class.
    """
    probability = logits.sigmoid()
    negative = F.softplus(logits)  # -log(1 - p); and -log p is this less the logit
    cost = (1 - probability).pow_(gamma).mul_(negative - logits).mul_(alpha)
    return cost.sub_(probability.pow_(gamma).mul_(negative), alpha=1 - alpha)


def softmax_class_cost(log_probabilities: Tensor) -> Tensor:
    """Negative probability of each object's class (Carion et al. 2020, DETR, section 3.1)."""
    return log_probabilities.exp().neg_()


def box_cost(planes: Tensor, target_boxes: Tensor, image: Tensor, *, cost_bbox: float, cost_giou: float) -> Tensor:
    """L1 distance of the box coordinates and negative generalised IoU, weighted.

    Args:
        planes: `[4, S, B, Q]` cxcywh of the queries, coordinates apart.
        target_boxes: `[T, 4]` cxcywh.
        image: `[T]` int64, image of each object.

    Returns:
        `[S, T, Q]`.
    """
    planes = planes.index_select(2, image)
    target = target_boxes.t()[:, None, :, None]

    distance = (planes - target).abs_()
    cost = distance[0].add_(distance[1]).add_(distance[2]).add_(distance[3]).mul_(cost_bbox)

    center, size = planes[:2], planes[2:].clamp_(min=0)
    target_center, target_size = target[:2], target[2:]
    half, target_half = size * 0.5, target_size * 0.5
    low = torch.maximum(center - half, target_center - target_half)
    overlap = torch.minimum(half.add_(center), target_center + target_half).sub_(low)
    # The length of the hull of two intervals is the sum of their lengths minus their signed overlap.
    hull = _area((size + target_size).sub_(overlap))
    intersection = _area(overlap.clamp_(min=0))
    union = _area(size).add_(target_size[0] * target_size[1]).sub_(intersection)
    gap = (hull - union).div_(hull.clamp_(min=EPS))
    giou = intersection.div_(union.clamp_(min=EPS)).sub_(gap)
    return cost.sub_(giou, alpha=cost_giou)


def quality_cost(probability: Tensor, planes: Tensor, target_boxes: Tensor, image: Tensor, power: float) -> Tensor:
    """Negative probability of each object's class, times the IoU to a power (DEIMv2, arXiv 2509.20787).

    Args:
        probability: `[S, T, Q]`.
        planes, target_boxes, image: as in `box_cost`.
    """
    boxes = planes.index_select(2, image).movedim(0, -1)
    both = torch.stack((boxes, target_boxes[:, None].expand_as(boxes)))
    return iou_and_giou(*cxcywh_to_xyxy(both))[0].pow_(power).mul_(probability).neg_()


def _area(sides: Tensor) -> Tensor:
    return sides[0].mul_(sides[1])


def mask_cost(masks: MaskLogits, target_masks: Tensor, counts: Sequence[int], weights: TaskWeights) -> Tensor:
    """Cross-entropy and Dice distance at random points, the same for all pairs (Cheng et al. 2022, Mask2Former).

    Args:
        masks: of one layer, features `[B, D, h, w]`.
        target_masks: `[T, H, W]` bool.
        counts: objects per image.

    Returns:
        `[T, Q]`.
    """
    num_images, _, height, width = masks.features.shape
    points = torch.rand(1, height * width // PIXELS_PER_POINT, 2, device=target_masks.device)
    values = masks.queries @ sample_bilinear(masks.features, points.expand(num_images, -1, -1)) + masks.bias
    everyone = torch.arange(len(target_masks), device=target_masks.device)
    labels = sample_nearest(target_masks, everyone, points).to(values.dtype)
    costs = [_point_cost(image, objects, weights) for image, objects in zip(values, labels.split(list(counts)))]
    return torch.cat(costs)


def _point_cost(values: Tensor, labels: Tensor, weights: TaskWeights) -> Tensor:
    """`[n, Q]` from logits `[Q, P]` and labels `[n, P]` of an image, by matrix products, not pair by pair."""
    scores = values.sigmoid()
    ce = (F.softplus(values).sum(1) - labels @ values.T) / values.shape[1]
    dice = 1 - (2 * (labels @ scores.T) + 1) / (scores.sum(1) + labels.sum(1, keepdim=True) + 1)
    return weights.mask_ce * ce + weights.mask_dice * dice


def keypoint_cost(
    keypoints: Tensor,
    targets: Targets,
    chunk: slice,
    image: Tensor,
    counts: Sequence[int],
    sigmas: Sequence[float],
    weights: TaskWeights,
) -> Tensor:
    """The keypoint losses of every pair.

    Args:
        keypoints: `[S, B, Q, slots * K, 8]` or `[S, B, Q, K, 2]`; see `Prediction`.
        targets: ground truth with keypoints.
        chunk: the C selected objects.
        image: `[C]` int64, their images.
        counts, sigmas: keypoints of each class slot, and their OKS scales.

    Returns:
        `[S, C, Q]`.
    """
    assert targets.keypoints is not None
    labels = targets.labels[chunk]
    if keypoints.shape[-1] == 2:
        own = keypoints[:, image]
    else:
        own = slot_keypoints(keypoints, len(counts)).transpose(2, 3)[:, image, labels]  # [S, C, Q, K, 8]
    target = targets.keypoints[chunk].to(keypoints.dtype)[:, None]
    area = targets.boxes[chunk, 2:].prod(-1).to(keypoints.dtype)[:, None]
    exists = existing_keypoints(counts, keypoints.device)[labels][:, None]
    cost = own.new_zeros(own.shape[:3])
    if weights.keypoint_distance:
        cost += weights.keypoint_distance * keypoint_distance(own[..., :2], target, exists)
    if weights.keypoint_oks:
        scales = to_device(torch.tensor(sigmas, dtype=own.dtype), own.device)
        cost -= weights.keypoint_oks * keypoint_similarity(own[..., :2], target, area, exists, scales)
    if not (weights.keypoint_l1 or weights.keypoint_findable or weights.keypoint_visible or weights.keypoint_nll):
        return cost
    errors = keypoint_errors(own, target, area, exists)
    return (
        cost
        + weights.keypoint_l1 * errors.l1
        + weights.keypoint_findable * errors.findable
        + weights.keypoint_visible * errors.visible
        + weights.keypoint_nll * errors.nll
    )
