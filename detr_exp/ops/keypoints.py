"""Errors of predicted keypoints, and their uncertainty.

Legend: K keypoints of a class slot, padded to the slot with most; the last axis of a prediction has eight channels:
x, y (0..1 of the image), findable logit (labelled at all), visible logit, log l11, l21, log l22, class evidence.

The three Cholesky channels are the upper triangular factor U = [[l11, l21], [0, l22]] of a precision matrix in units
of the object's area: an offset d has the squared Mahalanobis distance |U d|^2 / area.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Scales are clamped to exp(+-LIMIT): a standard deviation of at least 0.25 % of the object's side, so that neither
# the likelihood of an exact prediction nor the distance of a wrong one is unbounded.
LOG_SCALE_LIMIT = 6.0

# Objects smaller than this (share of the image) are too small to scale a distance.
MIN_AREA = torch.finfo(torch.float32).eps


class KeypointErrors(NamedTuple):
    """Errors of each object: means over its keypoints.

    Attributes:
        l1: L1 distance of the labelled points, in units of the object's side.
        findable: cross-entropy of "the point is labelled", over all points.
        visible: cross-entropy of "the point is visible", over all points.
        nll: negative log-likelihood of the labelled points under the predicted Gaussian, constants left out.
    """

    l1: Tensor
    findable: Tensor
    visible: Tensor
    nll: Tensor


def keypoint_errors(predicted: Tensor, target: Tensor, area: Tensor, exists: Tensor) -> KeypointErrors:
    """Compare keypoints, object by object; leading axes broadcast.

    Args:
        predicted: `[..., K, 8]`.
        target: `[..., K, 3]` x, y, visibility 0 / 1 / 2.
        area: `[...]` of the object's box, as a share of the image.
        exists: `[..., K]` bool, the keypoints that the object's class has.

    Returns:
        Tensors `[...]`; zero, but part of the graph, for objects without labelled points, area or keypoints.

    Raises:
        ValueError: predictions of places only.
    """
    if predicted.shape[-1] == 2:
        raise ValueError(
            "the network predicts where keypoints are, but not how certain that is, and this loss learns both; use the "
            "losses and costs of such networks: loss=pose matcher=pose"
        )
    visibility = target[..., 2]
    has_scale = area > MIN_AREA
    labelled = exists & (visibility > 0) & has_scale[..., None]
    area = torch.where(has_scale, area, 1.0)[..., None]

    offset_x = torch.where(labelled, predicted[..., 0] - target[..., 0], 0.0)
    offset_y = torch.where(labelled, predicted[..., 1] - target[..., 1], 0.0)
    log_l11, log_l22 = (predicted[..., i].clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT) for i in (4, 6))
    distance = (log_l11.exp() * offset_x + predicted[..., 5] * offset_y).square() + (log_l22.exp() * offset_y).square()
    findable = F.softplus(predicted[..., 2]) - predicted[..., 2] * (visibility > 0)
    visible = F.softplus(predicted[..., 3]) - predicted[..., 3] * (visibility > 1)
    return KeypointErrors(
        l1=_mean((offset_x.abs() + offset_y.abs()) / area.sqrt(), labelled),
        findable=_mean(findable, exists),
        visible=_mean(visible, exists),
        nll=_mean(0.5 * distance / area - (log_l11 + log_l22), labelled),
    )


def keypoint_distance(points: Tensor, target: Tensor, exists: Tensor) -> Tensor:
    """Sum of the L1 distances of the labelled points, in sides of the image: `[...]`; arguments as below."""
    return _labelled((points - target[..., :2]).abs().sum(-1), target, exists).sum(-1)


def keypoint_similarity(points: Tensor, target: Tensor, area: Tensor, exists: Tensor, sigmas: Tensor) -> Tensor:
    """OKS of COCO, the mean over labelled points: `[...]` in 1e-6..1; leading axes broadcast.

    Args:
        points: `[..., K, 2]` predicted x, y.
        target, area, exists: as in `keypoint_errors`.
        sigmas: `[K]` OKS scales.
    """
    squared = (points - target[..., :2]).square().sum(-1)
    scale = area.clamp(min=MIN_AREA)[..., None] * (2 * sigmas).square() * 2
    total = _labelled((-squared / scale).exp(), target, exists).sum(-1)
    return (total / ((exists & (target[..., 2] > 0)).sum(-1) + 1e-6)).clamp(min=1e-6)


def slot_keypoints(keypoints: Tensor, num_slots: int) -> Tensor:
    """`[..., num_slots * K, 8]`, class-major, as `[..., num_slots, K, 8]`."""
    return keypoints.unflatten(-2, (num_slots, -1))


def existing_keypoints(counts: Sequence[int], device: torch.device) -> Tensor:
    """`[num_slots, K]` bool: which of the padded points each class slot has."""
    points = torch.arange(max(counts), device=device)
    return torch.stack([points < count for count in counts])


def keypoint_covariance(predicted: Tensor, area: Tensor) -> Tensor:
    """Covariance of predicted keypoints, `area * (U^T U)^-1`.

    Args:
        predicted: `[..., 8]`.
        area: `[...]` of the object's box, as a share of the image.

    Returns:
        `[..., 2, 2]` in squared units of the image's sides; times (width, height) on both axes in squared pixels.
    """
    log_l11, log_l22 = (predicted[..., i].clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT) for i in (4, 6))
    scale_x, scale_y = (-log_l11).exp(), (-log_l22).exp()
    shear = -predicted[..., 5] * scale_x * scale_y
    cross = shear * scale_y
    entries = torch.stack((scale_x.square() + shear.square(), cross, cross, scale_y.square()), dim=-1)
    return (entries * area[..., None]).unflatten(-1, (2, 2))


def _labelled(values: Tensor, target: Tensor, exists: Tensor) -> Tensor:
    return torch.where(exists & (target[..., 2] > 0), values, 0.0)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the selected entries of the last axis; zero without any."""
    return torch.where(chosen, values, 0.0).sum(-1) / chosen.sum(-1).clamp(min=1)
