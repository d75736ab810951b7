"""Realistic sets of keypoints: any number, several categories, with and without sides: each trains a step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp import train

SMALL = [
    "model=rfdetr_keypoint_tiny",
    "model.image_size=[64,64]",
    "model.num_layers=1",
    "model.num_queries=4",
    "model.num_groups=1",
    "model.hidden_dim=32",
    "data=auto",
    "data.num_workers=0",
    "data/augment=deim",
    "tracker=none",
    "trainer/hardware=cpu",
    "trainer.hardware.amp=null",
    "trainer.batch_size=2",
    "trainer.max_steps=1",
]


def names(count: int, sided: bool = True) -> list[str]:
    """As many as wanted, in pairs of left and right where they are sided."""
    return [f"{('left', 'right')[k % 2]} {k // 2}" if sided else f"corner {k}" for k in range(count)]


def write(root: Path, categories: list[list[str]]) -> Path:
    """Two images a split, an object of every category in each, points on a circle in its box."""
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(2):
            Image.effect_noise((80, 60), 50).save(root / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 60})
            for category, points in enumerate(categories):
                x, y, w, h = [*rng.uniform(2, 20, 2), *rng.uniform(20, 35, 2)]
                angles = [2 * math.pi * k / max(len(points), 1) for k in range(len(points))]
                circle = [(x + w / 2 * (1 + math.cos(a)), y + h / 2 * (1 + math.sin(a)), 2) for a in angles]
                annotation = {"id": len(annotations), "image_id": i, "category_id": category, "bbox": [x, y, w, h]}
                annotations.append(annotation | {"keypoints": [v for point in circle for v in point]})
        entries = [{"id": i, "name": f"thing {i}", "keypoints": points} for i, points in enumerate(categories)]
        content = {"images": images, "annotations": annotations, "categories": entries}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    "categories",
    [
        [names(9)],
        pytest.param([names(14)], marks=pytest.mark.slow),
        [names(17)],
        pytest.param([names(32)], marks=pytest.mark.slow),
        [names(5), [], names(8)],
        pytest.param([names(6, sided=False)], marks=pytest.mark.slow),
    ],
    ids=["9", "14", "17", "32", "5 and none and 8", "6 without sides"],
)
def test_it_trains_a_step_and_is_evaluated(categories: list, command: Callable, tmp_path: Path, capfd) -> None:
    root = write(tmp_path / "set", categories)
    assert command(train.main, f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}", *SMALL) == 0, (
        capfd.readouterr()
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {name: value for line in lines for name, value in line.items()}
    assert 0 <= measured["val/keypoint_mAP"] <= 1
    assert math.isfinite(measured["train/loss_keypoint_l1"])
    sides = all("left" in points[0] for points in categories if points)
    assert ("so images are not mirrored" not in capfd.readouterr().err) is sides
