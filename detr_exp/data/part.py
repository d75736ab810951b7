"""A subset of a split, as a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detr_exp.data.content import Objects, Split
from detr_exp.values import Values


class Part:
    """A subset of a split; see `content.Split`.

    Args:
        whole: the split.
        indices: of the selected images, in their new order.
    """

    def __init__(self, whole: Split, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)
        self.has_masks, self.has_keypoints = whole.has_masks, whole.has_keypoints
        self.image_ids = [whole.image_ids[i] for i in self.indices]
        self.most_objects = whole.most_objects
        self.fingerprint = f"{whole.fingerprint} {self.indices}"

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.whole.size(self.indices[index])

    def objects(self, index: int) -> Objects:
        return self.whole.objects(self.indices[index])

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        return self.whole.image(self.indices[index], smallest)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.whole.load(self.indices[index])

    def truth(self) -> Values:
        return restricted(self.whole.truth(), self.image_ids)


def restricted(truth: Values, image_ids: Sequence[int]) -> Values:
    """A COCO-style dict with only the selected images."""
    kept = set(image_ids)
    images = [image for image in truth["images"] if image["id"] in kept]
    return {**truth, "images": images, "annotations": [a for a in truth["annotations"] if a["image_id"] in kept]}
