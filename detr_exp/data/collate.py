"""Samples to a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import default_collate

from detr_exp.ops.canvas import padding_mask
from detr_exp.structures import Batch, Target, Targets
from detr_exp.tile import Tile


@dataclass
class Sample:
    """One image as the network receives it.

    Attributes:
        image: `[H, W, 3]` uint8.
        target: its objects.
        size: (height, width) of the original image in pixels.
        image_id: the data set's id.
        content: (height, width) of what the network sees of it, in the top left corner; None: all of the input.
        tile: what it is a part of; None: it is the whole image.
        skipped: messages about unreadable images that this sample replaces.
    """

    image: Tensor
    target: Target
    size: tuple[int, int]
    image_id: int
    content: tuple[int, int] | None = None
    tile: Tile | None = None
    skipped: list[str] = field(default_factory=list)


def collate(samples: list[Sample]) -> Batch:
    """Stack images of one size; `default_collate` does it in shared memory inside a loader worker.

    There is a padding mask wherever images are padded, also if none of this batch is: with one, a network computes in
    another order, and the output of an image would depend on its neighbours in the last digits.
    """
    images = default_collate([sample.image for sample in samples])
    tiles = [sample.tile for sample in samples if sample.tile is not None]
    contents = [sample.content for sample in samples if sample.content is not None]
    return Batch(
        images=images,
        targets=Targets.pack([sample.target for sample in samples]),
        image_sizes=torch.tensor([sample.size for sample in samples]),
        image_ids=[sample.image_id for sample in samples],
        padding_mask=padding_mask(torch.tensor(contents), (images.shape[1], images.shape[2])) if contents else None,
        tiles=tiles or None,
        skipped=[sentence for sample in samples for sentence in sample.skipped],
    )
