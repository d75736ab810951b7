"""Contrastive denoising queries (DINO, arXiv 2203.03605, section 3.3): noisy copies of objects, near and far.

Legend: B images, T objects of the batch, G objects of the fullest image, K groups, N = 2 G K denoising queries,
Q matching queries, P keypoints of an object.

A group holds, for every object, a positive copy (noise below half a box) and a negative one (noise beyond), ordered as
G positives, then G negatives. Nothing here has parameters or waits for the device: counts are on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_exp.model.layer.query_selection import POINT_EPS, inverse_sigmoid
from detr_exp.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_exp.ops.transfer import to_device
from detr_exp.structures import Targets


class NoisyQueries(NamedTuple):
    """Denoising queries, which come before the matching queries.

    Attributes:
        labels: `[B, N]` int64; the number of classes marks a slot without object.
        places: `[B, N, 4]` logits of boxes cxcywh, or `[B, N, 1 + P, 2]` of the centre and the keypoints; float32.
        allowed: `[N + Q, N + Q]` bool, True where a query (row) may attend to another (column).
        image, query, target: `[M]` int64 each; the object that each positive query copies, as in `Denoising`.
        groups: K.
        supervised: queries that count; what follows up to N only rounds the shape.
    """

    labels: Tensor
    places: Tensor
    allowed: Tensor
    image: Tensor
    query: Tensor
    target: Tensor
    groups: int
    supervised: int


def group_count(num_denoising: int, max_objects: int) -> int:
    """Groups K that make about `2 * num_denoising` queries when the fullest image has `max_objects` objects.

    With more objects than `num_denoising`, and with none at all, there is one group.
    """
    return max(1, num_denoising // max_objects) if max_objects else 1


def noisy_queries(
    targets: Targets,
    *,
    num_classes: int,
    num_queries: int,
    num_denoising: int,
    label_noise_ratio: float,
    box_noise_scale: float,
    box_noise_fold: bool = False,
    sigmas: Sequence[float] | None = None,
    image_size: tuple[int, int] = (1, 1),
    groups: int | None = None,
    fixed_size: bool = False,
) -> NoisyQueries:
    """Sample the denoising queries of a batch with the default random generator.

    Args:
        num_denoising: positive queries per image, about; an image with more objects makes one group of all of them.
        label_noise_ratio: twice the share of labels replaced by a random class that is annotated in the image.
        box_noise_scale: how many half box sizes the corners of positives move at most; those of negatives move up to
            twice as far.
        box_noise_fold: turn boxes that noise has turned inside out; without, their size counts as zero.
        sigmas: `[P]` OKS scales, for copies of keypoints; None: of boxes. `box_noise_scale` then multiplies distances.
        image_size: (height, width), for the shape of images with keypoints.
        groups: K where it is decided elsewhere (the same on all ranks); None derives it from this batch.
        fixed_size: round N up to a multiple of `2 * num_denoising`, so that compiled code sees few shapes: one for all
            images of up to `num_denoising` objects, and one more for every further `num_denoising`.
    """
    slots, owners = _slots(targets.counts)
    width = slots.shape[1]
    groups = groups or group_count(num_denoising, max(targets.counts, default=0))
    count = 2 * groups * width
    device = targets.labels.device

    # One transfer holds everything that only depends on the counts.
    positives = torch.stack([_repeated(column, groups, 2 * width * step) for column, step in zip(owners, (0, 1, 0))])
    layout = to_device(torch.cat([slots.flatten(), positives.flatten()]), device)
    slots, (image, query, target) = layout[: slots.numel()].view_as(slots), layout[slots.numel() :].view(3, -1)

    labels = torch.cat([targets.labels, targets.labels.new_full((1,), num_classes)])[slots].tile(1, 2 * groups)
    boxes = torch.cat([targets.boxes, targets.boxes.new_zeros(1, 4)])[slots].float().tile(1, 2 * groups, 1)
    negative = (torch.arange(count, device=device) // width % 2).view(-1, 1)
    is_empty = labels == num_classes
    labels = _noisy_labels(labels, num_classes, label_noise_ratio, targets.annotated)
    if sigmas is None:
        boxes = _noisy_boxes(boxes, negative, box_noise_scale)
        logits = inverse_sigmoid(boxes.abs() if box_noise_fold else boxes)  # centres are in 0..1
    else:
        assert targets.keypoints is not None
        points = torch.cat([targets.keypoints, targets.keypoints.new_zeros(1, *targets.keypoints.shape[1:])])
        points = points[slots].float().tile(1, 2 * groups, 1, 1)
        points = _noisy_points(points, boxes, negative, box_noise_scale, sigmas, image_size)
        logits = inverse_sigmoid(points, POINT_EPS).masked_fill(is_empty[..., None, None], 0.0)

    bucket = 2 * num_denoising if fixed_size else 1
    size = -(-count // bucket) * bucket
    if size > count:
        labels = torch.cat([labels, labels.new_full((len(labels), size - count), num_classes)], dim=1)
        logits = torch.cat([logits, logits.new_zeros(len(logits), size - count, *logits.shape[2:])], dim=1)
    allowed = _allowed(size, 2 * width, num_queries, device)
    return NoisyQueries(labels, logits, allowed, image, query, target, groups, count)


def _slots(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Packed object index of each slot `[B, G]`, T where there is none, and (image, slot, object) of each `[3, M]`.

    A batch without objects still gets one empty slot per image, so that the class embedding takes part in every step.
    """
    slots = torch.full((len(counts), max(1, *counts)), sum(counts))
    owners, first = [], 0
    for image, count in enumerate(counts):
        slot = torch.arange(count)
        slots[image, :count] = first + slot
        owners.append(torch.stack([torch.full_like(slot, image), slot, first + slot]))
        first += count
    return slots, torch.cat(owners, dim=1)


