"""Copy-paste (Ghiasi et al. 2021, arXiv 2012.07177): objects of another image on top of this one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from detr_exp.data.operations import hidden_behind, refuse_chance
from detr_exp.data.render import together
from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.structures import Target


@dataclass(frozen=True)
class CopyPaste:
    """Some objects of another training image, augmented like this one, at their places and with their pixels.

    They are cut out by their outlines where the annotations have these, and by their boxes where not. What they cover
    is treated as by `operations.Cutout`: masks are what is still seen, hidden keypoints are labelled and not visible,
    and an object of which less than 30 % of the box is seen is dropped.

    Attributes:
        chance: probability for an image.
        most: objects that are pasted at most; their number is sampled from 1 to this.
    """

    chance: float = 0.5
    most: int = 5
    takes_another: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_chance(self, self.chance)
        if self.most < 1:
            raise ValueError(f"CopyPaste has most {self.most}; it is a number of objects, at least 1: most: 5")

    def is_due(self, rng: np.random.Generator) -> bool:
        """Whether another image is needed."""
        return rng.random() < self.chance

    def __call__(
        self, rng: np.random.Generator, image: np.ndarray, target: Target, other: np.ndarray, objects: Target
    ) -> tuple[np.ndarray, Target]:
        """See `protocols.Operation`.

        Args:
            rng, image, target: of this image.
            other: another image, of the same size.
            objects: its objects, with masks where there are outlines.
        """
        if not len(objects.labels):
            return image, target
        count = int(rng.integers(1, min(self.most, len(objects.labels)) + 1))
        chosen = torch.zeros(len(objects.labels), dtype=torch.bool)
        chosen[torch.from_numpy(rng.permutation(len(chosen))[:count])] = True
        pasted = objects.kept(chosen)
        covered = _covered(pasted, image.shape[0], image.shape[1])
        seen = np.where(covered[..., None], other, image)
        masks = pasted.masks if target.masks is not None else None
        return seen, together([hidden_behind(target, covered), replace(pasted, masks=masks)])


def _covered(objects: Target, height: int, width: int) -> np.ndarray:
    """`[H, W]` bool, where any of the objects is."""
    if objects.masks is not None:
        return objects.masks.any(0).numpy()
    covered = np.zeros((height, width), bool)
    sides = np.array([width, height, width, height])
    for left, top, right, bottom in np.rint(cxcywh_to_xyxy(objects.boxes).numpy() * sides).astype(int).tolist():
        covered[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)] = True
    return covered
