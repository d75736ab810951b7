"""Tiles: they cover their image, and their objects are those of the image that they show."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from detr_exp.data.content import Objects
from detr_exp.data.joined import Joined
from detr_exp.data.tiles import TiledSplit, Tiles, cut_out, numbers_of, tile_of, tiles_for, tiles_of, with_tiles

SIZES = [(48, 64), (100, 300), (97, 31), (640, 641), (1, 500)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_they_cover_the_image_and_overlap(size, overlap):
    tiling = Tiles((64, 80), overlap)
    tiles = tiling.of(size)
    seen = np.zeros(size, int)
    for tile in tiles:
        assert tile.size == (min(64, size[0]), min(80, size[1]))
        assert tile.total == len(tiles)
        seen[tile.y : tile.y + tile.size[0], tile.x : tile.x + tile.size[1]] += 1
        assert tile_of(seen, tile).shape == tile.size
    assert seen.min() >= 1
    for axis, starts in enumerate((sorted({tile.y for tile in tiles}), sorted({tile.x for tile in tiles}))):
        assert all(b - a <= round(tiling.size[axis] * (1 - overlap)) for a, b in pairwise(starts))


def test_an_image_that_fits_is_one_tile():
    (tile,) = Tiles((64, 80)).of((64, 80))
    assert (tile.x, tile.y, tile.size, tile.total) == (0, 0, (64, 80), 1)


class Photo:
    """One image with a bright rectangle for each object, as polygon, run lengths and mask, with a keypoint in it."""

    has_masks = has_keypoints = True
    fingerprint, most_objects, image_ids = "photo", 3, [7]
    boxes = np.array([[5, 5, 25, 45], [40, 10, 90, 30], [60, 50, 100, 95]], float)

    def __len__(self):
        return 1

    def name(self, index):
        return "photo"

    def size(self, index):
        return 100, 120

    def image(self, index, smallest=None):
        pixels = np.zeros((100, 120, 3), np.uint8)
        for value, (x0, y0, x1, y1) in enumerate(self.boxes.astype(int), start=1):
            pixels[y0:y1, x0:x1] = 50 * value
        return pixels

    def objects(self, index):
        from pycocotools import mask as rle

        dense = [(self.image(0)[..., 0] == 50 * value) for value in (1, 2, 3)]
        a, b, c, d = self.boxes[0].tolist()
        segments = [[[a, b, c, b, c, d, a, d]], rle.encode(np.asfortranarray(dense[1].astype(np.uint8))), dense[2]]
        centres = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
        points = np.concatenate([centres, np.full((3, 1), 2)], 1)[:, None].astype(np.float32)
        return Objects(np.arange(3), self.boxes.copy(), segments, points, extra={"number": np.arange(3)})


def test_objects_of_a_tile_are_where_its_pixels_are():
    split = TiledSplit(Photo(), Tiles((50, 60), 0.3, visible=0.25))
    assert split.image_ids == [7] * len(split)
    for index in range(len(split)):
        image, objects = split.load(index)
        assert image.shape[:2] == split.size(index)
        for row, number in enumerate(objects.extra["number"].tolist()):
            x0, y0, x1, y1 = objects.boxes_xyxy[row].astype(int)
            shown = image[..., 0] == 50 * (number + 1)
            assert shown[y0:y1, x0:x1].all()
            assert shown.sum() == (y1 - y0) * (x1 - x0)
            assert np.array_equal(objects.segments[row], shown)
            x, y, visibility = objects.keypoints[row, 0]
            assert visibility == 0 or shown[int(y), int(x)]


@pytest.mark.parametrize("visible", [0.2, 0.5, 1.0])
def test_objects_stay_if_enough_of_them_is_inside(visible):
    tiling = Tiles((50, 60), 0.2, visible)
    for tile in tiling.of((100, 120)):
        x0, y0, x1, y1 = Photo.boxes.T
        wide = np.minimum(x1, tile.x + 60) - np.maximum(x0, tile.x)
        high = np.minimum(y1, tile.y + 50) - np.maximum(y0, tile.y)
        share = wide.clip(0) * high.clip(0) / ((x1 - x0) * (y1 - y0))
        kept = cut_out(Photo().objects(0), tile, visible).extra["number"]
        assert kept.tolist() == np.flatnonzero(share >= visible).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 0.2}, "it needs size"),
        ({"size": 640, "step": 3}, "may have overlap and visible"),
        (640, "it needs size"),
        ({"size": 4}, "at least 16"),
        ({"size": [640, 640, 3]}, "its height and width"),
        ({"size": "large"}, r"data\.tiles\.size is large"),
        ({"size": 640, "overlap": 1.0}, "from 0 to 0.9"),
        ({"size": 640, "overlap": "much"}, "a share of a side"),
        ({"size": 640, "visible": 0}, "above 0 and at most 1"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        tiles_of(settings)
    assert "data.tiles={size: 640, overlap: 0.2}" in str(refused.value)
    assert tiles_of(None) is None
    assert tiles_of({"size": [32, 64]}) == Tiles((32, 64))


def test_sets_with_weights_are_not_cut():
    joined = Joined({}, [], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"data\.source\.sets.*data\.tiles=null"):
        TiledSplit(joined, Tiles((32, 32)))


class OfBoxes:
    """What `auto` reads of a split: images of one size, with square objects of these sides."""

    def __init__(self, size: tuple[int, int], sides: list[float]) -> None:
        self.shape, self.sides = size, np.array(sides, float)

    def __len__(self) -> int:
        return 1

    def size(self, index: int) -> tuple[int, int]:
        return self.shape

    def objects(self, index: int) -> Objects:
        boxes = np.concatenate([np.zeros((len(self.sides), 2)), self.sides[:, None].repeat(2, 1)], 1)
        return Objects(np.zeros(len(boxes), np.int64), boxes)


@pytest.mark.parametrize(
    ("sides", "size", "found"),
    [
        ([16.0] * 20, (3000, 4000), Tiles((320, 320), 0.1)),  # 16 px become 32
        ([2.0] * 20, (3000, 4000), Tiles((160, 160), 0.1)),  # no more than four times
        ([8.0] * 10 + [200.0] * 10, (3000, 4000), Tiles((400, 400), 0.5)),  # large ones fit
        ([16.0] * 20, (300, 4000), None),  # the images are no larger
        ([64.0] * 20, (1000, 1000), None),  # they are large enough
        ([], (3000, 4000), None),
    ],
)
def test_auto_makes_small_objects_large_enough(sides, size, found):
    network = SimpleNamespace(image_size=(640, 960))
    tiles = tiles_for(OfBoxes(size, sides), network)
    assert tiles == found
    if tiles is not None:
        assert tiles_of(numbers_of(tiles)) == tiles
        assert with_tiles({"data": {"tiles": "auto"}}, tiles) == {"data": {"tiles": numbers_of(tiles)}}
    assert with_tiles({"data": {"tiles": "auto"}}, None) == {"data": {"tiles": None}}
    own = {"data": {"tiles": {"size": 99}}}
    assert with_tiles(own, tiles) is own


def test_auto_is_for_data_and_not_for_a_prediction():
    with pytest.raises(ValueError, match=r"tiles is auto; it needs size"):
        tiles_of("auto", "tiles")
