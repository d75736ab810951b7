"""Causes of an AP near zero are named where they are the case, and not where they are not."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detr_exp.data.augment import Augment
from detr_exp.data.dataset import DataSet
from detr_exp.data.part import Part
from detr_exp.data.shapes import shapes
from detr_exp.metric.coco import ImageDetections
from detr_exp.trainer.diagnosis.no_detections import EVALUATIONS, check_evaluation, likely_causes
from detr_exp.trainer.ema import EMA


@pytest.fixture
def run(tmp_path):
    """A run that has trained long enough, whose loss falls, and that detects everything."""
    source = functools.partial(shapes, size=64, seed=0)
    data = DataSet(source=source, train=30, val=10, test=0, augment=Augment(), num_workers=0)
    images = {}
    for index, image_id in enumerate(data.val.image_ids):
        objects = data.val.objects(index)
        boxes = np.concatenate([objects.boxes_xyxy[:, :2], objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]], 1)
        images[image_id] = ImageDetections(np.full(len(boxes), 0.9), objects.categories - 1, boxes, None, None)
    log(tmp_path, [9.0, 5.0, 4.0])
    metric = SimpleNamespace(images=images)
    config = {"model": {"weights": None}}
    return SimpleNamespace(
        data=data, make_metric=lambda split: metric, metric=metric, output_dir=tmp_path, config=config
    )


@pytest.fixture
def state():
    optimizer = SimpleNamespace(param_groups=[{"initial_lr": 1e-4}])
    network = SimpleNamespace(image_size=(640, 640))
    return SimpleNamespace(network=network, optimizer=optimizer, ema=None, position=5000, num_low_evaluations=0)


def log(folder, losses, **values):
    lines = [{"step": i, "train/loss": loss, **values} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def causes(run, state, which="raw"):
    return "\n".join(likely_causes(run, state, which))


def test_nothing_is_named_where_nothing_is_wrong(run, state):
    assert causes(run, state) == ""


def test_boxes_under_other_classes(run, state):
    for found in run.metric.images.values():
        found.labels = (found.labels + 1) % 6
    assert "have a box with another class" in causes(run, state)


def test_scores_near_zero(run, state):
    for found in run.metric.images.values():
        found.scores = found.scores * 0.03
    assert "no detection has a score above 0.027" in causes(run, state)


def test_classes_that_training_does_not_have(run, state):
    houses = [i for i in range(len(run.data.train)) if 3 not in run.data.train.objects(i).categories]
    run.data.train = Part(run.data.train, houses)
    assert "1 of 6 classes in validation have no object in training: 'house'" in causes(run, state)


def test_objects_of_a_few_pixels(run, state):
    state.network.image_size = (32, 32)
    assert "model.image_size=[64,64]" in causes(run, state)


@pytest.mark.parametrize(("lr", "advice"), [(1e-2, "too high"), (1e-5, "ten times higher")])
def test_a_loss_that_does_not_fall(run, state, lr, advice):
    log(run.output_dir, [9.0, 9.2, None, 8.9])
    state.optimizer.param_groups[0]["initial_lr"] = lr
    assert advice in causes(run, state)


def test_steps_that_were_left_out(run, state):
    log(run.output_dir, [9.0, 4.0], **{"train/nonfinite_steps": 3})
    assert "6 steps were skipped" in causes(run, state)


def test_an_average_that_is_still_the_start(run, state):
    state.ema = EMA(torch.nn.Linear(2, 2), decay=0.9999, tau=0)
    state.ema.updates = 3000
    assert "74% of the averaged weights" in causes(run, state, "ema")
    assert "averaged" not in causes(run, state, "raw")
    state.ema.updates = 30_000
    assert "averaged" not in causes(run, state, "ema")


def test_a_short_run_from_random_weights(run, state):
    state.position = 300
    assert "only 300 steps from random weights" in causes(run, state)
    run.config["model"]["weights"] = "x.pth"
    assert causes(run, state) == ""


def test_it_is_said_once_after_several_evaluations(run, state):
    said = []
    console = SimpleNamespace(line=said.append)
    for value in (0.0, 0.005, 0.02, *[0.001] * (EVALUATIONS + 3)):
        check_evaluation(console, run, state, "raw", {"mAP50": value})
    (sentence,) = said
    assert f"in {EVALUATIONS} evaluations" in sentence
    assert "trainer.overfit_batches=1" in sentence
