"""The input of a loss term: predictions, and the objects they are matched with.

Legend: l layers of a stack, L of all stacks, B images, Q queries (all groups), C logits, M matched pairs of a layer,
P pairs of everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from detr_exp.matcher.hungarian import Assignment
from detr_exp.ops.boxes import cxcywh_to_xyxy, iou_and_giou
from detr_exp.ops.transfer import to_device
from detr_exp.structures import Prediction, Targets, mapped

Found = TypeVar("Found")


class Stack(NamedTuple):
    """Predictions of some layers over the same queries, with their pairs.

    Attributes:
        place: which predictions: `layers`, `encoder`, `initial` (the boxes before the first layer), of the matched
            queries or, with `denoising`, of the denoising ones.
        prediction: stacked, logits `[l, B, Q, C]`, boxes `[l, B, Q, 4]`, and whatever else the network predicts.
        pairs: `[l, M]`.
        suffixes: of the term names, one per layer.
        copies: number of times each object occurs: query groups, denoising groups.
        num_pairs: of a layer, in the effective batch.
        num_queries: in the effective batch.
    """

    place: frozenset[str]
    prediction: Prediction
    pairs: Assignment
    suffixes: list[str]
    copies: int | Tensor
    num_pairs: float | Tensor
    num_queries: float | Tensor


class Once(Generic[Found]):
    """A property that is computed when it is first needed. `functools.cached_property` of Python < 3.12 takes a lock,
    which `torch.compile` cannot."""

    def __init__(self, method: Callable[[Matches], Found]) -> None:
        self.method = method

    def __get__(self, matches: Matches, owner: type) -> Found:
        return matches.once(self.method)


@dataclass(frozen=True)
class Matches:
    """Stacks of predictions and their objects; values that several terms use are computed once.

    Attributes:
        stacks: what the term is applied to.
        targets: the packed ground truth `pairs.target` points into.
        num_classes: of the data set; the label of a query without an object.
        activation: `sigmoid` or `softmax`.
        keypoint_counts: keypoints of each class slot.
        keypoint_sigmas: `[K]` their OKS scales.
        class_weights: `[num_classes + 1]` how much a match counts in the class loss by the class of its object, 1 for
            the label without one; None: all count 1.
    """

    stacks: Sequence[Stack]
    targets: Targets
    num_classes: int
    activation: str
    keypoint_counts: tuple[int, ...] = ()
    keypoint_sigmas: Tensor | None = None
    class_weights: Tensor | None = None
    _once: dict[Any, Any] = field(default_factory=dict, repr=False)

    @Once
    def rows(self) -> Tensor:
        """`[P]` int64, each pair's index into the flattened predictions of all stacks, one after another."""
        rows, first = [], 0
        for stack in self.stacks:
            num_layers, num_images, num_queries, _ = stack.prediction.boxes.shape
            size = num_images * num_queries
            end = first + num_layers * size
            starts = torch.arange(first, end, size, device=stack.pairs.query.device)
            rows.append((starts[:, None] + stack.pairs.image * num_queries + stack.pairs.query).flatten())
            first = end
        return torch.cat(rows)

    @Once
    def target(self) -> Tensor:
        """`[P]` int64, each pair's object."""
        return torch.cat([stack.pairs.target.flatten() for stack in self.stacks])

    @Once
    def boxes(self) -> Tensor:
        """`[P, 4]` predicted boxes, cxcywh."""
        return self.of_pairs(lambda prediction: prediction.boxes)

    @Once
    def target_boxes(self) -> Tensor:
        """`[P, 4]` the objects' boxes, cxcywh."""
        return self.targets.boxes.to(self.boxes.dtype)[self.target]

    @Once
    def overlaps(self) -> tuple[Tensor, Tensor]:
        """IoU and GIoU of each pair, `[P]`."""
        iou, giou = iou_and_giou(*cxcywh_to_xyxy(torch.stack((self.boxes, self.target_boxes))))
        return iou, giou

    @Once
    def labels(self) -> list[Tensor]:
        """Of each stack, the class of every query's object, `num_classes` without one: `[l, B, Q]` int64."""
        labels = torch.full((self._size,), self.num_classes, dtype=torch.int64, device=self.rows.device)
        return self._by_query(labels.index_copy_(0, self.rows, self.targets.labels[self.target]))

    def of_pairs(self, part: Callable[[Prediction], Tensor]) -> Tensor:
        """`[P, ...]`: a part `[l, B, Q, ...]` of the predictions, of the matched queries."""
        return torch.cat([part(stack.prediction).flatten(0, 2) for stack in self.stacks])[self.rows]

    def to_queries(self, values: Tensor) -> list[Tensor]:
        """Values of pairs `[P]` at their queries, zero elsewhere; of each stack `[l, B, Q]`."""
        return self._by_query(values.new_zeros(self._size).index_copy_(0, self.rows, values))

    def by_layer(self, values: Tensor) -> list[Tensor]:
        """Values of pairs `[P]`; of each stack `[l, M]`."""
        shapes = [stack.pairs.query.shape for stack in self.stacks]
        parts = values.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]

    def once(self, function: Callable[[Matches], Found]) -> Found:
        """`function(self)`, computed once, when the first term needs it."""
        if function not in self._once:
            self._once[function] = function(self)
        return self._once[function]

    @Once
    def _size(self) -> int:
        return sum(stack.prediction.boxes.shape[:3].numel() for stack in self.stacks)

    def _by_query(self, values: Tensor) -> list[Tensor]:
        shapes = [stack.prediction.boxes.shape[:3] for stack in self.stacks]
        parts = values.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]


