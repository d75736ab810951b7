"""Figures of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from detr_exp import build
from detr_exp.data.content import Objects
from detr_exp.trainer.diagnosis.curves import draw_curves, draw_labels
from detr_exp.trainer.results import Results


def test_curves_of_a_run_without_evaluations(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for epoch in (1, 2):
        results.add({"epoch": epoch, "step": epoch, "train/loss": 2.0 / epoch, "train/loss_class": 1.0})
    draw_curves(tmp_path / "curves.png", results)
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_the_metrics_of_every_task_and_kind_of_weights_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, *values, label, marker: drawn.append(label))
    results = Results(tmp_path)
    terms = ("train/loss", "train/loss_bbox", "train/loss_bbox_aux_0", "train/loss_bbox_enc", "train/loss_bbox_dn_1")
    names = ("val/mAP", "val/segm_mAP50", "val/ema_mAP75", "val/mAP_small", "val/mAR", "val/loss", "train/grad_norm")
    results.add({"epoch": 1, "step": 1, **dict.fromkeys((*terms, *names), 0.5)})
    draw_curves(tmp_path / "curves.png", results)
    assert drawn == [
        *("train/loss", "val/loss", "loss_bbox", "val/mAP", "val/segm_mAP50", "val/ema_mAP75"),
    ]


def test_labels_of_synthetic_data(tmp_path: Path) -> None:
    data = build.data(build.compose(["model=rtdetrv2_tiny", "data=shapes", "data.source.size=64", "data.train=6"]))
    draw_labels(tmp_path / "charts" / "labels.png", data)
    assert Image.open(tmp_path / "charts" / "labels.png").height > 600


@pytest.mark.parametrize("objects", [0, 1])
def test_labels_of_an_image_without_objects_and_of_one_class(tmp_path: Path, objects: int) -> None:
    boxes = np.array([[1.0, 2, 30, 40]])[:objects]
    found = Objects(np.ones(objects, np.int64), boxes)

    class One:
        image_ids = (7,)

        def __len__(self) -> int:
            return 1

        def size(self, index: int) -> tuple[int, int]:
            return 50, 60

        def objects(self, index: int) -> Objects:
            return found

    data = SimpleNamespace(split=lambda name: One(), classes=["$x_y$" * 20], category_ids=[1])
    draw_labels(tmp_path / "labels.png", data)  # type: ignore[arg-type]
    assert (tmp_path / "labels.png").stat().st_size > 10_000
