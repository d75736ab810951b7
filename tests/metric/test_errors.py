"""Kinds of errors and their costs, by hand, beside COCO's AP50, and beside the program of TIDE's authors."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.metric.errors import ERRORS, KINDS, Judged, costs, judge, judged

from .test_coco import random_detections, random_truth
from .test_confusion import computed

HERE, BESIDE, THERE = [10, 10, 40, 40], [28, 10, 40, 40], [100, 100, 40, 40]
AWAY = [200, 10, 30, 30]
Labelled = list[tuple[int, list[int]]]


def arrays(objects: Labelled) -> tuple[np.ndarray, np.ndarray]:
    return np.array([label for label, _ in objects], int), np.array([box for _, box in objects], float).reshape(-1, 4)


def of(found: Labelled, objects: Labelled, crowds: Labelled = []) -> Judged:  # noqa: B006
    """Detections with falling scores."""
    labels, boxes = arrays(found)
    return judge(np.linspace(0.9, 0.5, len(found)), labels, boxes, arrays(objects), arrays(crowds))


@pytest.mark.parametrize(
    ("found", "kinds", "owners", "missed"),
    [
        ([(0, HERE)], ["hit"], [0], [False, True]),
        ([(0, HERE), (0, HERE)], ["hit", "twice"], [0, 0], [False, True]),
        ([(1, HERE)], ["class"], [0], [False, True]),
        ([(0, BESIDE)], ["box"], [0], [False, True]),
        ([(1, BESIDE)], ["both"], [0], [True, True]),
        ([(1, AWAY)], ["background"], [-1], [True, True]),
        ([(2, THERE), (1, THERE)], ["class", "hit"], [1, 1], [True, False]),
        ([], [], [], [True, True]),
    ],
)
def test_every_kind_of_error(found: Labelled, kinds: list[str], owners: list[int], missed: list[bool]) -> None:
    one = of(found, [(0, HERE), (1, THERE)])
    assert [KINDS[kind] for kind in one.kinds] == kinds
    assert one.objects.tolist() == owners
    assert one.missed.tolist() == missed


def test_what_lies_in_a_crowd_of_its_class_is_no_error() -> None:
    one = of([(0, HERE), (1, HERE), (0, THERE)], [(0, THERE)], [(0, HERE)])
    assert [KINDS[kind] for kind in one.kinds] == ["ignored", "background", "hit"]


def test_without_objects_all_is_background_and_there_is_no_ap() -> None:
    one = of([(0, HERE)], [])
    assert [KINDS[kind] for kind in one.kinds] == ["background"]
    ap50, mended = costs([one], 2)
    assert np.isnan(ap50)
    assert mended == dict.fromkeys(ERRORS, 0.0)


def test_without_detections_all_that_is_lost_was_missed() -> None:
    assert costs([of([], [(0, HERE), (1, THERE)])], 3) == (0.0, {**dict.fromkeys(ERRORS, 0.0), "missed": 1.0})


def test_labels_as_detections_have_no_errors() -> None:
    objects = [(label % 3, [7 * label, 11 * label, 20, 20]) for label in range(120)]
    assert costs([of(objects, objects)], 3) == (1.0, dict.fromkeys(ERRORS, 0.0))


def test_ap50_is_cocos() -> None:
    truth = random_truth(np.random.default_rng(1), 20)
    generator = np.random.default_rng(2)
    metric = computed(truth, {one: random_detections(generator, truth, one, 4) for one in range(1, 21)})
    ap50, _ = costs(list(judged(metric).values()), len(metric.classes))
    assert ap50 == pytest.approx(metric.compute()["mAP50"], abs=1e-12)


def scene(number: int) -> Judged:
    """Objects, and detections that are near them, of their class or another, or anywhere."""
    draw = np.random.default_rng(number).random((30, 8))
    boxes = np.column_stack([80 * draw[:6, :2], 10 + 30 * draw[:6, 2:4]])
    labels = (3 * draw[:6, 4]).astype(int)
    like = (6 * draw[6:, 0]).astype(int)
    near = boxes[like] + 12 * (draw[6:, 1:5] - 0.5) * (1 + draw[6:, 5:6])
    anywhere = np.column_stack([80 * draw[6:, 1:3], 10 + 30 * draw[6:, 3:5]])
    found = np.where(draw[6:, 6:7] < 0.75, near, anywhere).clip(3)
    named = np.where(draw[6:, 7] < 0.7, labels[like], like % 3)
    return judge(np.linspace(0.99, 0.3, 24) - number / 1000, named, found, (labels, boxes), arrays([]))


TIDE_AP50 = 0.11238
TIDE = {"class": 0.01829, "box": 0.34584, "both": 0.01993, "twice": 0.00487, "background": 0.02441, "missed": 0.00607}


def test_costs_are_those_of_the_program_of_its_authors() -> None:
    """What tidecv 1.0.1 computes of the same scenes."""
    ap50, mended = costs([scene(number) for number in range(20)], 3)
    assert ap50 == pytest.approx(TIDE_AP50, abs=1e-5)
    assert mended == pytest.approx(TIDE, abs=1e-5)
