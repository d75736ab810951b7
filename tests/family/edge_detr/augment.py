"""An operation of augmentation, on pixels and boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from detr_exp.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_exp.structures import Target


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Moves an image and its objects; what leaves it is cut off, and an object of which little is left is dropped.

    Attributes:
        chance: of an image.
        most: largest shift, in sides of the image.
    """

    chance: float
    most: float

    def __call__(self, rng: np.random.Generator, image: np.ndarray, target: Target) -> tuple[np.ndarray, Target]:
        if rng.random() >= self.chance:
            return image, target
        height, width = image.shape[:2]
        x, y = (rng.uniform(-self.most, self.most, 2) * (width, height)).astype(int).tolist()
        moved = np.zeros_like(image)
        moved[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)] = image[
            max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)
        ]
        corners = cxcywh_to_xyxy(target.boxes) + torch.tensor([x / width, y / height] * 2)
        boxes = xyxy_to_cxcywh(corners.clamp(0, 1))
        is_seen = (boxes[:, 2:] >= target.boxes[:, 2:] / 4).all(1)
        return moved, replace(target, boxes=boxes).kept(is_seen)
