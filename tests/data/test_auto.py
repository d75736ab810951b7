"""Layouts are recognised, and the two layouts of one data set are the same data."""

from __future__ import annotations

import os

import numpy as np
import pytest

from detr_exp.data.auto import auto

from . import test_yolo
from .conftest import data_set, document


def test_roboflow_is_recognised(roboflow):
    assert auto(str(roboflow(train=document())), {}).layout == "coco"


def test_yolo_is_recognised(tmp_path):
    assert auto(str(test_yolo.write(tmp_path)), {}).layout == "yolo"


def test_an_unknown_layout_lists_what_was_searched_and_what_exists(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"_annotations\.coco\.json.*instances_train.*data\.yaml.*photo\.jpg"):
        auto(str(tmp_path), {})


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_both_layouts_of_bccd_give_the_same_targets(real_data, network, name):
    ours = [data_set(real_data / folder, auto) for folder in ("bccd_coco", "bccd_yolo")]
    targets = []
    for data in ours:
        samples = data.loader(name, network=network, batch_size=1, seed=0).dataset
        plans = {}
        for i in range(len(samples)):
            objects = samples.split.objects(i)
            labels = samples.class_map.labels(objects.categories)
            plans[os.path.basename(samples.split.name(i))] = (labels, objects.boxes_xyxy, samples.split.size(i))
        targets.append(plans)
    first, second = targets
    assert first.keys() == second.keys()
    for file, (labels, boxes, size) in first.items():
        np.testing.assert_array_equal(labels, second[file][0])
        np.testing.assert_allclose(boxes, second[file][1], atol=1e-3)
        assert size == second[file][2]
    assert ours[0].classes == ours[1].classes == ["RBC", "WBC", "Platelets"]
