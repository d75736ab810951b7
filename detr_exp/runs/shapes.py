"""Masks and keypoints as paths of SVG, in pixels of their image, for pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np
from pycocotools import mask as codec

from detr_exp.metric.backend import CocoEvaluation
from detr_exp.ops.draw import SHOWN_FROM
from detr_exp.ops.polygons import polygons_of_mask
from detr_exp.values import Values

COARSE = 0.006  # an outline may be off by this share of its object's diagonal
POINT = 0.012  # radius of a keypoint, likewise


def mask_path(segment: list[list[float]] | Values) -> str:
    """The outlines of an object.

    Args:
        segment: polygons `[x0, y0, x1, y1, ...]`, or a run-length code.
    """
    polygons = [np.asarray(polygon, np.float32).reshape(-1, 2) for polygon in _polygons(segment)]
    if not polygons:
        return ""
    off = COARSE * _diagonal(np.concatenate(polygons))
    kept = [cv2.approxPolyDP(polygon[:, None], off, closed=True)[:, 0] for polygon in polygons]
    return "".join(_drawn(points) + "Z" for points in kept if len(points) > 2)


def keypoint_path(points: np.ndarray, skeleton: Iterable[tuple[int, int]]) -> str:
    """The joined and the single points of an object, as far as they can be seen.

    Args:
        points: `[K, 3]` x, y in pixels, and a confidence or visibility; see `ops.draw.draw_objects`.
        skeleton: 0-based pairs that are joined.
    """
    seen = points[:, 2] >= SHOWN_FROM
    if not seen.any():
        return ""
    joined = [_drawn(points[[a, b], :2]) for a, b in skeleton if max(a, b) < len(points) and seen[a] and seen[b]]
    half = max(1.0, POINT * _diagonal(points[seen, :2]))
    corners = half * np.array([[-1, 0], [0, -1], [1, 0], [0, 1]])
    return "".join([*joined, *(_drawn(point + corners) + "Z" for point in points[seen, :2])])


def outlines(
    metric: CocoEvaluation,
    number: int,
    annotations: Sequence[Values],
    kept: np.ndarray,
    skeletons: Mapping[int, Sequence[tuple[int, int]]],
    most: float,
) -> tuple[list[str], list[str]]:
    """A path for each object of an image and each detection, of what is compared; "" for others.

    Args:
        metric: with the detections.
        number: of the image.
        annotations: of the image.
        kept: `[n]` places of the detections, best first.
        skeletons: of each category id.
        most: letters of all paths together; later ones are left out.
    """
    found = metric.images[number]
    truth, made = [""] * len(annotations), [""] * len(kept)
    masks, keypoints = getattr(found, "masks", None), getattr(found, "keypoints", None)  # not every metric has them
    if "segm" in metric.iou_types and masks is not None:
        truth = [mask_path(one["segmentation"]) for one in annotations]
        made = [mask_path(masks[i]) for i in kept]
    if "keypoints" in metric.iou_types and keypoints is not None:
        ids = [one["category_id"] for one in annotations], [metric.category_ids[found.labels[i]] for i in kept]
        points = [np.reshape(one["keypoints"], (-1, 3)) for one in annotations], keypoints[kept]
        drawn = [
            [keypoint_path(one, skeletons.get(category, ())) for one, category in zip(*of)] for of in zip(points, ids)
        ]
        truth, made = map(_joined, (truth, made), drawn)
    room = most - np.cumsum([len(path) for path in (*truth, *made)])
    paths = [path if left >= 0 else "" for path, left in zip((*truth, *made), room)]
    return paths[: len(truth)], paths[len(truth) :]


def _joined(one: Sequence[str], other: Sequence[str]) -> list[str]:
    return [a + b for a, b in zip(one, other)]


def _polygons(segment: list[list[float]] | Values) -> list[list[float]]:
    if isinstance(segment, list):
        return segment
    if isinstance(segment["counts"], list):
        segment = codec.frPyObjects(segment, *segment["size"])
    x, y, width, height = np.ceil(codec.toBbox(segment)).astype(int)
    inside = codec.decode(segment)[y : y + height, x : x + width] > 0
    return [np.add(np.reshape(part, (-1, 2)), (x, y)).reshape(-1).tolist() for part in polygons_of_mask(inside)]


def _diagonal(points: np.ndarray) -> float:
    return float(np.hypot(*np.ptp(points, axis=0)))


def _drawn(points: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}".replace(".0", "") for x, y in points.tolist())
