"""One-to-one matching of objects and queries, solved exactly on the host.

The costs of all layers (and the encoder) are one tensor, which is copied to the host once: the only synchronisation
with the device in a training step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from detr_exp.matcher.cost import (
    TaskWeights,
    box_cost,
    keypoint_cost,
    mask_cost,
    object_logits,
    quality_cost,
    sigmoid_class_cost,
    softmax_class_cost,
)
from detr_exp.ops.transfer import to_device
from detr_exp.structures import MaskLogits, Prediction, Targets, mapped, predicted

# Stands for a cost that is not a number. Large enough to be avoided wherever there is a choice, small enough to leave
# the solver's float64 exact to 1e-7 on the other costs.
NON_FINITE_COST = 1e9

# Elements of one working tensor: on the CPU a handful of them has to fit the cache, elsewhere the memory.
CPU_CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 24


class Assignment(NamedTuple):
    """The matched pairs of queries and objects; row `s` belongs to layer `s`, and every layer has as many pairs.

    Attributes:
        image: `[S, M]` int64.
        query: `[S, M]` int64, index on the query axis (groups included); of a matcher, ascending within an image.
        target: `[S, M]` int64, packed index of the object.
        counts: pairs per image, on the host; they sum to M.
        host: `[3, S, M]` image, query and target in host memory, for code that needs their values; None where they were
            made on the device.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    counts: tuple[int, ...]
    host: np.ndarray | None = None


class Matcher(Protocol):
    """Matches objects with queries."""

    def __call__(
        self,
        predictions: Sequence[Prediction],
        targets: Targets,
        groups: int,
        weights: Mapping[str, float],
        keypoint_counts: Sequence[int],
        /,
    ) -> Assignment: ...


