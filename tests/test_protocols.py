"""What lacks members of its contract is refused by their names; what has them fits, whatever else it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from detr_exp import build, compare, evaluate, export, train
from detr_exp.config.instantiation import instantiate
from detr_exp.config.targets import refuse_missing_members
from detr_exp.data.content import Split
from detr_exp.data.shapes import shapes
from detr_exp.matcher.hungarian import HungarianMatcher, Matcher
from detr_exp.metric.backend import CocoEvaluation
from detr_exp.metric.coco import CocoMetric
from detr_exp.model.head.mask import MaskHead
from detr_exp.model.neck.projector import Projector
from detr_exp.model.rfdetr import RFDETR
from detr_exp.protocols import (
    Backbone,
    Compiling,
    Counting,
    Metric,
    Neck,
    Network,
    PerClass,
    PerImage,
    Strided,
    Tracker,
    missing,
)
from detr_exp.tracker.tracker import Tracker as OurTracker

PARTS = '''
import numpy as np
import torch
from torch import nn

from detr_exp.data.content import Category, Content, Objects
from detr_exp.matcher.hungarian import HungarianMatcher


class Bare(nn.Module):
    """A backbone without statistics of pixels, checkpointing and a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels, self.out_strides = [8, 8, 8], [8, 16, 32]


class Cells(nn.Module):
    """A decoder that only computes."""

    def __init__(self, *, num_classes, activation, channels, strides, hidden_dim, num_layers, num_queries, denoising):
        super().__init__()

    def forward(self, maps, noisy, padding_mask):
        return maps


class Nothing(nn.Module):
    def __init__(self, *, num_classes, activation, image_size, stride):
        super().__init__()
        self.image_size, self.stride = image_size, stride


class Forgetful:
    def __init__(self, *, truth, category_ids, classes, iou_types, keypoint_sigmas):
        pass

    def update(self, image_ids, detections):
        pass

    def compute(self):
        return {}


class Careless:
    def __init__(self, *, truth, labels):
        pass


class Recall:
    """The share of objects with a detection of their class nearby: no curves, no table, no images."""

    def __init__(self, *, truth, category_ids, classes, iou_types, keypoint_sigmas):
        label_of = {number: label for label, number in enumerate(category_ids)}
        self.objects = {image["id"]: [] for image in truth["images"]}
        for one in truth["annotations"]:
            x, y, width, height = one["bbox"]
            self.objects[one["image_id"]].append((x + width / 2, y + height / 2, label_of[one["category_id"]]))
        self.reset()

    def reset(self):
        self.counts = []

    def update(self, image_ids, detections):
        for number, found in zip(image_ids, detections):
            centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
            for x, y, label in self.objects[number]:
                near = ((centres - torch.tensor([x, y])).abs() < 16).all(1) & (found.labels == label)
                self.counts.append(bool(near.any()))

    def merge(self, gather):
        self.counts = [count for part in gather(self.counts) for count in part]

    def compute(self):
        return {"recall": sum(self.counts) / max(1, len(self.counts)), "objects": float(len(self.counts))}


class Rows:
    """Squares out of a table in memory: no file, no path."""

    has_masks = has_keypoints = False
    most_objects = 1

    def __init__(self, corners):
        self.corners, self.fingerprint = corners, str(corners)

    @property
    def image_ids(self):
        return range(100, 100 + len(self.corners))

    def __len__(self):
        return len(self.corners)

    def name(self, index):
        return f"row {index}"

    def size(self, index):
        return 64, 64

    def objects(self, index):
        x, y = self.corners[index]
        return Objects(np.array([7]), np.array([[x, y, x + 20.0, y + 20.0]]))

    def image(self, index, smallest=None):
        x, y = self.corners[index]
        image = np.zeros((64, 64, 3), np.uint8)
        image[y : y + 20, x : x + 20] = 255
        return image

    def load(self, index):
        return self.image(index), self.objects(index)

    def truth(self):
        images = [{"id": i, "file_name": "", "width": 64, "height": 64} for i in self.image_ids]
        boxes = [
            {"id": i, "image_id": i, "category_id": 7, "bbox": [x, y, 20, 20], "area": 400, "iscrowd": 0}
            for i, (x, y) in zip(self.image_ids, self.corners)
        ]
        return {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "square"}]}


