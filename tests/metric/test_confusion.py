"""The confusion matrix against hand-made images and against the protocol's own matches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_exp.metric.coco import CocoMetric
from detr_exp.metric.confusion import confusion
from detr_exp.structures import Detections

from .test_coco import CATEGORIES, random_detections, random_truth


def computed(truth: dict, detections: dict[int, Detections]) -> CocoMetric:
    metric = CocoMetric(truth=truth, category_ids=CATEGORIES, classes=["a", "b", "c"])
    for image_id, found in detections.items():
        metric.update([image_id], [found])
    metric.compute()
    return metric


def one_image(objects: list[tuple], found: list[tuple]) -> np.ndarray:
    """Objects (category, box, crowd) and detections (label, score, box), boxes as x, y, width, height."""
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for i, (c, box, crowd) in enumerate(objects)
    ]
    truth = {"images": [{"id": 1, "height": 200, "width": 200}], "annotations": annotations, "categories": []}
    boxes = torch.tensor([[x, y, x + w, y + h] for _, _, (x, y, w, h) in found], dtype=torch.float64)
    scores = torch.tensor([score for _, score, _ in found], dtype=torch.float64)
    labels = torch.tensor([label for label, _, _ in found])
    return confusion(computed(truth, {1: Detections(scores, labels, boxes.reshape(-1, 4))}))


HERE, THERE, AWAY = [10, 10, 40, 40], [100, 100, 40, 40], [10, 120, 30, 30]


@pytest.mark.parametrize(
    ("objects", "found", "cells"),
    [
        ([(7, HERE, 0)], [(0, 0.9, HERE)], {(0, 0): 1}),
        # both classes need a hit, or no threshold counts them
        (
            [(7, HERE, 0), (3, THERE, 0), (7, AWAY, 0)],
            [(0, 0.9, HERE), (1, 0.8, THERE), (1, 0.9, AWAY)],
            {(0, 0): 1, (1, 1): 1, (0, 1): 1},
        ),
        ([(7, HERE, 0), (7, AWAY, 0)], [(0, 0.9, HERE)], {(0, 0): 1, (0, 3): 1}),
        # found under the right name as well: the other detection found nothing
        (
            [(7, HERE, 0), (3, THERE, 0)],
            [(1, 0.9, THERE), (1, 0.95, HERE), (0, 0.3, HERE)],
            {(0, 0): 1, (1, 1): 1, (3, 1): 1},
        ),
        ([(7, HERE, 0), (3, THERE, 1)], [(0, 0.9, HERE), (0, 0.95, [105, 105, 20, 20])], {(0, 0): 1}),
    ],
)
def test_hand_made_images(objects, found, cells):
    matrix = one_image(objects, found)
    expected = np.zeros((4, 4), int)
    for cell, count in cells.items():
        expected[cell] = count
    np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_the_objects_and_the_diagonal_is_what_the_protocol_matched(seed):
    generator = np.random.default_rng(seed)
    truth = random_truth(generator, 25)
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    metric = computed(truth, {i: random_detections(generator, truth, i, extra=6) for i in range(1, 26)})
    matrix, rows = confusion(metric), metric.table()
    assert matrix[:-1].sum(1).tolist() == [row["objects"] for row in rows]
    hits = [round(row["recall"] * row["objects"]) for row in rows]
    assert np.diagonal(matrix)[:-1].tolist() == hits
    detected = [round(hit / row["precision"]) if hit else 0 for hit, row in zip(hits, rows)]
    assert matrix[:, :-1].sum(0).tolist() == detected


def test_nothing_found_in_nothing():
    truth = {"images": [{"id": 1, "height": 9, "width": 9}], "annotations": [], "categories": []}
    assert not confusion(computed(truth, {})).any()
