"""Predict on parts of images, and merge what is found in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from detr_exp.data.tiles import Tiles, tile_of
from detr_exp.ops.merging import Merging
from detr_exp.structures import Detections


def in_tiles(
    find: Callable[[Sequence[np.ndarray]], list[Detections]],
    images: Sequence[np.ndarray],
    tiling: Tiles | None,
    at_once: int,
    most: int,
) -> list[Detections]:
    """Detections of images `[H, W, 3]`, from those of their tiles where they are cut.

    Args:
        find: detections of some images, in one batch.
        images: of any sizes.
        tiling: how they are cut; None: not at all.
        at_once: tiles of a batch.
        most: see `ops.merging.Merging`.
    """
    if tiling is None:
        return find(images)
    tiles = [(image, tile) for image in images for tile in tiling.of((image.shape[0], image.shape[1]))]
    merging, done = Merging(most), list[Detections]()
    for start in range(0, len(tiles), at_once):
        some = tiles[start : start + at_once]
        found = find([tile_of(image, tile) for image, tile in some])
        done += merging.complete([0] * len(some), [tile for _, tile in some], found)[1]
    return done
