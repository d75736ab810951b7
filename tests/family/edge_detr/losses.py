"""A loss on the field that only this family predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_exp.loss.matches import Matches
from detr_exp.ops.boxes import cxcywh_to_xyxy


def edge_distribution(matches: Matches, *, power: float) -> Sequence[Tensor]:
    """Distribution focal loss (Li et al. 2020, eq. 6): the two bins about the true distance share the likelihood.

    Args:
        matches: of the layers that predict edges, with pairs of the rule that the table names.
        power: exponent of an object's sharpness, its weight: what the source says of each object.
    """
    edges = matches.of_pairs(lambda prediction: prediction.edges)  # [P, 4, E]
    points = matches.of_pairs(lambda prediction: prediction.points).detach()  # [P, 2]
    low, high = cxcywh_to_xyxy(matches.target_boxes).split(2, -1)
    last = edges.shape[-1] - 1
    wanted = torch.cat([points - low, high - points], -1).clamp(0, 1) * last  # [P, 4] in bins
    below = wanted.floor().clamp(max=last - 1)
    share = wanted - below
    log_likelihood = F.log_softmax(edges, -1)
    pair = torch.stack([below, below + 1], -1).long()
    near = log_likelihood.gather(-1, pair)
    loss = -(near[..., 0] * (1 - share) + near[..., 1] * share).mean(-1)
    return matches.by_layer(loss * matches.targets.extra["sharpness"][matches.target] ** power)
