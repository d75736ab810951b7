"""Losses against what a teacher predicts for the same images, and its predictions as targets.

The queries of a teacher that count are targets like objects, with a label and a box: predictions are matched with them
by the costs of the matcher, and the losses of boxes apply as they are. Where one has an object itself, predictions are
matched with that object, since the ground truth calls all others background. In `extra` they have what an object has
not: `object` `[T]`, the index of theirs or -1, `scores` `[T, C]`, `confidence` `[T]`, and of teachers with
distributions of edges `edge_shares` and `edge_places` `[T, 4, N]`.

Legend: B images, Q queries of the teacher, T of them that count, C logits, P pairs, N positions of a teacher's edge,
K positions of an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_exp.loss.edge import positions_on
from detr_exp.loss.matches import Matches
from detr_exp.ops.boxes import EPS, box_iou, cxcywh_to_xyxy
from detr_exp.structures import Prediction, Targets, predicted

UNKNOWN_LOGIT = -20.0  # of a class that the teacher has not
SHORTEST = 1e-2  # length of the features of a cell
SAME = 0.5  # intersection over union of a detection and its object, as AP50 has it


class EdgeGrid(NamedTuple):
    """Where the positions of a network's edges lie; see `ops.edges`.

    Attributes:
        positions: `[N]`.
        scale: of the network.
    """

    positions: Tensor
    scale: float


class Maps(NamedTuple):
    """Maps of an encoder and those of a teacher, level by level `[B, D, h, w]` and `[B, D, h', w']`."""

    maps: list[Tensor]
    teacher: list[Tensor]


class Taught(NamedTuple):
    """What a teacher says about a batch.

    Attributes:
        targets: its queries that count; none if only maps are compared.
        maps: None if only predictions are compared.
    """

    targets: Targets
    maps: Maps | None = None


def in_our_classes(logits: Tensor, columns: Sequence[int], theirs: str, ours: str) -> Tensor:
    """A teacher's logits `[..., C']` for the classes and the activation of a student: `[..., C]`.

    Args:
        columns: the teacher's label for each of the student's; -1: it has none.
        theirs, ours: "sigmoid", or "softmax" with the background last.
    """
    index = torch.tensor([max(column, 0) for column in columns], device=logits.device)
    absent = torch.tensor([column < 0 for column in columns], device=logits.device)
    chosen = logits[..., index].masked_fill(absent, UNKNOWN_LOGIT)
    if theirs == ours == "sigmoid":
        return chosen
    if theirs == "softmax":
        joined = torch.cat([chosen, logits[..., -1:]], -1)
        return joined if ours == "softmax" else joined.softmax(-1)[..., :-1].logit(EPS)
    scores = chosen.sigmoid()
    scores = scores / scores.sum(-1, keepdim=True).clamp(min=1)  # of exclusive classes
    return torch.cat([scores, 1 - scores.sum(-1, keepdim=True)], -1).clamp(min=EPS).log()


def as_targets(
    prediction: Prediction,
    matched: tuple[Tensor, Tensor, Tensor],
    objects: Targets,
    threshold: float,
    activation: str,
    grid: EdgeGrid | None,
) -> Targets:
    """The queries of a teacher that count: those matched with an object, and confident ones where there is no object.

    A confident query over an object that another one is matched with is a duplicate, or takes it for another class.

    Args:
        prediction: of its last layer, logits `[B, Q, C]` in the student's classes.
        matched: image, query and object of the matched ones, `[M]` each.
        objects: of the batch.
        threshold: score above which a query is confident.
        activation: of the student.
        grid: of its edges, if it has distributions.
    """
    scores = _scores(prediction.logits, activation)
    classes = scores[..., : scores.shape[-1] - (activation == "softmax")]
    confidence, labels = classes.max(-1)
    image, query, target = matched
    index = torch.full_like(labels, -1)
    index[image, query] = target
    boxes = torch.cat([prediction.boxes[..., :2], prediction.boxes[..., 2:].clamp(min=EPS)], -1)
    of_images = objects.boxes.split(list(objects.counts))
    over_objects = torch.stack([_overlap(*pair) for pair in zip(boxes, of_images, strict=True)])
    counts = (confidence > threshold) & ~over_objects | (index >= 0)
    extra = {"object": index[counts], "scores": scores[counts], "confidence": confidence[counts]}
    if grid is not None:
        extra["edge_shares"] = predicted(prediction, "edges")[counts].softmax(-1)
        extra["edge_places"] = _places(predicted(prediction, "reference")[counts], grid)
    return Targets(labels[counts], boxes[counts], tuple(counts.sum(1).tolist()), extra=extra)


def to_match(taught: Targets, objects: Targets) -> Targets:
    """What predictions are matched with for a teacher's queries: their objects, and those that have none themselves."""
    if not len(objects):
        return Targets(taught.labels, taught.boxes, taught.counts)
    index = taught.extra["object"]
    own = index >= 0
    labels = torch.where(own, objects.labels[index], taught.labels)
    return Targets(labels, torch.where(own[:, None], objects.boxes[index], taught.boxes), taught.counts)


def scores(matches: Matches) -> list[Tensor]:
    """Divergence of the class scores of matched queries from the teacher's, summed over independent classes."""
    logits = matches.of_pairs(lambda prediction: prediction.logits)
    target = matches.targets.extra["scores"].to(logits.dtype)[matches.target]
    if matches.activation == "softmax":
        return matches.by_layer(F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1))
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return matches.by_layer((cross - entropy).sum(-1))


def by_confidence(matches: Matches, *, loss: Callable[[Matches], Sequence[Tensor]]) -> list[Tensor]:
    """A loss of pairs, weighed by the score that the teacher gives to its query."""
    confidence = matches.targets.extra["confidence"][matches.target]
    return [values * weights for values, weights in zip(loss(matches), matches.by_layer(confidence))]


def edges(matches: Matches, *, num_bins: int, bound: float, scale: float) -> list[Tensor]:
    """Divergence of the distributions of edges from the teacher's, which are brought onto the student's positions.

    Both count distances from a box of their own. Each of the teacher's positions is a place in the image, and its
    likelihood is divided between the two of the student's positions around that place.

    Args:
        num_bins, bound, scale: of the student; see `ops.edges.edge_positions`.
    """
    logits, reference = (matches.of_pairs(partial(predicted, name=name)) for name in ("edges", "reference"))
    positions = positions_on(num_bins, bound, scale, logits.device).to(logits.dtype)
    shares, places = (matches.targets.extra[name][matches.target] for name in ("edge_shares", "edge_places"))
    target = on_grid(shares.to(logits.dtype), places.to(logits.dtype), reference, EdgeGrid(positions, scale))
    divergence = F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1).mean(-1)
    return matches.by_layer(divergence)


def on_grid(shares: Tensor, places: Tensor, reference: Tensor, grid: EdgeGrid) -> Tensor:
    """Distributions over places as distributions over the positions of another grid; no gradient.

    Args:
        shares: `[P, 4, N]`, sum to 1.
        places: `[P, 4, N]`, see `_places`.
        reference: `[P, 4]` boxes from which the grid counts.

    Returns:
        `[P, 4, K]`, sum to 1; what lies beyond the outermost positions is there.
    """
    start, unit = _outwards(reference.detach(), grid.scale)
    positions = grid.positions
    distances = ((places - start[..., None]) / unit[..., None]).clamp(positions[0], positions[-1])
    lower = (torch.bucketize(distances, positions, right=True) - 1).clamp(0, len(positions) - 2)
    upper_share = (distances - positions[lower]) / (positions[lower + 1] - positions[lower])
    made = shares.new_zeros(*shares.shape[:-1], len(positions))
    made.scatter_add_(-1, lower, shares * (1 - upper_share))
    return made.scatter_add_(-1, lower + 1, shares * upper_share)


def cosine(matches: Matches) -> list[Tensor]:
    """One minus the cosine between the cells of both encoders, mean over cells and levels: `[1, B]`.

    A teacher's map of another size is resampled. A cell without content has no direction: gradients of cells shorter
    than SHORTEST do not grow any further.
    """
    levels = []
    (stack,) = matches.stacks
    pair = cast(Maps, stack.prediction)
    for ours, theirs in zip(pair.maps, pair.teacher):
        if theirs.shape[-2:] != ours.shape[-2:]:
            theirs = F.interpolate(theirs, ours.shape[-2:], mode="bilinear", antialias=True)
        levels.append(1 - F.cosine_similarity(ours, theirs, dim=1, eps=SHORTEST).mean((1, 2)))
    return [torch.stack(levels).mean(0, keepdim=True)]


def _scores(logits: Tensor, activation: str) -> Tensor:
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)


def _overlap(boxes: Tensor, objects: Tensor) -> Tensor:
    """Which of the boxes `[Q, 4]` overlap an object of `[T, 4]` by SAME or more: bool `[Q]`."""
    if not len(objects):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    corners = cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(objects)[None]
    return box_iou(*corners).amax(1) >= SAME


def _outwards(boxes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The edges of boxes as coordinates that grow outwards, and the length of a distance of 1: `[P, 4]` each."""
    corners = cxcywh_to_xyxy(boxes)
    unit = boxes[..., 2:].clamp(min=EPS) / scale
    return torch.cat([-corners[..., :2], corners[..., 2:]], -1), unit.tile(2)


def _places(reference: Tensor, grid: EdgeGrid) -> Tensor:
    """Where each position of each edge lies in the image, as coordinates that grow outwards: `[T, 4, N]`."""
    start, unit = _outwards(reference, grid.scale)
    return start[..., None] + unit[..., None] * grid.positions.to(start)
