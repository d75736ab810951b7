"""Mask losses of matched pairs, sampled at points (Cheng et al. 2022, Mask2Former, section 3.3.3).

Legend: S layers, M pairs of a layer, D mask dimensions, h x w the mask head's size, P points of a mask.
"""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_exp.loss.matches import Matches
from detr_exp.matcher.hungarian import Assignment
from detr_exp.ops.points import PIXELS_PER_POINT, sample_bilinear, sample_nearest, uncertain_points
from detr_exp.structures import MaskLogits, mapped


class MaskLosses(NamedTuple):
    """Mask losses of each layer, summed over its pairs: `[S]`.

    Attributes:
        ce: binary cross-entropy, mean over the points of a mask.
        dice: one minus the Dice overlap of the points.
    """

    ce: Tensor
    dice: Tensor


def ce(matches: Matches) -> list[Tensor]:
    """Binary cross-entropy at points, as a term (see `loss.term`)."""
    return [losses.ce for losses in matches.once(point_losses)]


def dice(matches: Matches) -> list[Tensor]:
    """Dice loss at the same points, as a term."""
    return [losses.dice for losses in matches.once(point_losses)]


def point_losses(matches: Matches) -> list[MaskLosses]:
    """Losses of all layers that have masks, each at points of its own; of each stack.

    Points are sampled layer by layer, the last decoder layer first: RF-DETR's order, so that a seed gives its points.
    """
    target_masks = matches.targets.masks
    assert target_masks is not None
    places = [(n, layer) for n, stack in enumerate(matches.stacks) for layer in range(len(stack.suffixes))]
    last = len(matches.stacks[0].suffixes) - 1
    found = {}
    for n, layer in (places[last], *places[:last], *places[last + 1 :]):
        stack = matches.stacks[n]
        masks = mapped(stack.prediction.masks, itemgetter(layer))
        assert masks is not None
        found[n, layer] = _layer_losses(masks, stack.pairs, layer, target_masks)
    by_stack = [[found[n, layer] for layer in range(len(stack.suffixes))] for n, stack in enumerate(matches.stacks)]
    return [MaskLosses(*(torch.stack(parts) for parts in zip(*losses))) for losses in by_stack]


def _layer_losses(masks: MaskLogits, pairs: Assignment, layer: int, target_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Zero, with the graph attached, where nothing is matched."""
    order = pairs.image[layer].argsort(stable=True)  # denoising pairs are in the order of groups
    image, query, target = (index[layer][order][None] for index in pairs[:3])
    logits = matched_logits(masks, Assignment(image, query, target, pairs.counts), 0)
    if not len(logits):
        return logits.sum(), logits.sum()
    height, width = logits.shape[-2:]
    points = uncertain_points(logits, max(height, height * width // PIXELS_PER_POINT))
    values = sample_bilinear(logits[:, None], points).squeeze(1)
    labels = sample_nearest(target_masks, target[0], points).to(values.dtype)

    ce = F.binary_cross_entropy_with_logits(values, labels, reduction="none").mean(1)
    scores = values.sigmoid()
    overlap = (2 * (scores * labels).sum(1) + 1) / (scores.sum(1) + labels.sum(1) + 1)
    return ce.sum(), (1 - overlap).sum()


def matched_logits(masks: MaskLogits, pairs: Assignment, layer: int) -> Tensor:
    """Dense masks `[M, h, w]` of the matched queries only, image by image; pairs are in the order of images."""
    queries = masks.queries[pairs.image[layer], pairs.query[layer]].split(pairs.counts)
    logits = [query @ feature for query, feature in zip(queries, masks.features.flatten(2))]
    return (torch.cat(logits) + masks.bias).unflatten(1, masks.features.shape[-2:])