def table(root, places):
    corners = [(4, 8), (30, 10), (12, 40), (40, 40)]
    return Content("rows", "a table", [Category(7, "square")], {n: lambda: Rows(corners) for n in ("train", "val")})


def half(root, places):
    return Content("rows", "a table", [Category(7, "square")], {"train": list, "val": list})


MATCH = HungarianMatcher(activation="sigmoid", cost_class=2, cost_bbox=5, cost_giou=2, alpha=0.25, gamma=2.0)


class Idle:
    def __init__(self, *, activation):
        pass


class Plain:
    """A matcher that counts and compiles nothing."""

    def __init__(self, *, activation):
        pass

    def __call__(self, predictions, targets, groups, weights, keypoint_counts):
        return MATCH(predictions, targets, groups, weights, keypoint_counts)
'''
DATA = "defaults:\n  - augment: flip\n  - _self_\n_target_: detr_exp.data.dataset.DataSet\nnum_workers: 0\ncache: ram\n"
OPTIONS = {
    "model/backbone/bare": "_target_: their_parts.Bare\n",
    "model/nothing": "defaults:\n  - backbone: null\n  - neck: null\n  - head: null\n  - adapter: null\n  - _self_\n"
    "_target_: their_parts.Nothing\nimage_size: [64, 64]\nstride: 32\nweights: null\n",
    "model/decoder/cells": "_target_: their_parts.Cells\n_partial_: true\n",
    "metric/forgetful": "_target_: their_parts.Forgetful\n_partial_: true\n",
    "metric/careless": "_target_: their_parts.Careless\n_partial_: true\n",
    "metric/recall": "_target_: their_parts.Recall\n_partial_: true\n",
    "matcher/plain": "_target_: their_parts.Plain\n",
    "matcher/idle": "_target_: their_parts.Idle\n",
    "data/table": f"{DATA}source:\n  _target_: their_parts.table\n  _partial_: true\n",
    "data/half": f"{DATA}source:\n  _target_: their_parts.half\n  _partial_: true\n",
}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that make the parts above known."""
    (tmp_path / "their_parts.py").write_text(PARTS)
    for name, text in OPTIONS.items():
        path = tmp_path / "their_conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield ["--config-dir", str(tmp_path / "their_conf"), "allow_targets=[their_parts]"]
    sys.modules.pop("their_parts", None)


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        (["model/backbone=bare"], "Bare has no pixel_mean, pixel_std, forward, set_gradient_checkpointing"),
        (["model/decoder=cells"], "model.decoder: Cells has no strides, class_tensors, drop_training_parts"),
        (
            ["model=nothing"],
            "Nothing has no num_queries, activation, tasks, keypoint_counts, cuts_boxes, pixel_mean",
        ),
        (["metric=forgetful"], "Forgetful has no reset, merge"),
        (["metric=careless"], "metric: their_parts.Careless has no reset, update, merge, compute"),
        (["matcher=idle"], "matcher: their_parts.Idle has no __call__"),
        (["data=half"], "a list, has no has_masks, has_keypoints, fingerprint, image_ids, most_objects, name, size"),
    ],
)
def test_what_is_missing_is_named_at_once(
    command: Callable[..., int],
    tiny_run: list[str],
    theirs: list[str],
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    lacks: str,
) -> None:
    kept = [word for word in tiny_run if not (words[0].startswith("model=") and word.startswith("model"))]
    kept = [word for word in kept if not (words[0].startswith("data=") and word.startswith("data"))]
    assert command(train.main, *theirs, *kept, *words) == 2
    said = capfd.readouterr().err
    assert lacks in said
    assert "Traceback" not in said
    assert "needs all that" in said


def test_our_parts_keep_their_contracts(tiny_run: list[str]) -> None:
    network = build.network(build.compose(tiny_run))
    assert missing(network, Network) == []
    assert missing(network.backbone, Backbone) == []
    assert missing(network.encoder, Neck) == []
    matcher = build.criterion(build.compose(tiny_run)).matcher
    assert missing(matcher, Matcher) == []
    assert isinstance(matcher, Counting)
    assert isinstance(matcher, Compiling)
    assert not isinstance(network.backbone, Strided)
    assert missing(OurTracker, Tracker) == []
    assert missing(shapes(None, {"train": 1}, size=64, seed=0).read["train"](), Split) == []


def test_parts_that_a_network_makes_are_checked_too() -> None:
    def network(decoder: nn.Module, mask_head: nn.Module) -> RFDETR:
        backbone = nn.Identity()
        backbone.out_channels, backbone.out_strides, backbone.stride = [8], [16], 16
        return RFDETR(
            num_classes=2,
            activation="sigmoid",
            backbone=backbone,
            neck=partial(Projector, levels=["P4"]),
            decoder=lambda **_: decoder,
            image_size=[32, 32],
            pixel_mean=[0.5] * 3,
            pixel_std=[0.5] * 3,
            hidden_dim=8,
            num_layers=1,
            num_queries=1,
            num_groups=1,
            mask_head=lambda **_: mask_head,
        )

    network(nn.Identity(), MaskHead(hidden_dim=8, num_layers=1, downsample=4))
    with pytest.raises(ValueError, match=r"model\.decoder: Module has no forward; .*model/decoder=\.\.\."):
        network(nn.Module(), MaskHead(hidden_dim=8, num_layers=1, downsample=4))
    with pytest.raises(ValueError, match=r"model\.mask_head: Identity has no start, of_encoder"):
        network(nn.Identity(), nn.Identity())
    neck = instantiate({"_target_": "torch.nn.Identity", "_partial_": True}, "model.neck")
    with pytest.raises(ValueError, match=r"model\.neck: torch\.nn\.Identity has no out_channels, out_strides"):
        neck(channels=[8], strides=[16])


def test_our_metric_has_all_abilities() -> None:
    metric = CocoMetric(truth={"images": [], "annotations": []}, category_ids=[1], classes=["a"])
    assert missing(metric, Metric) == []
    assert all(isinstance(metric, ability) for ability in (PerImage, PerClass, CocoEvaluation))


def test_only_the_members_of_a_contract_are_asked_for() -> None:
    class Kept:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

        @property
        def fingerprint(self) -> str:
            raise AssertionError("a hash of everything is not made to see that it is there")

    assert "fingerprint" not in missing(Kept(), Split)
    assert missing(nn.Linear(2, 2), Backbone)[0] == "out_channels"
    assert "forward" in missing(nn.Module(), Backbone)
    assert "forward" not in missing(nn.Linear(2, 2), Backbone)
    part = object()
    assert refuse_missing_members(part, "model.activation", "mine.Part") is part
    assert not isinstance(max, Counting)
    assert missing(HungarianMatcher.__call__, Matcher) == []
    with pytest.raises(ValueError, match=r"operations\[1\]: mine.Rain has no __call__; .* add what is missing$"):
        refuse_missing_members(part, "data.augment.operations[1]", "mine.Rain")


@pytest.mark.slow
def test_an_evaluator_a_source_and_a_matcher_of_ones_own_work_everywhere(
    command: Callable[..., int], tiny_run: list[str], theirs: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    kept = [word for word in tiny_run if not word.startswith("data")]
    words = [*theirs, *kept, "data=table", "metric=recall", "matcher=plain", "trainer.batch_size=2"]
    assert command(train.main, *words) == 2
    assert "name one: trainer.monitor=val/recall" in capfd.readouterr().err
    assert command(train.main, *words, "trainer.monitor=val/recal") == 2
    assert "did you mean trainer.monitor=val/recall" in " ".join(capfd.readouterr().err.split())
    runs = [Path(f"one{seed}") for seed in (0, 1)]
    for seed, run in enumerate(runs):
        where = [f"hydra.run.dir={run}", f"seed={seed}"]
        assert command(train.main, *words, "trainer.monitor=val/recall", *where) == 0
        assert (run / "checkpoint_best_total.pth").exists()
    allowed = "allow_targets=[their_parts]"
    assert command(evaluate.main, f"checkpoint={runs[0]}", allowed, "trainer/hardware=cpu") == 0
    assert "recall" in capfd.readouterr().out
    assert command(compare.main, f"a={runs[0]}", f"b={runs[1]}", allowed, "trainer/hardware=cpu") == 0
    assert "a  recall" in capfd.readouterr().out
    told = ["format=torchscript", "trainer/hardware=cpu", "export.max_map_drop=1"]
    assert command(export.main, f"checkpoint={runs[0]}", allowed, *told) == 0
    assert "recall on val: checkpoint" in capfd.readouterr().out
