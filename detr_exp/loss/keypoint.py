"""Keypoint losses of matched pairs, as terms (see `loss.term`): of each stack `[l, M]`.

Legend: P pairs, K keypoints of a class slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.loss.matches import Matches
from detr_exp.ops.keypoints import KeypointErrors, existing_keypoints, keypoint_errors, slot_keypoints


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


def errors(matches: Matches) -> KeypointErrors:
    """Errors of all pairs, `[P]`; each uses the slot of its object's class."""
    counts, targets = matches.keypoint_counts, matches.targets
    assert targets.keypoints is not None
    labels = targets.labels[matches.target]
    stacks = [stack.prediction.keypoints for stack in matches.stacks]
    slots = torch.cat([slot_keypoints(one, len(counts)).flatten(0, 2) for one in stacks if one is not None])
    predicted = slots[matches.rows, labels]
    exists = existing_keypoints(counts, predicted.device)[labels]
    area = targets.boxes[:, 2:].prod(-1).to(predicted.dtype)[matches.target]
    return keypoint_errors(predicted, targets.keypoints.to(predicted.dtype)[matches.target], area, exists)