def between(low: float, value: float | Tensor, high: float = math.inf) -> float | Tensor:
    """A clamped count; a tensor without a synchronisation."""
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(value, low), high)


def last_pairs(pairs: Assignment, num_layers: int) -> Assignment:
    """The first row of `pairs` for `num_layers` layers, then the others."""
    image, query, target = (torch.cat((index[:1].expand(num_layers, -1), index[1:])) for index in pairs[:3])
    return pairs._replace(image=image, query=query, target=target, host=None)


def union_pairs(pairs: Assignment, last: int) -> Assignment:
    """One pair for each query that is matched in any prediction: with the object it is most often matched with.

    The global optimal union set of D-FINE (Peng et al. 2024, section 4.2); an object may have several queries. In
    a tie the object of the last layer wins, else the one with the smaller index. Computed on the host, where the
    assignment was solved.

    Args:
        pairs: of all predictions, with `host`.
        last: the row of the last decoder layer.

    Returns:
        the same pairs in every row, `[S, M']`.
    """
    assert pairs.host is not None
    rows = pairs.host.transpose(1, 2, 0)  # [S, M, 3]
    votes, counts = np.unique(rows.reshape(-1, 3), axis=0, return_counts=True)
    counts = 2 * counts + _is_among(votes, rows[last])
    order = np.lexsort((votes[:, 2], -counts, votes[:, 1], votes[:, 0]))
    votes = votes[order]
    is_first = np.ones(len(votes), dtype=bool)
    is_first[1:] = (votes[1:, :2] != votes[:-1, :2]).any(axis=1)
    chosen = votes[is_first]
    per_image = tuple(np.bincount(chosen[:, 0], minlength=len(pairs.counts)).tolist())
    host = np.broadcast_to(chosen.T[:, None], (3, len(rows), len(chosen))).copy()
    on_device = to_device(host, pairs.image.device)
    return Assignment(on_device[0], on_device[1], on_device[2], per_image, host)


def _is_among(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`[n]` bool: which of the rows `[n, 3]` are in the others `[m, 3]`."""
    known = set(map(tuple, others.tolist()))
    return np.array([tuple(row) in known for row in rows.tolist()], dtype=bool)


def layer_of(pairs: Assignment, layers: slice) -> Assignment:
    """The pairs of the selected layers."""
    image, query, target = (index[layers] for index in pairs[:3])
    host = None if pairs.host is None else pairs.host[:, layers]
    return Assignment(image, query, target, pairs.counts, host)


def full_precision(prediction: Prediction) -> Prediction:
    """Half precision to float32; wider stays."""
    return mapped(prediction, lambda tensor: tensor if tensor.dtype == torch.float64 else tensor.float())
