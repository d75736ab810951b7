"""Box losses of matched pairs, and the overlap that is the target score of the class losses.

Legend: P pairs. Boxes are cxcywh in 0..1. All are terms (see `loss.term`): matches -> of each stack `[l, M]`.
"""

from __future__ import annotations

from torch import Tensor

from detr_exp.loss.keypoint import similarity
from detr_exp.loss.matches import Matches


def l1(matches: Matches) -> list[Tensor]:
    """L1 distance, summed over the four coordinates."""
    return matches.by_layer((matches.boxes - matches.target_boxes).abs().sum(-1))


def giou(matches: Matches, *, overlap: str | None) -> list[Tensor]:
    """One minus the generalised IoU (Rezatofighi et al. 2019).

    Args:
        overlap: None, or the overlap that weighs each pair, so that well-placed boxes count more; see `quality`.
    """
    loss = 1 - matches.overlaps[1]
    return matches.by_layer(loss if overlap is None else loss * quality(matches, overlap=overlap))


def quality(matches: Matches, *, overlap: str | None) -> Tensor:
    """Overlap of the matched boxes or keypoints, in 0..1 without gradient: `[P]`.

    Args:
        overlap: "iou" or None, or "giou", clamped at zero; or "oks", the similarity of keypoints in place of boxes.

    Raises:
        ValueError: another value.
    """
    if overlap not in (None, "iou", "giou", "oks"):
        raise ValueError(
            f"loss.boxes_weight_format is {overlap!r}; it may be null, iou, giou or oks: loss.boxes_weight_format=iou"
        )
    if overlap == "oks":
        return matches.once(similarity).detach()
    iou, giou = matches.overlaps
    return giou.detach().clamp(min=0) if overlap == "giou" else iou.detach()