class HungarianMatcher:
    """Assignment of smallest total cost, per layer, image and query group (Carion et al. 2020, eq. 1).

    Args:
        activation: "sigmoid" or "softmax": how the class loss reads the logits.
        cost_class: weight of the class cost.
        cost_bbox: weight of the L1 distance between the boxes.
        cost_giou: weight of the negative generalised IoU.
        alpha: balance of positives in the focal class cost; sigmoid only.
        gamma: focusing exponent of the focal class cost; sigmoid only.
        late_epoch: from this one on, counted from 0, the cost is only the probability of the class times the IoU to
            the power `late_power`, which ranks pairs as the targets of such losses do; None: never.
        keypoint_sigmas: OKS scales of keypoints, for the cost of their similarity.

    Attributes:
        num_non_finite: number of costs that were not finite, since the start. Counted on the host, without a
            synchronisation.
    """

    def __init__(
        self,
        *,
        activation: str,
        cost_class: float,
        cost_bbox: float,
        cost_giou: float,
        alpha: float,
        gamma: float,
        late_epoch: int | None = None,
        late_power: float = 4.0,
        keypoint_sigmas: Sequence[float] = (),
    ) -> None:
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(f"activation is {activation!r}; the matcher knows 'sigmoid' and 'softmax'")
        costs = {"cost_class": cost_class, "cost_bbox": cost_bbox, "cost_giou": cost_giou}
        if min(costs.values()) < 0 or max(costs.values()) == 0:
            raise ValueError(
                f"matcher costs are {costs}; none may be negative and one must be positive: matcher.cost_class=2"
            )
        self.activation = activation
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma
        self.late_epoch, self.late_power = late_epoch, late_power
        self.keypoint_sigmas = keypoint_sigmas
        self.is_late = False
        self.num_non_finite = 0

    @torch.no_grad()
    def __call__(
        self,
        predictions: Sequence[Prediction],
        targets: Targets,
        groups: int = 1,
        weights: Mapping[str, float] | None = None,
        keypoint_counts: Sequence[int] = (),
    ) -> Assignment:
        """Match every layer of every prediction.

        Args:
            predictions: stacked predictions (logits `[S_i, B, G * Q, C_i]`, float32) over the same queries; one with
                fewer classes than the first is class-agnostic, and every object is its class 0.
            targets: ground truth, on the predictions' device.
            groups: query groups G matched independently; group-major on the query axis.
            weights: of the losses, by name; those of masks and keypoints (see `TaskWeights`) also weigh costs, where
                predicted. None: no such costs.
            keypoint_counts: keypoints of each class slot.
        """
        boxes = torch.cat([prediction.boxes for prediction in predictions])
        size = boxes.shape[2] // groups
        pairs_per_image = tuple(groups * min(count, size) for count in targets.counts)
        if not len(targets):
            empty = torch.zeros(len(boxes), 0, dtype=torch.int64, device=boxes.device)
            return Assignment(empty, empty, empty, pairs_per_image, np.zeros((3, len(boxes), 0), dtype=np.int64))
        image = to_device(np.repeat(np.arange(len(targets.counts)), targets.counts), boxes.device)
        costs = self._costs(predictions, boxes, targets, image)
        if weights is not None:
            task_weights = TaskWeights(**{name: weights[name] for name in TaskWeights._fields if name in weights})
            _add_mask_costs(costs, predictions, targets, task_weights)
            known = (keypoint_counts, self.keypoint_sigmas, task_weights)
            _add_keypoint_costs(costs, predictions, targets, image, *known)
        pairs = solve(self._finite(to_host(costs)), targets.counts, groups)
        matched_image, query, target = to_device(pairs, boxes.device)
        return Assignment(matched_image, query, target, pairs_per_image, pairs)

    def begin_epoch(self, epoch: int) -> None:
        """See `protocols.Epochal`."""
        self.is_late = self.late_epoch is not None and epoch >= self.late_epoch

    def compile(self) -> None:
        """Compile the cost of class and box, during the first steps."""
        self._pair_costs = torch.compile(self._pair_costs, dynamic=True)  # type: ignore[method-assign]

    def _costs(self, predictions: Sequence[Prediction], boxes: Tensor, targets: Targets, image: Tensor) -> Tensor:
        """Class and box costs `[S, T, Q]`."""
        logits = [prediction.logits for prediction in predictions]
        if self.activation == "softmax":
            logits = [item.log_softmax(-1) for item in logits]
        planes, target_boxes = boxes.permute(3, 0, 1, 2).contiguous(), targets.boxes.to(boxes.dtype)
        agnostic = torch.zeros_like(targets.labels)
        labels = [targets.labels if item.shape[-1] == logits[0].shape[-1] else agnostic for item in logits]
        chunks = _chunks(len(targets), boxes.shape[0] * boxes.shape[2], boxes.device)
        of_pairs = self._late_costs if self.is_late else self._pair_costs
        costs = [
            of_pairs(logits, [item[chunk] for item in labels], planes, target_boxes[chunk], image[chunk])
            for chunk in chunks
        ]
        return torch.cat(costs, dim=1)

    def _pair_costs(
        self, logits: list[Tensor], labels: list[Tensor], planes: Tensor, target_boxes: Tensor, image: Tensor
    ) -> Tensor:
        """Costs of some objects `[S, C, Q]`: the part that is compiled."""
        evidence = torch.cat([object_logits(a, image, b) for a, b in zip(logits, labels)])
        if self.activation == "softmax":
            class_cost = softmax_class_cost(evidence)
        else:
            class_cost = sigmoid_class_cost(evidence, self.alpha, self.gamma)
        pair_cost = box_cost(planes, target_boxes, image, cost_bbox=self.cost_bbox, cost_giou=self.cost_giou)
        return pair_cost.add_(class_cost, alpha=self.cost_class)

    def _late_costs(
        self, logits: list[Tensor], labels: list[Tensor], planes: Tensor, target_boxes: Tensor, image: Tensor
    ) -> Tensor:
        """As `_pair_costs`, from `late_epoch` on."""
        evidence = torch.cat([object_logits(a, image, b) for a, b in zip(logits, labels)])
        probability = evidence.exp() if self.activation == "softmax" else evidence.sigmoid()
        return quality_cost(probability, planes, target_boxes, image, self.late_power)

    def _finite(self, costs: np.ndarray) -> np.ndarray:
        finite = np.isfinite(costs)
        if finite.all():
            return costs
        self.num_non_finite += costs.size - int(finite.sum())
        return np.where(finite, costs, NON_FINITE_COST)


