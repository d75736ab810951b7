"""Charts: one file per task, with any number of classes and objects."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from detr_exp.metric.charts import save_charts
from detr_exp.metric.coco import CocoMetric

from .test_coco import CATEGORIES, random_detections, random_truth

SIGMAS = [[0.05] * 4] * 3


@pytest.mark.parametrize("images", [12, 0])
def test_every_task_has_its_curves(tmp_path, images):
    generator = np.random.default_rng(0)
    truth = random_truth(generator, 12)
    tasks = ("bbox", "segm", "keypoints")
    metric = CocoMetric(
        truth=truth, category_ids=CATEGORIES, classes=["$a", "b" * 60, "c_1"], iou_types=tasks, keypoint_sigmas=SIGMAS
    )
    for i in range(1, images + 1):
        metric.update([i], [random_detections(generator, truth, i, extra=4)])
    metric.compute()
    paths = save_charts(metric, tmp_path / "new")
    names = ["pr_curves.png", "segm_pr_curves.png", "keypoint_pr_curves.png", "confusion.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        assert min(Image.open(path).size) > 300
        assert np.asarray(Image.open(path).convert("L")).std() > 3  # not blank


def test_many_classes_fit(tmp_path):
    generator = np.random.default_rng(1)
    truth = random_truth(generator, 12)
    ids = list(range(1, 81))
    for annotation in truth["annotations"]:
        annotation["category_id"] = int(generator.integers(1, 81))
    metric = CocoMetric(truth=truth, category_ids=ids, classes=[f"class {i}" for i in ids])
    metric.compute()
    assert all(max(Image.open(path).size) < 3000 for path in save_charts(metric, tmp_path))
