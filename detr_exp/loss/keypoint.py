"""Keypoint losses of matched pairs.

Legend: S layers, M pairs of a layer, K keypoints of a class slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detr_exp.matcher.hungarian import Assignment
from detr_exp.ops.keypoints import KeypointErrors, existing_keypoints, keypoint_errors, slot_keypoints
from detr_exp.structures import Prediction, Targets


def keypoint_losses(
    predictions: Sequence[Prediction], pairs: Assignment, targets: Targets, counts: Sequence[int]
) -> KeypointErrors:
    """Errors of all layers that have keypoints, each summed over its pairs: `[S]`.

    Args:
        predictions: stacked, keypoints `[l, B, Q, slots * K, 8]`.
        pairs: of all their layers.
        targets: ground truth with keypoints.
        counts: keypoints of each class slot.
    """
    assert targets.keypoints is not None
    keypoints = torch.cat([item.keypoints for item in predictions if item.keypoints is not None])
    rows = torch.arange(len(keypoints), device=keypoints.device)[:, None]
    image, query, target = (index[: len(keypoints)] for index in pairs[:3])
    labels = targets.labels[target]
    predicted = slot_keypoints(keypoints, len(counts))[rows, image, query, labels]
    exists = existing_keypoints(counts, keypoints.device)[labels]
    area = targets.boxes[:, 2:].prod(-1).to(predicted.dtype)[target]
    errors = keypoint_errors(predicted, targets.keypoints.to(predicted.dtype)[target], area, exists)
    return KeypointErrors(*(error.sum(1) for error in errors))
