"""Images of another number of channels than three."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from detr_exp.data.augment import Augment
from detr_exp.data.content import Objects, Split
from detr_exp.data.joined import Joined
from detr_exp.data.part import Part
from detr_exp.data.pixels import as_channels
from detr_exp.data.shards import ShardSplit
from detr_exp.data.table import TableSplit
from detr_exp.values import Values

log = logging.getLogger(__name__)


class Converted:
    """Any split, with its images in as many channels; see `content.Split` and `pixels.as_channels`."""

    def __init__(self, whole: Split, channels: int) -> None:
        self.whole, self.channels = whole, channels
        self.has_masks, self.has_keypoints, self.fingerprint = whole.has_masks, whole.has_keypoints, whole.fingerprint
        self.image_ids, self.most_objects = whole.image_ids, whole.most_objects

    def __len__(self) -> int:
        return len(self.whole)

    def name(self, index: int) -> str:
        return self.whole.name(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.whole.size(index)

    def objects(self, index: int) -> Objects:
        return self.whole.objects(index)

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        return as_channels(self.whole.image(index, smallest), self.channels)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        image, objects = self.whole.load(index)
        return as_channels(image, self.channels), objects

    def truth(self) -> Values:
        return self.whole.truth()


def in_channels(split: Split, channels: int) -> Split:
    """A split whose images have as many channels: those of files are read so, others are converted."""
    if channels == 3 or isinstance(split, Part):  # the whole that it is of was changed
        return split
    if isinstance(split, TableSplit):
        split.channels = channels
    elif isinstance(split, ShardSplit):
        split.table.channels = channels
    elif isinstance(split, Joined):
        for name, member in split.members.items():
            split.members[name] = replace(member, split=in_channels(member.split, channels))
    else:
        return Converted(split, channels)
    return split


def refuse_colours(augment: Augment, channels: int) -> None:
    """Refuse operations on colours for images without them; says which distortions are left out.

    Raises:
        ValueError: names the operation.
    """
    if channels == 3:
        return
    for operation in augment.operations:
        if getattr(operation, "of_colours", False):
            raise ValueError(
                f"data.augment.operations has {type(operation).__name__}, which is for the three channels of colours, "
                f"but data.channels is {channels}; leave it out: data.augment.operations=[...]"
            )
    if augment.photometric:
        log.info(
            "data.channels is %d: of data.augment.photometric only brightness and contrast are used, on all channels "
            "alike; saturation, hue and the order of channels are those of colours and are left out",
            channels,
        )
