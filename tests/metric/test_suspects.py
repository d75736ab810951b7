"""Suspected label errors: planted ones come first, each once, and right labels give none."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.metric.errors import Judged, judge
from detr_exp.metric.suspects import LARGEST, suspects

IMAGES, NOTHING = 60, (np.zeros(0, int), np.zeros((0, 4)))
PLACES = np.array([[10, 10, 30, 30], [60, 10, 30, 30], [10, 60, 30, 30], [60, 60, 30, 30]], float)


def scene(number: int, error: str = "") -> Judged:
    """Four objects that a good detector finds, and an error in the label of the first."""
    rng = np.random.default_rng(number)
    labels, boxes = np.arange(4) % 3, PLACES.copy()
    scores = np.sort(0.5 + 0.4 * rng.random(4))[::-1]
    found, named = PLACES + rng.normal(0, 1, (4, 4)), labels.copy()
    if error == "class":
        labels[0] = 2
    elif error == "box":
        boxes[0, :2] += 12
    elif error == "missing":
        labels, boxes = labels[1:], boxes[1:]
    elif error == "invented":
        labels, boxes = np.append(labels, 1), np.vstack([boxes, [110, 110, 30, 30]])
    return judge(scores, named, found, (labels, boxes), NOTHING)


@pytest.mark.parametrize("error", ["class", "box", "missing", "invented"])
def test_a_planted_error_is_the_first_of_its_kind(error: str) -> None:
    images = {100 + number: scene(number, error if number == 7 else "") for number in range(IMAGES)}
    found = suspects(images)
    first = next(one for one in found if one.kind == error)
    assert first.image_id == 107
    assert first.object == {"class": 0, "box": 0, "missing": -1, "invented": 4}[error]
    assert (first.detection >= 0) == (error != "invented")
    assert sum(one.image_id == 107 and one.kind != "invented" for one in found) <= 1
    assert all(0 < one.rate <= LARGEST for one in found)
    assert [one.rate for one in found] == sorted(one.rate for one in found)


def test_objects_and_detections_are_named_once() -> None:
    kinds = ["class", "box", "missing", "invented"]
    found = suspects({number: scene(number, kinds[number % 4] if number % 3 == 0 else "") for number in range(IMAGES)})
    objects = [(one.image_id, one.object) for one in found if one.object >= 0]
    detections = [(one.image_id, one.detection) for one in found if one.detection >= 0]
    assert len(objects) == len(set(objects))
    assert len(detections) == len(set(detections))


def test_labels_that_are_never_found_are_not_suspicious_where_that_is_usual() -> None:
    """A detector that has learned nothing accuses nobody."""
    nothing = [judge(np.zeros(0), NOTHING[0], NOTHING[1], (np.arange(4) % 3, PLACES), NOTHING) for _ in range(IMAGES)]
    assert suspects(dict(enumerate(nothing))) == []


def test_no_images_no_objects_no_detections() -> None:
    assert suspects({}) == []
    boxes = PLACES[:1]
    assert suspects({1: judge(np.array([0.9]), np.array([0]), boxes, NOTHING, NOTHING)}) == []
