"""From logits and unit boxes to scores, labels and boxes in pixels.

Legend: B images, Q queries, C logits per query, n detections kept per image.

What a network gives that is not finite stays so: a sigmoid or a clamp would make a sure detection of an infinity.
`x + 0 * x` is NaN there, x anywhere else, and every exported file can compute it. `Detections.finite` takes it out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.protocols import Network
from detr_exp.structures import Detections, Prediction


def best_detections(logits: Tensor, count: int, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The most certain pairs of query and class; three `[B, n]` tensors, best first: scores, labels, queries.

    With "sigmoid" a query can appear with several classes. With "softmax" it appears once, with its best class; the
    last column is the background.

    Args:
        logits: `[B, Q, C]`. What is not finite comes first, with a score that is not a number.
        count: n, cut to what there is.
    """
    if activation == "softmax":
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, queries = scores.topk(min(count, scores.shape[1]), dim=1)
        return scores, labels.gather(1, queries), queries
    num_classes = logits.shape[-1]
    pairs = logits.flatten(1)
    values, index = pairs.topk(min(count, pairs.shape[1]), dim=1)
    return values.sigmoid() + 0 * values, index % num_classes, index // num_classes


def boxes_in_pixels(boxes: Tensor, queries: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes of the chosen queries as xyxy in pixels, `[B, n, 4]`; NaN where they are not finite.

    Args:
        boxes: `[B, Q, 4]` cxcywh in 0..1.
        queries: `[B, n]`.
        image_sizes: `[B, 2]` (height, width) in pixels.
    """
    chosen = cxcywh_to_xyxy(boxes.gather(1, queries[..., None].expand(-1, -1, 4)))
    sizes = image_sizes.to(device=boxes.device, dtype=boxes.dtype).flip(1).tile(2)
    return chosen * sizes[:, None] + 0 * chosen


class Best(NamedTuple):
    """The most certain detections of each image, best first.

    Attributes:
        scores, labels: `[B, n]`.
        boxes: `[B, n, 4]` xyxy in pixels.
        queries: `[B, n]` where they come from.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor

    def detections(self) -> list[Detections]:
        """Of each image, without masks and keypoints."""
        return [Detections(*parts) for parts in zip(self.scores, self.labels, self.boxes)]


def best_in_pixels(network: Network, pred: Prediction, image_sizes: Tensor, count: int | None = None) -> Best:
    """What evaluation, prediction and every exported file make of a network's outputs.

    Boxes may leave the picture. They are cut to it where the network's published code does so (RF-DETR), and left as
    they are where it does not (RT-DETR): average precision would differ.

    Args:
        network: says its `activation`, `num_queries` and whether it `cuts_boxes`.
        pred: logits `[B, Q, C]` and boxes `[B, Q, 4]`.
        image_sizes: `[B, 2]` (height, width) in pixels.
        count: n; None: as many as there are queries.
    """
    logits, boxes = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (pred.logits, pred.boxes))
    scores, labels, queries = best_detections(logits, count or network.num_queries, network.activation)
    boxes = boxes_in_pixels(boxes, queries, image_sizes)
    if network.cuts_boxes:
        boxes = torch.minimum(boxes.clamp(min=0), image_sizes.to(boxes).flip(1).tile(2)[:, None])
    return Best(scores, labels, boxes, queries)
