"""Stacks of predictions that losses apply to: those to match, the denoising queries, and the maps of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from detr_exp.loss.matches import Stack, between, full_precision
from detr_exp.loss.teacher import Maps
from detr_exp.loss.term import MAPS
from detr_exp.matcher.hungarian import Assignment
from detr_exp.structures import Denoising, Outputs, Prediction, mapped, predicted


class Counts(NamedTuple):
    """Numbers of objects and images of the whole effective batch, and how other counts become such."""

    boxes: float | Tensor
    images: float | Tensor
    over_ranks: Callable[[Tensor], Tensor] | None


def matched_predictions(outputs: Outputs) -> list[tuple[str, list[str], Prediction]]:
    """(place, suffixes, stacked predictions in full precision) of the predictions to match."""
    layers = full_precision(outputs.layers)
    found = [("layers", [*(f"_aux_{i}" for i in range(len(layers.boxes) - 1)), ""], layers)]
    for place, suffix, one in (("initial", "_pre", outputs.initial), ("encoder", "_enc", outputs.encoder)):
        if one is not None:
            found.append((place, [suffix], _stacked(one)))
    return found


def denoising_stacks(denoising: Denoising, counts: Counts, objects: tuple[int, ...]) -> list[Stack]:
    """The denoising queries, whose objects are known; `objects` of each image."""

    def stack(place: str, prediction: Prediction, suffixes: list[str]) -> Stack:
        image, query, target = (
            index.expand(len(suffixes), -1) for index in (denoising.image, denoising.query, denoising.target)
        )
        copies = denoising.groups
        pairs = Assignment(image, query, target, tuple(copies * count for count in objects))
        num_pairs, num_queries = between(1, counts.boxes) * copies, prediction.boxes.shape[2] * counts.images
        return Stack(frozenset(["denoising", place]), prediction, pairs, suffixes, copies, num_pairs, num_queries)

    layers = full_precision(denoising.layers)
    stacks = [stack("layers", layers, [f"_dn_{i}" for i in range(len(layers.boxes))])]
    if denoising.initial is not None:
        stacks.append(stack("initial", _stacked(denoising.initial), ["_dn_pre"]))
    return stacks


def without_tasks(prediction: Prediction) -> Prediction:
    """Predictions without masks and keypoints, which what a teacher says has not."""
    if predicted(prediction, "masks") is not None:
        prediction = prediction._replace(masks=None)
    return prediction if predicted(prediction, "keypoints") is None else prediction._replace(keypoints=None)


def maps_stack(maps: Maps) -> Stack:
    """Maps as predictions without queries."""
    none = torch.zeros(1, 0, dtype=torch.int64)
    no_pairs = Assignment(none, none, none, counts=())
    return Stack(frozenset([MAPS]), full_precision(cast(Prediction, maps)), no_pairs, [""], 1, 0, 0)


def _stacked(prediction: Prediction) -> Prediction:
    """A single prediction as a stack of one layer, in full precision."""
    return mapped(full_precision(prediction), lambda tensor: tensor[None])
