"""Samples to a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import default_collate

from detr_exp.structures import Batch, Target, Targets


@dataclass
class Sample:
    """One image as the network receives it.

    Attributes:
        image: `[H, W, 3]` uint8.
        target: its objects.
        size: (height, width) of the original image in pixels.
        image_id: the data set's id.
        skipped: messages about unreadable images that this sample replaces.
    """

    image: Tensor
    target: Target
    size: tuple[int, int]
    image_id: int
    skipped: list[str] = field(default_factory=list)


def collate(samples: list[Sample]) -> Batch:
    """Stack images of one size; `default_collate` does it in shared memory inside a loader worker."""
    return Batch(
        images=default_collate([sample.image for sample in samples]),
        targets=Targets.pack([sample.target for sample in samples]),
        image_sizes=torch.tensor([sample.size for sample in samples]),
        image_ids=[sample.image_id for sample in samples],
        skipped=[sentence for sample in samples for sentence in sample.skipped],
    )
