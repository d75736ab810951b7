"""Large images as tiles: a split whose images are parts of the images of another one.

Legend: (x0, y0, x1, y1) in whole pixels of the image.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from detr_exp.data.cache import ImageCache
from detr_exp.data.content import Objects, Outline, Segment, Split, read_ahead
from detr_exp.data.joined import Joined
from detr_exp.data.table import flat
from detr_exp.tile import Tile
from detr_exp.values import Values

log = logging.getLogger(__name__)
KEYS = ("size", "overlap", "visible")
LEAST, MOST_OVERLAP = 16, 0.9
EXAMPLE = "{size: 640, overlap: 0.2}"
AUTO = "auto"
WHOLE = "whole"  # no tiles, where null stands for what a checkpoint was trained on
# Of `auto`: three quarters of the objects are at least so large in the input of the network (COCO's limit of small
# ones), tiles are enlarged so much at most, and show so many of the 95 % of objects that are not the largest at once.
SEEN, MOST_ENLARGED, ROOM = 32, 4, 2


@dataclass(frozen=True)
class Tiles:
    """How images are cut.

    Attributes:
        size: (height, width) of a tile in pixels of the image; a smaller image is one tile.
        overlap: least share of a side that two neighbours have in common.
        visible: an object that the border of a tile cuts is one of its objects if at least this share of its box is
            inside.
    """

    size: tuple[int, int]
    overlap: float = 0.2
    visible: float = 0.3

    def of(self, size: tuple[int, int]) -> list[Tile]:
        """The tiles of an image of (height, width) `size`, row by row: as few as there can be, evenly spread."""
        (rows, height), (columns, width) = (self._starts(*pair) for pair in zip(size, self.size))
        places = [(x, y) for y in rows for x in columns]
        return [Tile(x, y, (height, width), size, len(places)) for x, y in places]

    def _starts(self, side: int, most: int) -> tuple[list[int], int]:
        """Where the tiles of a side begin, and their length."""
        length = min(side, most)
        count = 1 + math.ceil((side - length) / max(1, math.floor(most * (1 - self.overlap))))
        return [round(step * (side - length) / max(1, count - 1)) for step in range(count)], length


def tiles_for(split: Split, network: Sized) -> Tiles | None:
    """The tiles of `auto`, from the sizes of the objects; None: whole images.

    Args:
        split: the training images.
        network: gives the size of its input.
    """
    found, made = flat(split), None
    sides = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
    if len(sides):
        small, large = np.quantile(np.sqrt(sides.prod(1)), 0.25), np.quantile(sides.max(1), 0.95)
        side = min(network.image_size)
        length = math.ceil(max(side * small / SEEN, side / MOST_ENLARGED, ROOM * large, LEAST))
        if length < np.median(found.sizes.min(1)):
            made = Tiles((length, length), round(float(np.clip(large / length, 0.1, 0.5)), 2))
    shown = "whole images" if made is None else f"tiles of {made.size[0]} pixels that overlap by {made.overlap:g}"
    log.info("data.tiles=auto: %s, from the sizes of %d objects", shown, len(sides))
    return made


def tiles_of(settings: Mapping[str, Any] | str | None, key: str = "data.tiles") -> Tiles | None:
    """The tiles that a configuration requests.

    Args:
        settings: `size`, one number or (height, width), `overlap` and `visible`; None or `whole`: no tiles.
        key: of the configuration, for messages.

    Raises:
        ValueError: another key, or a value that cannot be used.
    """
    if settings in (None, WHOLE):
        return None
    if not isinstance(settings, Mapping) or "size" not in settings or not set(settings) <= set(KEYS):
        raise ValueError(f"{key} is {settings}; it needs size, and may have overlap and visible: {key}={EXAMPLE}")
    size, overlap, visible = settings["size"], settings.get("overlap", 0.2), settings.get("visible", 0.3)
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(s, int) and s >= LEAST for s in sides):
        raise ValueError(
            f"{key}.size is {size}; it is the side of a tile in pixels of the image, at least {LEAST}, or its "
            f"height and width: {key}={EXAMPLE}"
        )
    if not _is_share(overlap) or overlap > MOST_OVERLAP:
        raise ValueError(
            f"{key}.overlap is {overlap}; it is a share of a side, from 0 to {MOST_OVERLAP}: {key}={EXAMPLE}"
        )
    if not _is_share(visible) or not visible:
        raise ValueError(f"{key}.visible is {visible}; it is a share of a box, above 0 and at most 1: {key}={EXAMPLE}")
    return Tiles((sides[0], sides[1]), float(overlap), float(visible))


class Sized(Protocol):
    """What is needed of a network."""

    image_size: tuple[int, int]


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def with_tiles(config: Values, tiles: Tiles | None) -> Values:
    """A resolved config with the numbers in place of `auto`, for checkpoints: other data have other objects."""
    if config["data"].get("tiles") != AUTO:
        return config
    return {**config, "data": {**config["data"], "tiles": None if tiles is None else numbers_of(tiles)}}


def numbers_of(tiles: Tiles) -> Values:
    """The settings that give these tiles; see `tiles_of`."""
    return {"size": list(tiles.size), "overlap": tiles.overlap, "visible": tiles.visible}


@dataclass
class TiledSplit:
    """The tiles of all images, as a split; see `content.Split`.

    Attributes:
        whole: the split.
        tiling: how its images are cut.
        cache: holds decoded images of `whole`, or None.
        owners: for each tile the index of its image.
        tiles: all of them.
    """

    whole: Split
    tiling: Tiles
    cache: ImageCache | None = None
    owners: list[int] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.whole, Joined) and self.whole.shares is not None:
            raise ValueError(
                "data.tiles cuts images of sets that have weights in data.source.sets, and an epoch counts tiles, not "
                "images; leave the weights out, or do not cut: data.tiles=null"
            )
        self.read = self.whole.image if self.cache is None else partial(self.cache.image, self.whole)
        self.has_masks, self.has_keypoints = self.whole.has_masks, self.whole.has_keypoints
        self.fingerprint = f"{self.whole.fingerprint} {self.tiling}"
        for index in range(len(self.whole)):
            made = self.tiling.of(self.whole.size(index))
            self.owners += [index] * len(made)
            self.tiles += made
        ids = self.whole.image_ids
        self.image_ids = [ids[index] for index in self.owners]
        self._last: tuple[int, np.ndarray] | None = None  # tiles of an image follow each other

    @property
    def most_objects(self) -> int:
        return self.whole.most_objects

    def __len__(self) -> int:
        return len(self.tiles)

    def name(self, index: int) -> str:
        return self.whole.name(self.owners[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.tiles[index].size

    def objects(self, index: int) -> Objects:
        return cut_out(self.whole.objects(self.owners[index]), self.tiles[index], self.tiling.visible)

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        owner, tile = self.owners[index], self.tiles[index]
        if tile.total == 1:
            return self.read(owner, smallest)
        if self._last is None or self._last[0] != owner:
            self._last = owner, self.read(owner)
        return tile_of(self._last[1], tile)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.image(index), self.objects(index)

    def ahead(self, indices: Sequence[int]) -> None:
        owners = [*dict.fromkeys(self.owners[index] for index in indices)]
        read_ahead(self.whole, owners if self.cache is None else self.cache.missing(self.whole, owners))

    def identity(self, index: int) -> str | None:
        """None: tiles are cut out of images that are cached whole."""
        return None

    def truth(self) -> Values:
        return self.whole.truth()


def tile_of(image: np.ndarray, tile: Tile) -> np.ndarray:
    """The part of an image, or of a mask, that a tile shows."""
    height, width = tile.size
    return np.ascontiguousarray(image[tile.y : tile.y + height, tile.x : tile.x + width])


def cut_out(objects: Objects, tile: Tile, visible: float) -> Objects:
    """The objects of a tile, in its pixels: those of whose boxes at least the share `visible` is inside."""
    if tile.total == 1:
        return objects
    low, high = np.array([tile.x, tile.y] * 2), np.array([tile.size[1], tile.size[0]] * 2)
    moved = objects.boxes_xyxy - low
    inside = np.clip(moved, 0, high)
    area, seen = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (moved, inside))
    keep = np.flatnonzero((seen > 0) & (seen >= visible * area))
    segments = objects.segments
    return replace(
        objects,
        categories=objects.categories[keep],
        boxes_xyxy=inside[keep],
        segments=None if segments is None else [_in_tile(segments[i], tile) for i in keep.tolist()],
        keypoints=None if objects.keypoints is None else _points_in_tile(objects.keypoints[keep], tile),
        extra={name: values[keep] for name, values in objects.extra.items()},
    )


def _points_in_tile(keypoints: np.ndarray, tile: Tile) -> np.ndarray:
    """Keypoints `[m, K, 3]` in pixels of the tile; those outside are not labelled."""
    moved = keypoints - np.array([tile.x, tile.y, 0], keypoints.dtype)
    x, y = moved[..., 0], moved[..., 1]
    moved[(x < 0) | (y < 0) | (x > tile.size[1]) | (y > tile.size[0]) | (moved[..., 2] <= 0)] = 0
    return moved


def _in_tile(segment: Segment | None, tile: Tile) -> Segment | None:
    """An outline or a mask of the image as a mask of the tile."""
    from pycocotools import mask as rle

    if segment is None or isinstance(segment, np.ndarray):
        return None if segment is None else tile_of(segment, tile)
    return tile_of(rle.decode(_run_lengths(segment, tile)).astype(bool), tile)


def _run_lengths(outline: Outline, tile: Tile) -> Any:
    from pycocotools import mask as rle

    height, width = tile.whole
    if isinstance(outline, list):
        clipped = [np.clip(np.reshape(one, (-1, 2)), 0, (width, height)).reshape(-1).tolist() for one in outline]
        return rle.merge(rle.frPyObjects(clipped, height, width))
    return rle.frPyObjects(outline, *outline["size"]) if isinstance(outline["counts"], list) else outline
