"""Who is supervised by whom, and with what weight.

Legend: L decoder layers, B images, Q queries (all groups), C logits, N rows (a query of a layer of an image),
M matched pairs of a layer, P matched pairs of everything.

Three sets of predictions are supervised: the decoder layers and the encoder's tokens, matched anew at every step, and
the denoising queries, who know their objects. Boxes and pairs of all sets are handled together; the class loss runs
once a set, on all of its layers.

Counts (of boxes, of images) may be numbers or 0-dim tensors. They stay what they are: a number costs no operator, and
a tensor on the device is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_exp.loss.box import pair_losses
from detr_exp.matcher.hungarian import Assignment
from detr_exp.ops.boxes import EPS
from detr_exp.structures import Denoising, Outputs, Prediction, Targets


class _Set(NamedTuple):
    """Predictions over the same queries, with their pairs.

    Attributes:
        prediction: logits `[l, B, Q, C]`, boxes `[l, B, Q, 4]`.
        pairs: indices `[l, M]`.
        suffixes: of the term names, one a layer.
        copies: how often each object occurs: query groups, denoising groups.
    """

    prediction: Prediction
    pairs: Assignment
    suffixes: list[str]
    copies: int


class SetCriterion(nn.Module):
    """Weighted losses of a network's outputs.

    Args:
        num_classes: K.
        class_loss: see `detr_exp.loss.classification`, with its shape bound.
        activation: "sigmoid" (K logits) or "softmax" (K + 1, background last).
        matcher: see `detr_exp.matcher.hungarian`.
        weight_class: weight of the class loss.
        weight_bbox: weight of the L1 box loss.
        weight_giou: weight of the GIoU loss.
        share_matched_indices: match the last layer only and supervise all decoder layers with its pairs.
        boxes_weight_format: None, "iou" or "giou"; see `detr_exp.loss.box`.
        aux_loss: supervise the intermediate layers, the encoder and the denoising queries, not only the last layer.
        eos_coef: weight of background in the class loss, where that divides by the sum of weights (softmax); None
            where it divides by objects.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        class_loss: Callable[..., Tensor],
        activation: str,
        matcher: Callable[..., Assignment],
        weight_class: float,
        weight_bbox: float,
        weight_giou: float,
        share_matched_indices: bool,
        boxes_weight_format: str | None,
        aux_loss: bool,
        eos_coef: float | None = None,
    ) -> None:
        super().__init__()
        if boxes_weight_format not in (None, "iou", "giou"):
            raise ValueError(
                f"loss.boxes_weight_format is {boxes_weight_format!r}; it may be null, iou or giou: "
                "loss.boxes_weight_format=iou"
            )
        self.num_classes = num_classes
        self.class_loss = class_loss
        self.activation = activation
        self.matcher = matcher
        self.weight_class = weight_class
        self.weight_bbox = weight_bbox
        self.weight_giou = weight_giou
        self.share_matched_indices = share_matched_indices
        self.boxes_weight_format = boxes_weight_format
        self.aux_loss = aux_loss
        self.eos_coef = eos_coef

    def forward(
        self, outputs: Outputs, targets: Targets, num_boxes: float | Tensor, num_images: float | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses in float32 (float64 stays), whatever precision the network ran in.

        Args:
            outputs: of the network, on one device with the targets.
            targets: ground truth of this batch.
            num_boxes: objects of the whole effective batch: all micro-batches of an accumulation window, mean over the
                ranks. Terms of micro-batches then simply add up.
            num_images: images of the same; needed only by a class loss that divides by the sum of weights. None: this
                batch is all there is.

        Returns:
            Weighted 0-dim terms `loss_<part><suffix>` and their sum `total`. Suffixes: none for the last layer,
            `_aux_<i>`, `_enc`, `_dn_<i>`.
        """
        with torch.autocast(outputs.layers.logits.device.type, enabled=False):
            unsupervised = None
            if not self.aux_loss:
                unsupervised, outputs = outputs, Outputs(_last(outputs.layers), groups=outputs.groups)
            sets = self._sets(outputs, targets)
            images = len(targets.counts) if num_images is None else num_images
            terms = self._box_and_class_terms(sets, targets, num_boxes, images)
            total = torch.cat(list(terms.values())).sum()
            if unsupervised is not None:
                total = total + 0 * _sum(unsupervised)
        suffixes = [suffix for item in sets for suffix in item.suffixes]
        named = {
            f"{name}{suffix}": term
            for name, vector in terms.items()
            for suffix, term in zip(suffixes, vector.unbind(), strict=False)
        }
        return {**named, "total": total}

    def _sets(self, outputs: Outputs, targets: Targets) -> list[_Set]:
        predictions = [_full_precision(outputs.layers)]
        if outputs.encoder is not None:
            predictions.append(_full_precision(_stacked(outputs.encoder)))
        self._check_columns(predictions[0])
        num_layers = len(predictions[0].boxes)
        names = [[*(f"_aux_{i}" for i in range(num_layers - 1)), ""], ["_enc"]]
        matched = self._match(predictions, targets, outputs.groups)
        sets = [
            _Set(prediction, pairs, suffixes, outputs.groups)
            for prediction, pairs, suffixes in zip(predictions, matched, names, strict=False)
        ]
        if outputs.denoising is not None:
            sets.append(_denoising_set(outputs.denoising))
        return sets

    def _match(self, predictions: list[Prediction], targets: Targets, groups: int) -> list[Assignment]:
        """Pairs of each prediction, from one call of the matcher."""
        num_layers = len(predictions[0].boxes)
        if not self.share_matched_indices:
            pairs = self.matcher(predictions, targets, groups)
            sizes = [len(prediction.boxes) for prediction in predictions]
            return [Assignment(*parts) for parts in zip(*(index.split(sizes) for index in pairs))]
        pairs = self.matcher([_last(predictions[0]), *predictions[1:]], targets, groups)
        shared = [Assignment(*(index[:1].expand(num_layers, -1) for index in pairs))]
        return shared + [Assignment(*(index[1:] for index in pairs))] * (len(predictions) - 1)

    def _box_and_class_terms(
        self, sets: list[_Set], targets: Targets, num_boxes: float | Tensor, num_images: float | Tensor
    ) -> dict[str, Tensor]:
        """Vectors of terms over the layers of all sets."""
        boxes = torch.cat([item.prediction.boxes.flatten(0, 2) for item in sets])
        rows, target = _flat_pairs(sets)
        pairs = pair_losses(boxes[rows], targets.boxes.to(boxes.dtype)[target], self.boxes_weight_format)
        labels = torch.full((len(boxes),), self.num_classes, dtype=torch.int64, device=boxes.device)
        labels = labels.index_copy_(0, rows, targets.labels[target])
        quality = boxes.new_zeros(len(boxes)).index_copy_(0, rows, pairs.quality)

        num_rows = [item.prediction.boxes.shape[:3].numel() for item in sets]
        num_pairs = [item.pairs.query.numel() for item in sets]
        split = (
            pairs.bbox.split(num_pairs),
            pairs.giou.split(num_pairs),
            labels.split(num_rows),
            quality.split(num_rows),
        )
        terms: dict[str, list[Tensor]] = {"loss_class": [], "loss_bbox": [], "loss_giou": []}
        for item, bbox, giou, set_labels, set_quality in zip(sets, *split):
            shape = item.pairs.query.shape
            divisor = _between(1, num_boxes) * item.copies
            class_divisor = divisor
            if self.eos_coef is not None:
                class_divisor = _sum_of_weights(item, num_boxes, num_images, self.eos_coef)
            terms["loss_class"].append(
                self._class_sums(item, set_labels, set_quality) * (self.weight_class / class_divisor)
            )
            terms["loss_bbox"].append(bbox.view(shape).sum(1) * (self.weight_bbox / divisor))
            terms["loss_giou"].append(giou.view(shape).sum(1) * (self.weight_giou / divisor))
        return {name: torch.cat(vectors) for name, vectors in terms.items()}

    def _class_sums(self, item: _Set, labels: Tensor, quality: Tensor) -> Tensor:
        """Class loss of each layer of a set, summed over its queries."""
        logits = item.prediction.logits.flatten(0, 2)
        num_classes = logits.shape[-1] - (self.activation == "softmax")
        if num_classes < self.num_classes:  # class-agnostic: any object is class 0
            labels = (labels == self.num_classes).to(labels.dtype)
        loss = self.class_loss(logits, labels, quality, num_classes=num_classes)
        return loss.view(len(item.prediction.logits), -1).sum(1)

    def _check_columns(self, prediction: Prediction) -> None:
        needed = self.num_classes + (self.activation == "softmax")
        if prediction.logits.shape[-1] != needed:
            raise ValueError(
                f"the network gives {prediction.logits.shape[-1]} logits per query, but {self.num_classes} classes "
                f"with a {self.activation} loss need {needed}; build the network with num_classes={self.num_classes} "
                f"and activation={self.activation!r}"
            )


def _denoising_set(denoising: Denoising) -> _Set:
    prediction = _full_precision(denoising.layers)
    num_layers = len(prediction.boxes)
    indices = (denoising.image, denoising.query, denoising.target)
    pairs = Assignment(*(index.expand(num_layers, -1) for index in indices))
    return _Set(prediction, pairs, [f"_dn_{i}" for i in range(num_layers)], denoising.groups)


def _sum_of_weights(
    item: _Set, num_boxes: float | Tensor, num_images: float | Tensor, background: float
) -> float | Tensor:
    """Weights of a layer's queries over the effective batch: one with an object, `background` without.

    Made of counts and not of this batch's labels, so that all micro-batches divide by the same number.
    """
    num_queries = item.prediction.logits.shape[2] * num_images
    share = _between(0, num_boxes * item.copies / num_queries, 1)
    return _between(EPS, num_queries * (share + (1 - share) * background))


def _between(low: float, value: float | Tensor, high: float = math.inf) -> float | Tensor:
    """A count within bounds; a tensor without waiting for it."""
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(low, value), high)


def _flat_pairs(sets: list[_Set]) -> tuple[Tensor, Tensor]:
    """Rows (into the flattened predictions of all sets, one after another) and packed objects of all pairs, `[P]`."""
    rows, first = [], 0
    for item in sets:
        num_layers, num_images, num_queries = item.prediction.boxes.shape[:3]
        size = num_images * num_queries
        starts = torch.arange(first, first + num_layers * size, size, device=item.pairs.query.device)
        rows.append((starts[:, None] + item.pairs.image * num_queries + item.pairs.query).flatten())
        first += num_layers * size
    return torch.cat(rows), torch.cat([item.pairs.target.flatten() for item in sets])


def _full_precision(prediction: Prediction) -> Prediction:
    """Half precision to float32; wider stays."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    return prediction._replace(logits=cast(prediction.logits), boxes=cast(prediction.boxes))


def _stacked(prediction: Prediction) -> Prediction:
    """A single prediction as a stack of one layer."""
    return prediction._replace(logits=prediction.logits[None], boxes=prediction.boxes[None])


def _last(prediction: Prediction) -> Prediction:
    return prediction._replace(logits=prediction.logits[-1:], boxes=prediction.boxes[-1:])


def _sum(outputs: Outputs) -> Tensor:
    """Sum of all predictions, to keep what is not supervised in the graph (every parameter needs a gradient)."""
    predictions = [outputs.layers]
    if outputs.encoder is not None:
        predictions.append(outputs.encoder)
    if outputs.denoising is not None:
        predictions.append(outputs.denoising.layers)
    return torch.stack([prediction.logits.sum() + prediction.boxes.sum() for prediction in predictions]).float().sum()
