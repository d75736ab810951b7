"""Operating points: the score threshold that balances precision and recall best.

Legend: n detections of a class, K classes. Detections are matched greedily at IoU 0.5, best score first, as the COCO
protocol does; detections that match a crowd region or lie outside the area range are already left out. A detection
counts when its score is at least the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

THRESHOLDS = np.linspace(0, 1, 101)


class OperatingPoint(NamedTuple):
    """Attributes: `threshold` in 0..1, and `f1`, `precision` and `recall` of the detections above it."""

    threshold: float
    f1: float
    precision: float
    recall: float


def best_threshold(scores: np.ndarray, hits: np.ndarray, num_objects: int) -> OperatingPoint:
    """The threshold with the highest F1 of one class; of several the highest.

    Args:
        scores: `[n]`, best first.
        hits: `[n]` whether a detection matches an object.
        num_objects: number of annotated objects.
    """
    if num_objects == 0 or not hits.any():
        return OperatingPoint(1.0, 0.0, 0.0, 0.0)
    true = np.cumsum(hits)
    f1 = 2 * true / (np.arange(1, len(scores) + 1) + num_objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold cannot stand between equal scores
    best = int(np.argmax(f1))
    return OperatingPoint(
        float(scores[best]), float(f1[best]), float(true[best] / (best + 1)), float(true[best] / num_objects)
    )


def best_common_threshold(matches: Sequence[tuple[np.ndarray, np.ndarray]], objects: Sequence[int]) -> OperatingPoint:
    """The one threshold of 0.00, 0.01 ... 1.00 with the highest mean F1 over the classes that have objects.

    Args:
        matches: per class `scores [n]`, best first, and `hits [n]`.
        objects: `[K]`.
    """
    curves = [_sweep(*matches[k], num_objects) for k, num_objects in enumerate(objects) if num_objects > 0]
    if not curves:
        return OperatingPoint(1.0, 0.0, 0.0, 0.0)
    f1, precision, recall = np.mean(curves, axis=0)
    best = int(np.argmax(f1))
    return OperatingPoint(float(THRESHOLDS[best]), float(f1[best]), float(precision[best]), float(recall[best]))


def _sweep(scores: np.ndarray, hits: np.ndarray, num_objects: int) -> np.ndarray:
    """F1, precision and recall of one class at every threshold: `[3, 101]`."""
    kept = len(scores) - np.searchsorted(scores[::-1], THRESHOLDS, side="left")
    true = np.append(0, np.cumsum(hits))[kept]
    return np.stack([2 * true / (kept + num_objects), true / np.maximum(kept, 1), true / num_objects])
