"""Who is supervised by whom, and with what weight.

Legend: L decoder layers, B images, Q queries (all groups), C logits, N rows (a query of a layer of an image),
M matched pairs of a layer, P matched pairs of everything.

Two parts are supervised: the decoder layers with the encoder's tokens, matched anew at every step, and the denoising
queries, who know their objects. Boxes and pairs of both are handled together; the class loss runs on all layers of a
prediction at once.

Counts (of boxes, of images) may be numbers or 0-dim tensors. They stay what they are: a number costs no operator, and
a tensor on the device is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_exp.loss.box import pair_losses
from detr_exp.loss.keypoint import keypoint_losses
from detr_exp.loss.mask import mask_losses
from detr_exp.matcher.cost import TaskWeights
from detr_exp.matcher.hungarian import Assignment
from detr_exp.ops.boxes import EPS
from detr_exp.structures import Denoising, Outputs, Prediction, Targets

TERMS = {  # of the last layer, by what the network predicts
    "boxes": ("loss_class", "loss_bbox", "loss_giou"),
    "masks": ("loss_mask_ce", "loss_mask_dice"),
    "keypoints": ("loss_keypoint_l1", "loss_keypoint_findable", "loss_keypoint_visible", "loss_keypoint_nll"),
}


class _Part(NamedTuple):
    """Predictions over the same queries, with their pairs.

    Attributes:
        predictions: stacked, logits `[l_i, B, Q, C_i]`, boxes `[l_i, B, Q, 4]`; together `l` layers.
        pairs: `[l, M]`.
        suffixes: of the term names, one a layer.
        copies: how often each object occurs: query groups, denoising groups.
    """

    predictions: list[Prediction]
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
        weight_mask_ce: weight of the masks' cross-entropy, and of its matching cost; where masks are predicted.
        weight_mask_dice: of the masks' Dice loss.
        weight_keypoint_l1: of the keypoints' distance, and of its matching cost; where keypoints are predicted.
        weight_keypoint_findable: of "the point is labelled".
        weight_keypoint_visible: of "the point is visible".
        weight_keypoint_nll: of the keypoints' likelihood.
        share_matched_indices: match the last layer only and supervise all decoder layers with its pairs.
        boxes_weight_format: None, "iou" or "giou"; see `detr_exp.loss.box`.
        aux_loss: supervise the intermediate layers, the encoder and the denoising queries, not only the last layer.
        eos_coef: weight of background in the class loss, where that divides by the sum of weights (softmax); None
            where it divides by objects.
        keypoint_counts: keypoints of each class slot, where keypoints are predicted.
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
        weight_mask_ce: float,
        weight_mask_dice: float,
        weight_keypoint_l1: float,
        weight_keypoint_findable: float,
        weight_keypoint_visible: float,
        weight_keypoint_nll: float,
        share_matched_indices: bool,
        boxes_weight_format: str | None,
        aux_loss: bool,
        eos_coef: float | None = None,
        keypoint_counts: Sequence[int] = (),
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
        self.keypoint_counts = tuple(keypoint_counts)
        self.task_weights = TaskWeights(
            mask_ce=weight_mask_ce,
            mask_dice=weight_mask_dice,
            keypoint_l1=weight_keypoint_l1,
            keypoint_findable=weight_keypoint_findable,
            keypoint_visible=weight_keypoint_visible,
            keypoint_nll=weight_keypoint_nll,
        )

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
            parts = self._parts(outputs, targets)
            images = len(targets.counts) if num_images is None else num_images
            terms = self._box_and_class_terms(parts, targets, num_boxes, images)
            terms |= self._task_terms(parts[0], targets, num_boxes)
            total = torch.cat(list(terms.values())).sum()
            if unsupervised is not None:
                total = total + 0 * _sum(unsupervised)
        suffixes = [suffix for part in parts for suffix in part.suffixes]
        named = {
            f"{name}{suffix}": term
            for name, vector in terms.items()
            for suffix, term in zip(suffixes, vector.unbind(), strict=False)
        }
        return {**named, "total": total}

    def _parts(self, outputs: Outputs, targets: Targets) -> list[_Part]:
        """The matched predictions, and the denoising queries where there are any."""
        predictions = [_full_precision(outputs.layers)]
        num_layers = len(predictions[0].boxes)
        suffixes = [*(f"_aux_{i}" for i in range(num_layers - 1)), ""]
        if outputs.encoder is not None:
            predictions.append(_full_precision(_stacked(outputs.encoder)))
            suffixes.append("_enc")
        self._check(predictions[0], targets)
        parts = [_Part(predictions, self._match(predictions, targets, outputs.groups), suffixes, outputs.groups)]
        if outputs.denoising is not None:
            parts.append(_denoising_part(outputs.denoising))
        return parts

    def _match(self, predictions: list[Prediction], targets: Targets, groups: int) -> Assignment:
        if not self.share_matched_indices:
            return self.matcher(predictions, targets, groups, self.task_weights, self.keypoint_counts)
        layers, *others = predictions
        pairs = self.matcher([_last(layers), *others], targets, groups, self.task_weights, self.keypoint_counts)
        image, query, target = (torch.cat((index[:1].expand(len(layers.boxes), -1), index[1:])) for index in pairs[:3])
        return Assignment(image, query, target, pairs.counts)

    def _box_and_class_terms(
        self, parts: list[_Part], targets: Targets, num_boxes: float | Tensor, num_images: float | Tensor
    ) -> dict[str, Tensor]:
        """Vectors of terms over the layers of all parts."""
        boxes = torch.cat([prediction.boxes.flatten(0, 2) for part in parts for prediction in part.predictions])
        rows, target = _flat_pairs(parts)
        pairs = pair_losses(boxes[rows], targets.boxes.to(boxes.dtype)[target], self.boxes_weight_format)
        labels = torch.full((len(boxes),), self.num_classes, dtype=torch.int64, device=boxes.device)
        labels = labels.index_copy_(0, rows, targets.labels[target])
        quality = boxes.new_zeros(len(boxes)).index_copy_(0, rows, pairs.quality)

        terms: dict[str, list[Tensor]] = {name: [] for name in TERMS["boxes"]}
        first_row, first_pair = 0, 0
        for part in parts:
            shape = part.pairs.query.shape
            mine = slice(first_pair, first_pair + shape.numel())
            first_pair = mine.stop
            divisor = _between(1, num_boxes) * part.copies
            terms["loss_bbox"].append(pairs.bbox[mine].view(shape).sum(1) * (self.weight_bbox / divisor))
            terms["loss_giou"].append(pairs.giou[mine].view(shape).sum(1) * (self.weight_giou / divisor))
            if self.eos_coef is not None:
                num_queries = part.predictions[0].boxes.shape[2] * num_images
                divisor = _sum_of_weights(num_queries, num_boxes * part.copies, self.eos_coef)
            for prediction in part.predictions:
                mine = slice(first_row, first_row + prediction.boxes.shape[:3].numel())
                first_row = mine.stop
                sums = self._class_sums(prediction.logits, labels[mine], quality[mine])
                terms["loss_class"].append(sums * (self.weight_class / divisor))
        return {name: torch.cat(vectors) for name, vectors in terms.items()}

    def _class_sums(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """Class loss of each layer of a prediction, summed over its queries."""
        num_classes = logits.shape[-1] - (self.activation == "softmax")
        if num_classes < self.num_classes:  # class-agnostic: any object is class 0
            labels = (labels == self.num_classes).to(labels.dtype)
        loss = self.class_loss(logits.flatten(0, 2), labels, quality, num_classes=num_classes)
        return loss.view(len(logits), -1).sum(1)

    def _task_terms(self, part: _Part, targets: Targets, num_boxes: float | Tensor) -> dict[str, Tensor]:
        """Vectors of mask and keypoint terms over the matched layers, where the network predicts them."""
        weights, layers = self.task_weights, part.predictions[0]
        sums: dict[str, tuple[float, Tensor]] = {}
        if layers.masks is not None and targets.masks is not None:
            mask = mask_losses(part.predictions, part.pairs, targets.masks)
            sums |= zip(TERMS["masks"], ((weights.mask_ce, mask.ce), (weights.mask_dice, mask.dice)))
        if layers.keypoints is not None and targets.keypoints is not None:
            keypoint = keypoint_losses(part.predictions, part.pairs, targets, self.keypoint_counts)
            weighted = (
                (weights.keypoint_l1, keypoint.l1),
                (weights.keypoint_findable, keypoint.findable),
                (weights.keypoint_visible, keypoint.visible),
                (weights.keypoint_nll, keypoint.nll),
            )
            sums |= zip(TERMS["keypoints"], weighted)
        divisor = _between(1, num_boxes) * part.copies
        return {name: vector * (weight / divisor) for name, (weight, vector) in sums.items()}

    def _check(self, prediction: Prediction, targets: Targets) -> None:
        needed = self.num_classes + (self.activation == "softmax")
        if prediction.logits.shape[-1] != needed:
            raise ValueError(
                f"the network gives {prediction.logits.shape[-1]} logits per query, but {self.num_classes} classes "
                f"with a {self.activation} loss need {needed}; build the network with num_classes={self.num_classes} "
                f"and activation={self.activation!r}"
            )
        if prediction.masks is not None and targets.masks is None:
            raise ValueError(
                "the network predicts masks, but the data have none; use data with polygons or RLE, or a model "
                "without masks: model=rfdetr"
            )
        if prediction.keypoints is not None and (targets.keypoints is None or not self.keypoint_counts):
            raise ValueError(
                "the network predicts keypoints, but the data have none; use data with keypoints, or a model "
                "without them: model=rfdetr"
            )


def _flat_pairs(parts: list[_Part]) -> tuple[Tensor, Tensor]:
    """Rows (into the flattened predictions of all parts, one after another) and packed objects of all pairs, `[P]`."""
    rows, first = [], 0
    for part in parts:
        _, num_images, num_queries, _ = part.predictions[0].boxes.shape
        size = num_images * num_queries
        end = first + len(part.suffixes) * size
        starts = torch.arange(first, end, size, device=part.pairs.query.device)
        rows.append((starts[:, None] + part.pairs.image * num_queries + part.pairs.query).flatten())
        first = end
    return torch.cat(rows), torch.cat([part.pairs.target.flatten() for part in parts])


def _denoising_part(denoising: Denoising) -> _Part:
    num_layers = len(denoising.layers.boxes)
    image, query, target = (
        index.expand(num_layers, -1) for index in (denoising.image, denoising.query, denoising.target)
    )
    pairs = Assignment(image, query, target, counts=())
    suffixes = [f"_dn_{i}" for i in range(num_layers)]
    return _Part([_full_precision(denoising.layers)], pairs, suffixes, denoising.groups)


def _sum_of_weights(num_queries: float | Tensor, num_positives: float | Tensor, background: float) -> float | Tensor:
    """Weights of a layer's queries over the effective batch: one with an object, `background` without.

    Made of counts and not of this batch's labels, so that all micro-batches divide by the same number.
    """
    share = _between(0, num_positives / num_queries, 1)
    return _between(EPS, num_queries * (share + (1 - share) * background))


def _between(low: float, value: float | Tensor, high: float = math.inf) -> float | Tensor:
    """A count within bounds; a tensor without waiting for it."""
    return value.clamp(low, high) if isinstance(value, Tensor) else min(max(low, value), high)


def _full_precision(prediction: Prediction) -> Prediction:
    """Half precision to float32; wider stays."""
    return _each(prediction, lambda tensor: tensor if tensor.dtype == torch.float64 else tensor.float())


def _stacked(prediction: Prediction) -> Prediction:
    """A single prediction as a stack of one layer."""
    return _each(prediction, lambda tensor: tensor[None])


def _last(prediction: Prediction) -> Prediction:
    return _each(prediction, lambda tensor: tensor[-1:])


def _each(prediction: Prediction, change: Callable[[Tensor], Tensor]) -> Prediction:
    """A prediction with its tensors changed (a mask bias, which has no layers, stays)."""
    masks, keypoints = prediction.masks, prediction.keypoints
    if masks is not None:
        masks = masks._replace(features=change(masks.features), queries=change(masks.queries))
    if keypoints is not None:
        keypoints = change(keypoints)
    return Prediction(change(prediction.logits), change(prediction.boxes), masks, keypoints)


def _sum(outputs: Outputs) -> Tensor:
    """Sum of all predictions, to keep what is not supervised in the graph: every parameter needs a gradient."""
    predictions = [outputs.layers]
    if outputs.encoder is not None:
        predictions.append(outputs.encoder)
    if outputs.denoising is not None:
        predictions.append(outputs.denoising.layers)
    sums = [tensor.float().sum() for prediction in predictions for tensor in _tensors(prediction)]
    return torch.stack(sums).sum()


def _tensors(prediction: Prediction) -> list[Tensor]:
    masks = () if prediction.masks is None else (prediction.masks.features, prediction.masks.queries)
    keypoints = () if prediction.keypoints is None else (prediction.keypoints,)
    return [prediction.logits, prediction.boxes, *masks, *keypoints]
