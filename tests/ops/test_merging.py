"""Detections of tiles: each object once, with the box it has in the image."""

from __future__ import annotations

import pytest
import torch

from detr_exp.data.tiles import Tiles
from detr_exp.ops.merging import Merging, merged
from detr_exp.structures import Detections

WHOLE = (100, 200)
TILES = Tiles((100, 80), 0.25).of(WHOLE)  # at x = 0, 60, 120


def seen_in(tile, boxes, labels=None, scores=None, least=0.2):
    """What a perfect detector finds in a tile: objects of which enough is visible, cut at its borders."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    start, end = torch.tensor([tile.x, tile.y] * 2), torch.tensor([tile.size[1], tile.size[0]] * 2)
    inside = torch.minimum((boxes - start).clamp(min=0), end)
    sides = (inside[:, 2:] - inside[:, :2]).clamp(min=0)
    keep = sides.prod(1) >= least * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    scores = 0.5 + 0.4 * sides.prod(1) / 20000 if scores is None else torch.tensor(scores)
    order = scores[keep].argsort(descending=True)
    return Detections(scores[keep][order], labels[keep][order], inside[keep][order])


def test_tiles_are_where_the_tests_expect_them():
    assert [tile.x for tile in TILES] == [0, 60, 120]


def test_every_object_is_found_once_and_whole():
    """Within a tile, in the overlap of two, across one seam, across two, and beside each other in the overlap."""
    boxes = [[5, 5, 20, 25], [62, 10, 76, 30], [40, 40, 100, 60], [30, 70, 190, 95], [62, 32, 68, 38], [70, 32, 77, 38]]
    found = merged([seen_in(tile, boxes) for tile in TILES], TILES, 100)
    assert len(found) == len(boxes)
    ordered = found.boxes[found.boxes[:, 0].argsort(stable=True)]
    expected = torch.tensor(sorted(boxes, key=lambda box: box[0]), dtype=torch.float32)
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, expected.tolist()))
    assert (found.scores.diff() <= 0).all()


def test_other_classes_and_detections_of_one_tile_stay_apart():
    boxes = [[62, 10, 76, 30], [62, 10, 76, 30]]
    assert len(merged([seen_in(tile, boxes, [0, 1]) for tile in TILES], TILES, 100)) == 2
    alone = seen_in(TILES[0], [[5, 5, 20, 25], [5, 5, 20, 26]])
    assert len(merged([alone, seen_in(TILES[1], boxes[:0]), seen_in(TILES[2], boxes[:0])], TILES, 100)) == 2


def test_small_objects_inside_a_large_one_of_their_class_stay():
    boxes = [[40, 10, 110, 90], [63, 40, 74, 50]]
    found = merged([seen_in(tile, boxes) for tile in TILES], TILES, 100)
    assert sorted(map(tuple, found.boxes.tolist())) == sorted(
        map(tuple, torch.tensor(boxes, dtype=torch.float32).tolist())
    )


def test_the_best_detection_gives_score_and_sides():
    first, second = (
        seen_in(TILES[0], [[62, 10, 76, 30]], scores=[0.9]),
        seen_in(TILES[1], [[61, 9, 77, 31]], scores=[0.8]),
    )
    found = merged([first, second, seen_in(TILES[2], torch.zeros(0, 4))], TILES, 100)
    assert found.scores.tolist() == pytest.approx([0.9])
    assert found.boxes.tolist() == [[62, 10, 76, 30]]


def test_one_tile_changes_nothing():
    (tile,) = Tiles((100, 200)).of(WHOLE)
    alone = seen_in(tile, [[5, 5, 20, 25]])
    assert merged([alone], [tile], 1) is alone


def test_masks_and_keypoints_are_in_the_image():
    box = [40, 40, 100, 60]
    parts = []
    for tile in TILES:
        found = seen_in(tile, [box])
        whole = torch.zeros(1, *WHOLE, dtype=torch.bool)
        whole[:, 40:60, 40:100] = True
        found.masks = whole[:, :, tile.x : tile.x + 80].expand(len(found), -1, -1)
        found.keypoints = torch.tensor([[[50.0 - tile.x, 50.0, 0.9]]]).expand(len(found), -1, -1)
        found.keypoint_covariance = torch.eye(2).expand(len(found), 1, 2, 2)
        parts.append(found)
    found = merged(parts, TILES, 100)
    expected = torch.zeros(WHOLE, dtype=torch.bool)
    expected[40:60, 40:100] = True
    assert found.boxes.tolist() == [box]
    assert torch.equal(found.masks[0], expected)
    assert found.keypoints[0, 0].tolist() == pytest.approx([50, 50, 0.9])
    assert found.keypoint_covariance.shape == (1, 1, 2, 2)


def bars(*lines):
    """Masks of slender objects: from (x0, y0) to (x1, y1), three pixels thick."""
    rows, columns = torch.meshgrid(torch.arange(WHOLE[0]), torch.arange(WHOLE[1]), indexing="ij")
    drawn = []
    for x0, y0, x1, y1 in lines:
        middle = y0 + (columns - x0) * (y1 - y0) / (x1 - x0)
        drawn.append(((rows - middle).abs() <= 1) & (columns >= x0) & (columns < x1))
    return torch.stack(drawn)


def parts_of(masks, tile, scores):
    """What a perfect detector finds of masks in a tile."""
    cut = masks[:, :, tile.x : tile.x + tile.size[1]]
    rows = [(mask.nonzero(), score, mask) for mask, score in zip(cut, scores) if mask.any()]
    boxes = [[*points.amin(0).flip(0).tolist(), *(points.amax(0).flip(0) + 1).tolist()] for points, _, _ in rows]
    return Detections(
        torch.tensor([score for _, score, _ in rows]),
        torch.zeros(len(rows), dtype=torch.int64),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.stack([mask for _, _, mask in rows]),
    )


def test_masks_tell_slender_objects_that_lie_across_or_cross():
    """The boxes of parts of one hardly overlap between the tiles; those of two that cross are equal there."""
    whole = bars((2, 5, 198, 95), (61, 10, 79, 60), (61, 60, 79, 10), (30, 60, 110, 10))
    scores = [(0.9, 0.5, 0.6, 0.7), (0.8, 0.6, 0.5, 0.9), (0.5, 0.5, 0.5, 0.5)]
    found = merged([parts_of(whole, tile, own) for tile, own in zip(TILES, scores)], TILES, 100)
    assert {tuple(mask.flatten().nonzero().flatten().tolist()) for mask in found.masks} == {
        tuple(mask.flatten().nonzero().flatten().tolist()) for mask in whole
    }
    assert len(found) == len(whole)
    for mask, box in zip(found.masks, found.boxes):
        points = mask.nonzero()
        assert box.tolist() == [*points.amin(0).flip(0).tolist(), *(points.amax(0).flip(0) + 1).tolist()]


def test_images_are_complete_when_all_their_tiles_are():
    merging, nothing = Merging(100), Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    (single,) = Tiles((100, 200)).of(WHOLE)
    ids, found = merging.complete([1, 1], TILES[:2], [nothing, nothing])
    assert (ids, found) == ([], [])
    ids, found = merging.complete([1, 2], [TILES[2], single], [nothing, nothing])
    assert ids == [1, 2]
    assert [len(one) for one in found] == [0, 0]
