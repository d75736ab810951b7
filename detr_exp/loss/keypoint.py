"""Keypoint losses of matched pairs, as terms (see `loss.term`): of each stack `[l, M]`.

Legend: P pairs, K keypoints of a class slot.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from detr_exp.loss.matches import Matches
from detr_exp.ops.keypoints import (
    KeypointErrors,
    existing_keypoints,
    keypoint_distance,
    keypoint_errors,
    keypoint_similarity,
    slot_keypoints,
)
from detr_exp.structures import predicted


def l1(matches: Matches) -> list[Tensor]:
    """Distance of the labelled points."""
    return matches.by_layer(matches.once(errors).l1)


def findable(matches: Matches) -> list[Tensor]:
    """Cross-entropy of "the point is labelled"."""
    return matches.by_layer(matches.once(errors).findable)


def visible(matches: Matches) -> list[Tensor]:
    """Cross-entropy of "the point is visible"."""
    return matches.by_layer(matches.once(errors).visible)


def nll(matches: Matches) -> list[Tensor]:
    """Negative log-likelihood of the labelled points."""
    return matches.by_layer(matches.once(errors).nll)


def distance(matches: Matches) -> list[Tensor]:
    """Sum of the distances of the labelled points, in sides of the image (DETRPose)."""
    points, _, target = matches.once(_places)
    return matches.by_layer(keypoint_distance(points, target, matches.once(_exists)))


def oks(matches: Matches) -> list[Tensor]:
    """One minus the similarity (DETRPose)."""
    return matches.by_layer(1 - matches.once(similarity))


def similarity(matches: Matches) -> Tensor:
    """OKS of all pairs, `[P]`; one without labelled points has none.

    Raises:
        ValueError: network or data have no keypoints.
    """
    points, area, target = matches.once(_places)
    assert matches.keypoint_sigmas is not None
    sigmas = matches.keypoint_sigmas.to(points.dtype)
    return keypoint_similarity(points, target, area, matches.once(_exists), sigmas)


def _places(matches: Matches) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pairs: predicted points `[P, K, 2]`, area `[P]` and keypoints `[P, K, 3]` of their objects."""
    targets = matches.targets
    predictions = [predicted(stack.prediction, "keypoints") for stack in matches.stacks]
    if targets.keypoints is None or any(one is None for one in predictions):
        raise ValueError(
            "the loss compares keypoints, but the network predicts none, or the data have none; use data with "
            "keypoints and a model that predicts them, or another loss: loss=vfl"
        )
    points = matches.of_pairs(lambda prediction: cast(Tensor, prediction.keypoints))
    if points.shape[-1] != 2:
        own = targets.labels[matches.target]
        slots = slot_keypoints(points, len(matches.keypoint_counts))
        points = slots[torch.arange(len(own), device=own.device), own][..., :2]
    area = targets.boxes[:, 2:].prod(-1).to(points.dtype)[matches.target]
    return points, area, targets.keypoints.to(points.dtype)[matches.target]


def _exists(matches: Matches) -> Tensor:
    """`[P, K]` bool: the keypoints that the class of each pair's object has."""
    own = matches.targets.labels[matches.target]
    return existing_keypoints(matches.keypoint_counts, own.device)[own]


def errors(matches: Matches) -> KeypointErrors:
    """Errors of all pairs, `[P]`; each uses the slot of its object's class."""
    counts, targets = matches.keypoint_counts, matches.targets
    assert targets.keypoints is not None
    labels = targets.labels[matches.target]
    stacks = [stack.prediction.keypoints for stack in matches.stacks]
    slots = torch.cat([slot_keypoints(one, len(counts)).flatten(0, 2) for one in stacks if one is not None])
    own = slots[matches.rows, labels]
    exists = existing_keypoints(counts, own.device)[labels]
    area = targets.boxes[:, 2:].prod(-1).to(own.dtype)[matches.target]
    return keypoint_errors(own, targets.keypoints.to(own.dtype)[matches.target], area, exists)