def _repeated(column: Tensor, groups: int, step: int) -> Tensor:
    """A column once per group, `step` higher each time."""
    return (column + torch.arange(groups)[:, None] * step).flatten()


def _noisy_labels(labels: Tensor, num_classes: int, ratio: float, annotated: Tensor | None) -> Tensor:
    """Some labels `[B, N]` replaced by a random class that the image has annotations of; empty slots stay empty."""
    if ratio <= 0:
        return labels
    replaced = torch.rand(labels.shape, device=labels.device) < ratio * 0.5
    if annotated is None:
        random = torch.randint(num_classes, labels.shape, device=labels.device)
    else:
        known_first = annotated.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        number = torch.rand(labels.shape, device=labels.device) * annotated.sum(1, keepdim=True)
        random = known_first.gather(1, number.long().clamp(max=num_classes - 1))
        replaced = replaced & annotated.any(1, keepdim=True)
    return torch.where(replaced & (labels != num_classes), random, labels)


def _noisy_boxes(boxes: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Every corner coordinate moved by less (positives) or more (`negative` is 1) than `scale` half box sizes.

    Boxes cxcywh in 0..1; what leaves the image is cut off. Negative boxes can turn inside out; their size is then
    below zero.
    """
    if scale <= 0:
        return boxes
    sign = torch.randint(2, boxes.shape, device=boxes.device) * 2 - 1
    part = torch.rand(boxes.shape, device=boxes.device) + negative
    half = boxes[..., 2:].tile(2) * 0.5
    return xyxy_to_cxcywh((cxcywh_to_xyxy(boxes) + sign * part * half * scale).clamp(0, 1))


def _noisy_points(
    points: Tensor, boxes: Tensor, negative: Tensor, scale: float, sigmas: Sequence[float], size: tuple[int, int]
) -> Tensor:
    """Centres of boxes and, moved, labelled keypoints (DETRPose, arXiv 2506.13027): `[B, N, 1 + P, 2]`.

    Each point moves in a direction of its own, so far that its similarity (OKS) with the original is 0.5 to 1, that of
    negatives 0.1 to 0.5.

    Args:
        points: `[B, N, P, 3]` x, y in 0..1 and visibility.
        boxes: `[B, N, 4]` cxcywh in 0..1.
    """
    height, width = size
    place, labelled = points[..., :2], points[..., 2:] > 0
    spread = 2 * torch.stack([torch.full((), sigma, device=points.device) for sigma in sigmas])[:, None]
    part = torch.rand(labelled.shape, device=points.device)
    exponent = torch.where(negative[..., None] == 1, math.log(2) + part * math.log(5), part * math.log(2))
    area = boxes[..., 2:].prod(-1)[..., None, None] * (height * width)
    reach = (2 * exponent * area).sqrt() * spread * (scale / max(size))
    moved = torch.where(labelled, place + reach * _directions(place), place)
    return torch.cat([boxes[:, :, None, :2], moved], dim=2)


def _directions(points: Tensor) -> Tensor:
    """As many vectors of length 1, `[..., 2]`."""
    angle = torch.rand(points.shape[:-1], device=points.device) * (2 * math.pi)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def _allowed(size: int, group_size: int, num_queries: int, device: torch.device) -> Tensor:
    """All queries attend to the matching queries; only queries of the same group attend to denoising queries."""
    group = torch.arange(size, device=device) // group_size
    group = torch.cat([group, group.new_full((num_queries,), -1)])
    return (group == group[:, None]) | (group == -1)
