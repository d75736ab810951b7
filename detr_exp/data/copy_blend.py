"""CopyBlend (Huang et al. 2025, arXiv 2509.20787): objects of another image, blended into this one at random places."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from detr_exp.data.operations import refuse_chance
from detr_exp.data.render import together
from detr_exp.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_exp.structures import Target

LEAST_AREA = 100.0  # square pixels; smaller objects are not taken
MARGIN = (0.1, 0.25)  # what is taken around an object, in sides of its box
SHARE = (0.45, 0.55)  # of this image where an object is blended in


@dataclass(frozen=True)
class CopyBlend:
    """Some objects of another training image, augmented like this one, half transparent and with what is around them.

    What is below is still seen, so no object is dropped. The boxes are those of the objects without their margin.

    Attributes:
        chance: probability for an image.
        most: objects that are taken; fewer where the other image has fewer of at least 100 square pixels.
    """

    chance: float = 0.5
    most: int = 3
    takes_another: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_chance(self, self.chance)
        if self.most < 1:
            raise ValueError(f"CopyBlend has most {self.most}; it is a number of objects, at least 1: most: 3")

    def is_due(self, rng: np.random.Generator) -> bool:
        """Whether another image is needed."""
        return rng.random() < self.chance

    def __call__(
        self, rng: np.random.Generator, image: np.ndarray, target: Target, other: np.ndarray, objects: Target
    ) -> tuple[np.ndarray, Target]:
        """See `protocols.Combining`."""
        size = np.array([image.shape[1], image.shape[0]])
        boxes = cxcywh_to_xyxy(objects.boxes).numpy() * np.tile(size, 2)
        sides = boxes[:, 2:] - boxes[:, :2]
        chosen = rng.permutation(np.flatnonzero(sides.prod(1) >= LEAST_AREA))[: self.most]
        if not len(chosen):
            return image, target
        taken, boxes, sides = objects.kept(torch.from_numpy(chosen)), boxes[chosen], sides[chosen]
        shifts = np.rint(rng.random(sides.shape) * (size - sides) - boxes[:, :2]).astype(int)
        share, blended = rng.uniform(*SHARE), image.copy()
        masks = None if target.masks is None or taken.masks is None else torch.zeros_like(taken.masks)
        for index, (box, side, shift) in enumerate(zip(boxes, sides, shifts)):
            margin = rng.uniform(*MARGIN) * side
            low = np.maximum(np.floor(box[:2] - margin), np.maximum(0, -shift)).astype(int)
            high = np.minimum(np.ceil(box[2:] + margin), np.minimum(size, size - shift)).astype(int)
            seen, place = (np.s_[a[1] : b[1], a[0] : b[0]] for a, b in ((low, high), (low + shift, high + shift)))
            blended[place] = np.rint(share * blended[place] + (1 - share) * other[seen])
            if masks is not None and taken.masks is not None:
                masks[index][place] = taken.masks[index][seen]
        moved = np.clip(boxes + np.tile(shifts, 2), 0, np.tile(size, 2)) / np.tile(size, 2)
        keypoints = None if taken.keypoints is None else _moved(taken.keypoints, torch.from_numpy(shifts / size))
        boxes_of = xyxy_to_cxcywh(torch.from_numpy(moved).to(objects.boxes.dtype))
        return blended, together([target, replace(taken, boxes=boxes_of, masks=masks, keypoints=keypoints)])


def _moved(keypoints: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Keypoints `[n, K, 3]` of objects that move by `[n, 2]`; what leaves the image is not labelled."""
    places = keypoints[..., :2] + shifts[:, None].to(keypoints.dtype)
    inside = ((places >= 0) & (places <= 1)).all(-1, keepdim=True) & (keypoints[..., 2:] > 0)
    return torch.where(inside, torch.cat([places, keypoints[..., 2:]], dim=-1), 0.0)
