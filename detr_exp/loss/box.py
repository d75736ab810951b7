"""Box losses of matched pairs.

Legend: P pairs. Boxes are cxcywh in 0..1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr_exp.ops.boxes import cxcywh_to_xyxy, iou_and_giou


class PairLosses(NamedTuple):
    """Of each pair, unreduced.

    Attributes:
        bbox: `[P]` L1 distance, summed over the four coordinates.
        giou: `[P]` one less the generalised IoU.
        quality: `[P]` overlap in 0..1 without gradient: what the class losses ask of the score.
    """

    bbox: Tensor
    giou: Tensor
    quality: Tensor


def pair_losses(boxes: Tensor, target_boxes: Tensor, boxes_weight_format: str | None = None) -> PairLosses:
    """Compare predicted boxes with their objects.

    Args:
        boxes: `[P, 4]`.
        target_boxes: `[P, 4]`.
        boxes_weight_format: None, or "iou" / "giou": the overlap that weighs the GIoU loss (well-placed boxes count
            more) and is the quality; GIoU counts as zero where it is negative.
    """
    iou, giou = iou_and_giou(*cxcywh_to_xyxy(torch.stack((boxes, target_boxes))))
    bbox = (boxes - target_boxes).abs().sum(-1)
    quality = giou.detach().clamp(min=0) if boxes_weight_format == "giou" else iou.detach()
    giou_loss = 1 - giou
    if boxes_weight_format is not None:
        giou_loss = giou_loss * quality
    return PairLosses(bbox, giou_loss, quality)
