"""A matcher of its own: centres and classes, no overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from detr_exp.matcher.hungarian import Assignment, solve, to_host
from detr_exp.ops.transfer import to_device
from detr_exp.structures import Prediction, Targets


class CentreMatcher:
    """One to one, by the distance of centres and the probability of the class.

    Args:
        activation: of the logits.
        cost_class: weight of the class beside a distance in sides of the image.
    """

    def __init__(self, *, activation: str, cost_class: float) -> None:
        if activation != "sigmoid":
            raise ValueError(f"the centre matcher reads sigmoid logits, not {activation}; choose loss=edges")
        self.cost_class = cost_class

    @torch.no_grad()
    def __call__(
        self,
        predictions: Sequence[Prediction],
        targets: Targets,
        groups: int,
        weights: Mapping[str, float],
        keypoint_counts: Sequence[int],
    ) -> Assignment:
        boxes = torch.cat([prediction.boxes for prediction in predictions])
        logits = torch.cat([prediction.logits for prediction in predictions])
        image = torch.repeat_interleave(torch.tensor(targets.counts)).to(boxes.device)
        distance = (boxes[:, image, :, :2] - targets.boxes[:, None, :2]).norm(dim=-1)  # [S, T, Q]
        classes = logits[:, image].sigmoid().transpose(2, 3)[:, range(len(targets)), targets.labels]
        pairs = solve(to_host(distance - self.cost_class * classes), targets.counts, groups)
        counts = tuple(np.bincount(pairs[0, 0], minlength=len(targets.counts)).tolist())
        on_device = to_device(pairs, boxes.device)
        return Assignment(on_device[0], on_device[1], on_device[2], counts, pairs)