def _add_mask_costs(costs: Tensor, predictions: Sequence[Prediction], targets: Targets, weights: TaskWeights) -> None:
    for layer, masks in mask_layers(predictions):
        assert targets.masks is not None
        costs[layer] += mask_cost(masks, targets.masks, targets.counts, weights)


def mask_layers(predictions: Sequence[Prediction]) -> list[tuple[int, MaskLogits]]:
    """Masks of every layer that has them, with the index of the layer.

    Points are sampled layer by layer, the last decoder layer first: RF-DETR's order, so that a seed gives its points.
    """
    stacks = [(predicted(prediction, "masks"), len(prediction.boxes)) for prediction in predictions]
    layers = [mapped(masks, itemgetter(i)) for masks, count in stacks for i in range(count)]
    last = len(predictions[0].boxes) - 1
    order = (last, *range(last), *range(last + 1, len(layers)))
    return [(layer, masks) for layer in order if (masks := layers[layer]) is not None]


def _add_keypoint_costs(
    costs: Tensor,
    predictions: Sequence[Prediction],
    targets: Targets,
    image: Tensor,
    keypoint_counts: Sequence[int],
    keypoint_sigmas: Sequence[float],
    weights: TaskWeights,
) -> None:
    first = 0
    for prediction in predictions:
        end = first + len(prediction.boxes)
        keypoints = predicted(prediction, "keypoints")
        if keypoints is not None:
            num_points = keypoints.shape[0] * keypoints.shape[2] * max(keypoint_counts)
            for chunk in _chunks(len(targets), num_points, costs.device):
                costs[first:end, chunk] += keypoint_cost(
                    *(keypoints, targets, chunk, image[chunk], keypoint_counts, keypoint_sigmas, weights)
                )
        first = end


def _chunks(num_objects: int, elements: int, device: torch.device) -> list[slice]:
    """Chunks of objects whose working tensors stay small enough, given the elements per object."""
    step = max(1, (CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK) // elements)
    return [slice(start, start + step) for start in range(0, num_objects, step)]


def solve(costs: np.ndarray, counts: Sequence[int], groups: int = 1) -> np.ndarray:
    """Solve every layer, image and group.

    Args:
        costs: `[S, T, G * Q]`, finite.
        counts: objects per image; they sum to T.
        groups: G.

    Returns:
        `[3, S, M]` int64: image, query, target. An image with more objects than Q has only Q of them matched, in
        every group.
    """
    from scipy.optimize import linear_sum_assignment  # imported late: a tenth of the start time of a training

    num_layers, _, num_queries = costs.shape
    size = num_queries // groups
    firsts = np.cumsum(counts) - counts
    queries, objects = [], []
    for layer in costs.astype(np.float64):
        for first, count in zip(firsts, counts):
            for start in range(0, num_queries, size):
                rows, columns = linear_sum_assignment(layer[first : first + count, start : start + size])
                objects.append(rows + first)
                queries.append(columns + start)
    target, query = (np.concatenate(parts).reshape(num_layers, -1) for parts in (objects, queries))
    image = np.repeat(np.arange(len(counts)), [groups * min(count, size) for count in counts])
    order = np.argsort(image * num_queries + query, axis=1)
    pairs = (np.broadcast_to(image, query.shape), query, target)
    return np.stack([np.take_along_axis(index, order, axis=1) for index in pairs])


def to_host(costs: Tensor) -> np.ndarray:
    """The one copy from device to host."""
    return costs.cpu().numpy()
