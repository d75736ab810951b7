"""A subset of a split, as a split."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from detr_exp.data.content import Objects, Split, identity_of, read_ahead
from detr_exp.values import Values

log = logging.getLogger(__name__)


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

    def ahead(self, indices: Sequence[int]) -> None:
        read_ahead(self.whole, [self.indices[index] for index in indices])

    def identity(self, index: int) -> str | None:
        return identity_of(self.whole, self.indices[index])

    def truth(self) -> Values:
        return restricted(self.whole.truth(), self.image_ids)


def sample(split: Split, count: int, origin: str) -> list[int]:
    """Indices of some images of a split, in their order: always the same ones, for every run and seed.

    They depend on the ids alone, and a larger sample has all images of a smaller one.

    Raises:
        ValueError: there are fewer images, or none of the sample has objects.
    """
    if count > len(split):
        raise ValueError(
            f"data.val_sample is {count}, but {origin} has {len(split)} images; evaluate all: data.val_sample=null"
        )
    order = sorted(range(len(split)), key=lambda i: hashlib.sha256(f"sample {split.image_ids[i]}".encode()).digest())
    chosen = sorted(order[:count])
    if not any(len(split.objects(i)) for i in chosen):
        raise ValueError(
            f"data.val_sample is {count}, but none of these images of {origin} has objects to measure on; "
            f"evaluate more: data.val_sample={min(len(split), 10 * count)}"
        )
    log.info("%s: evaluations use %d of %d images (data.val_sample)", origin, count, len(split))
    return chosen


def restricted(truth: Values, image_ids: Sequence[int]) -> Values:
    """A COCO-style dict with only the selected images."""
    kept = set(image_ids)
    images = [image for image in truth["images"] if image["id"] in kept]
    return {**truth, "images": images, "annotations": [a for a in truth["annotations"] if a["image_id"] in kept]}
