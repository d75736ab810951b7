"""Masks and keypoints as paths of SVG."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from pycocotools import mask as codec

from detr_exp.runs.shapes import keypoint_path, mask_path, outlines


def rings(path: str) -> list[list[float]]:
    """The closed parts of a path, as COCO's polygons."""
    return [[float(number) for number in re.findall(r"[-\d.]+", part)] for part in path.split("Z") if part]


def disk(height: int = 90, width: int = 120) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((x - 70.3) / 31) ** 2 + ((y - 41.8) / 22) ** 2 < 1


def iou(path: str, mask: np.ndarray) -> float:
    filled = codec.decode(codec.merge(codec.frPyObjects(rings(path), *mask.shape))) > 0
    return float((filled & mask).sum() / (filled | mask).sum())


def runs(mask: np.ndarray) -> list[int]:
    """An uncompressed run-length code."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))).tolist()
    return np.diff([0, *edges, mask.size]).tolist()


def test_every_way_to_write_a_mask_gives_its_outline() -> None:
    mask = disk()
    code = codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    ways = [code, {"size": code["size"], "counts": code["counts"].decode()}, {"size": [90, 120], "counts": runs(mask)}]
    paths = [mask_path(way) for way in ways]
    assert len(set(paths)) == 1
    assert iou(paths[0], mask) > 0.97
    angles = np.linspace(0, 2 * np.pi, 400)[:-1]
    polygon = np.stack([70.8 + 31 * np.cos(angles), 42.3 + 22 * np.sin(angles)], 1).reshape(-1).tolist()
    assert iou(mask_path([polygon]), mask) > 0.97
    assert max(len(path) for path in (*paths, mask_path([polygon]))) < 400, "798 numbers are not needed for that"


@pytest.mark.parametrize("segment", [[], {"size": [5, 7], "counts": [35]}, [[1.0, 1.0, 2.0, 2.0]]])
def test_nothing_to_draw(segment: object) -> None:
    assert mask_path(segment) == ""  # type: ignore[arg-type]


def test_two_parts_and_the_edge_of_the_image() -> None:
    mask = np.zeros((20, 30), bool)
    mask[:8, :9] = mask[12:, 20:] = True
    path = mask_path(codec.encode(np.asfortranarray(mask.astype(np.uint8))))
    assert len(rings(path)) == 2
    assert iou(path, mask) > 0.95


def test_points_that_are_seen_and_lines_between_them() -> None:
    points = np.array([[10, 10, 2], [60, 10, 0.6], [60, 70, 0.2], [10, 70, 1.0]])
    path = keypoint_path(points, [(0, 1), (1, 2), (2, 3), (3, 0), (0, 9)])
    assert path.count("Z") == 3
    assert path.startswith("M10 10L60 10M10 70L10 10M")
    assert keypoint_path(points * [1, 1, 0], [(0, 1)]) == ""


def test_what_is_compared_is_drawn_as_far_as_there_is_room() -> None:
    square = [[0.0, 0.0, 40.0, 0.0, 40.0, 40.0, 0.0, 40.0]]
    code = codec.encode(np.asfortranarray(disk().astype(np.uint8)))
    truth = [{"category_id": 7, "segmentation": square, "keypoints": [5, 5, 2, 9, 9, 2]}]
    found = SimpleNamespace(masks=[code, code], keypoints=np.full((2, 2, 3), 8.0), labels=np.array([0, 0]))
    given = dict(annotations=truth, kept=np.array([1, 0]), skeletons={7: [(0, 1)]})

    def paths(*kinds: str, most: float = 1e6) -> tuple[list[str], list[str]]:
        metric = SimpleNamespace(iou_types=("bbox", *kinds), images={3: found}, category_ids=[7])
        return outlines(metric, 3, most=most, **given)  # type: ignore[arg-type]

    assert paths() == ([""], ["", ""])
    (mask,), both = paths("segm")
    (points,), _ = paths("keypoints")
    assert (mask, both) == (mask_path(square), [mask_path(code)] * 2)
    assert points.startswith("M5 5L9 9M")
    assert paths("segm", "keypoints")[0] == [mask + points]
    assert paths("segm", most=len(mask) + len(both[0])) == ([mask], [both[0], ""])
