"""From logits and unit boxes to scores, labels and boxes in pixels.

Legend: B images, Q queries, C logits per query, n detections per image.

Values of a network that are not finite stay so: a sigmoid or a clamp would turn an infinity into a certain detection.
`x + 0 * x` is NaN there, x anywhere else, and every exported file can compute it. `Detections.finite` removes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.ops.canvas import canvas_sizes, contents_of
from detr_exp.ops.transfer import to_device
from detr_exp.protocols import Network
from detr_exp.structures import Detections, Outputs, Prediction


def best_detections(logits: Tensor, count: int, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of query and class; three `[B, n]` tensors, highest score first: scores, labels, queries.

    With "sigmoid" a query can appear with several classes. With "softmax" it appears once, with its best class; the
    last column is the background.

    Args:
        logits: `[B, Q, C]`. Values that are not finite come first, with the score NaN.
        count: n; fewer where there are fewer pairs.
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
    sizes = image_sizes.to(boxes).flip(1).tile(2)
    return chosen * sizes[:, None] + 0 * chosen


def detect(
    network: Network,
    outputs: Outputs,
    image_sizes: Tensor,
    padding_mask: Tensor | None = None,
    max_detections: int | None = None,
) -> list[Detections]:
    """Detections of each image in its original pixels, from outputs that are relative to the canvas.

    Args:
        image_sizes: `[B, 2]` (height, width) of the original images, on the host.
        padding_mask: `[B, H, W]` bool of the canvases, on the host; None: the images fill them.
        max_detections: of each image; None: the number of queries.
    """
    if padding_mask is None:
        return network.postprocess(outputs, image_sizes, max_detections)
    canvas = (padding_mask.shape[1], padding_mask.shape[2])
    sizes = canvas_sizes(image_sizes, contents_of(padding_mask), canvas)
    found = network.postprocess(outputs, sizes, max_detections)
    for detections, (height, width) in zip(found, image_sizes.tolist()):
        if network.cuts_boxes:
            detections.boxes = cut(detections.boxes, detections.boxes.new_tensor([width, height] * 2))
        if detections.masks is not None:
            detections.masks = detections.masks[:, :height, :width].contiguous()
    return found


def cut(boxes: Tensor, ends: Tensor) -> Tensor:
    """Boxes xyxy without what lies outside of an image that ends at `ends` (x, y, x, y)."""
    return torch.minimum(boxes.clamp(min=0), ends)


class Best(NamedTuple):
    """The detections with the highest scores of each image, best first.

    Attributes:
        scores, labels: `[B, n]`.
        boxes: `[B, n, 4]` xyxy in pixels.
        queries: `[B, n]` index of their query.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor

    def detections(self) -> list[Detections]:
        """Of each image, without masks and keypoints."""
        return [Detections(*parts) for parts in zip(self.scores, self.labels, self.boxes)]


def best_in_pixels(network: Network, pred: Prediction, image_sizes: Tensor, count: int | None = None) -> Best:
    """Detections from a network's outputs, for evaluation, prediction and every exported file.

    Boxes may leave the image. They are cut to it where the network's published code does so (RF-DETR), and left as
    they are where it does not (RT-DETR): average precision would differ.

    Args:
        network: has `activation`, `num_queries` and `cuts_boxes`.
        pred: logits `[B, Q, C]` and boxes `[B, Q, 4]`.
        image_sizes: `[B, 2]` (height, width) in pixels, on the host or on the device.
        count: n; None: as many as there are queries.
    """
    image_sizes = to_device(image_sizes, pred.boxes.device)
    logits, boxes = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (pred.logits, pred.boxes))
    scores, labels, queries = best_detections(logits, count or network.num_queries, network.activation)
    boxes = boxes_in_pixels(boxes, queries, image_sizes)
    if network.cuts_boxes:
        boxes = cut(boxes, image_sizes.to(boxes).flip(1).tile(2)[:, None])
    return Best(scores, labels, boxes, queries)
