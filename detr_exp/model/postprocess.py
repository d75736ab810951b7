"""From logits and unit boxes to scores, labels and boxes in pixels.

Legend: B images, Q queries, C logits per query, n detections kept per image.

What a network gives that is not finite stays so: a sigmoid or a clamp would make a sure detection of an infinity.
`x + 0 * x` is NaN there, x anywhere else, and every exported file can compute it. `Detections.finite` takes it out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr_exp.ops.boxes import cxcywh_to_xyxy
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


@torch.no_grad()
def detections(pred: Prediction, image_sizes: Tensor, max_detections: int, activation: str) -> list[Detections]:
    """Box detections of each image; `image_sizes` is `[B, 2]` (height, width) in pixels."""
    scores, labels, queries = best_detections(pred.logits, max_detections, activation)
    boxes = boxes_in_pixels(pred.boxes, queries, image_sizes)
    return [Detections(*parts) for parts in zip(scores, labels, boxes)]
