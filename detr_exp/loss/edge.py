"""Losses of distributions over the places of a box's edges (Peng et al. 2024, D-FINE, arXiv 2410.13842).

Beside logits and boxes, predictions have `edges` `[l, B, Q, 4, K]`, logits of how far an edge is from that of the box
`reference` `[l, B, Q, 4]`; see `ops.edges`. All are terms (see `loss.term`).

Legend: l layers of a stack, B images, Q queries, K positions of an edge, P pairs.
"""

from __future__ import annotations

import math
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_exp.loss.box import quality
from detr_exp.loss.matches import Matches, between
from detr_exp.ops.boxes import EPS
from detr_exp.ops.edges import edge_positions, edges_from_boxes
from detr_exp.ops.transfer import to_device
from detr_exp.structures import predicted


def focal(matches: Matches, *, num_bins: int, bound: float, scale: float) -> list[Tensor]:
    """Fine-grained localisation loss: cross-entropy of the two positions between which each edge of the object lies.

    Pairs are weighed by their overlap, so it rises while boxes improve.

    Args:
        num_bins, bound, scale: of the network; see `ops.edges.edge_positions`.
    """
    edges, reference = (matches.of_pairs(partial(predicted, name=name)) for name in ("edges", "reference"))
    positions = positions_on(num_bins, bound, scale, edges.device)
    lower, share = edges_from_boxes(matches.target_boxes, reference, positions, scale)
    near = edges.log_softmax(-1).gather(-1, torch.stack([lower, lower + 1], -1))
    entropy = -torch.lerp(near[..., 0], near[..., 1], share).sum(-1)
    return matches.by_layer(entropy * quality(matches, overlap="iou"))


def distillation(matches: Matches, *, temperature: float) -> list[Tensor]:
    """Decoupled distillation focal loss: divergence of each layer's distributions from those of the last layer.

    It is the mean over queries with an object, weighed by the overlap of their box, and the mean over the others,
    weighed by their score in the last layer. These two are averaged with the square roots of both numbers of queries as
    weights; for denoising queries, too, those are the numbers of matched queries, as in the published code.

    Args:
        temperature: divides the logits; with a higher one, what is unlikely counts more.
    """
    num_matched, num_others = _counts(matches, 0)
    share = 1 / (1 + (num_others / num_matched) ** 0.5)
    found = []
    placed = matches.to_queries(quality(matches, overlap="iou"))
    for index, (stack, overlaps, labels) in enumerate(zip(matches.stacks, placed, matches.labels)):
        edges = predicted(stack.prediction, "edges") / temperature
        student, teacher = edges[:-1].log_softmax(-1), edges[-1:].detach().log_softmax(-1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean(-1)
        num_matched, num_others = _counts(matches, index)
        weight = torch.where(
            labels[:-1] < matches.num_classes,
            overlaps[:-1] * (share / num_matched),
            _scores(stack.prediction.logits[-1], matches.activation) * ((1 - share) / num_others),
        )
        loss = (weight * divergence).flatten(1).sum(1) * temperature**2
        found.append(F.pad(loss, (0, 1)))  # the last layer teaches
    return found


@torch.no_grad()
def entropy(matches: Matches) -> list[Tensor]:
    """Mean entropy of the edges of matched boxes, a statistic: 1 where all positions are as likely, 0 where one is."""
    likelihood = matches.of_pairs(partial(predicted, name="edges")).log_softmax(-1)
    return matches.by_layer(-(likelihood.exp() * likelihood).sum(-1).mean(-1) / math.log(likelihood.shape[-1]))


def _counts(matches: Matches, index: int) -> tuple[float | Tensor, float | Tensor]:
    """Numbers of queries of a stack with and without an object, of a layer of the effective batch."""
    stack = matches.stacks[index]
    return between(EPS, stack.num_pairs), between(EPS, stack.num_queries - stack.num_pairs)


def _scores(logits: Tensor, activation: str) -> Tensor:
    """The score of the best class, without gradient: `[B, Q, C]` -> `[B, Q]`."""
    logits = logits.detach()
    return (logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)[..., :-1]).amax(-1)


@cache
def positions_on(num_bins: int, bound: float, scale: float, device: torch.device) -> Tensor:
    """Copied to a device once."""
    return to_device(edge_positions(num_bins, bound, scale), device)
