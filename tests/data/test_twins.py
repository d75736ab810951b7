"""One data set in two layouts gives the same targets, to a thousandth of a pixel."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from detr_exp.data.auto import auto

from .conftest import data_set, write_image

SIZES = [(40, 60), (50, 30), (64, 64), (33, 71)]
NAMES = ["cup", "ball", "pen"]
POINTS = ["left", "right", "top", "foot", "rim"]


def objects(rng: np.random.Generator, size: tuple[int, int]) -> list[dict]:
    """Up to four polygons with keypoints inside their boxes."""
    height, width = size
    found = []
    for _ in range(rng.integers(0, 5)):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        centre, radius = rng.uniform(0.35, 0.65, 2) * (width, height), rng.uniform(4, 0.3 * min(size), 2)
        polygon = (centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)).round(3)
        low, high = polygon.min(0), polygon.max(0)
        points = np.column_stack([rng.uniform(low, high, (5, 2)).round(3), rng.integers(0, 3, 5)])
        points[points[:, 2] == 0] = 0
        found.append(
            {"label": int(rng.integers(3)), "polygon": polygon, "box": (*low, *(high - low)), "points": points}
        )
    return found


def write(root: Path, poses: bool) -> tuple[Path, Path]:
    """The same images and objects in COCO's layout (ids with gaps, from zero) and in YOLO's."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, size in enumerate(SIZES):
        write_image(root / "coco" / "train" / f"{i}.png", size, seed=i)
        write_image(root / "yolo" / "train" / "images" / f"{i}.png", size, seed=i)
        images.append({"id": 10 * i, "file_name": f"{i}.png", "height": size[0], "width": size[1]})
        rows, scale = [], np.array(size[::-1])
        for thing in objects(rng, size):
            x, y, w, h = map(float, thing["box"])
            annotation = {"id": len(annotations), "image_id": 10 * i, "category_id": 4 * thing["label"]}
            annotation |= {"bbox": [x, y, w, h], "segmentation": [thing["polygon"].reshape(-1).tolist()]}
            if poses:
                annotation |= {"keypoints": thing["points"].reshape(-1).tolist()}
                del annotation["segmentation"]
                centre = np.array([x + w / 2, y + h / 2, w, h]) / np.tile(scale, 2)
                points = thing["points"] / np.array([*scale, 1])
                rows.append([thing["label"], *centre, *points.reshape(-1)])
            else:
                rows.append([thing["label"], *(thing["polygon"] / scale).reshape(-1)])
            annotations.append(annotation)
        path = root / "yolo" / "train" / "labels" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(" ".join(f"{value:.9g}" for value in row) + "\n" for row in rows))
    known = {"keypoints": POINTS} if poses else {}
    categories = [{"id": 4 * label, "name": name, **known} for label, name in enumerate(NAMES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco" / "train" / "_annotations.coco.json").write_text(json.dumps(document))
    shape = f"kpt_shape: [5, 3]\nkpt_names: {POINTS}\n" if poses else ""
    (root / "yolo" / "data.yaml").write_text(f"names: {NAMES}\ntrain: train/images\n{shape}")
    assert len(annotations) >= 6
    return root / "coco", root / "yolo"


def compared(root: Path, poses: bool) -> list:
    """Batches of both, which have to be the same."""
    network = SimpleNamespace(image_size=(96, 128), stride=32, tasks=("boxes", "keypoints" if poses else "masks"))
    batches = []
    for folder in write(root, poses):
        data = data_set(folder, auto)
        assert data.classes == NAMES
        batches.append(next(iter(data.loader("train", network=network, batch_size=4, seed=0))))
    one, two = batches
    torch.testing.assert_close(one.images, two.images, atol=0, rtol=0)
    assert one.targets.counts == two.targets.counts
    assert one.targets.labels.tolist() == two.targets.labels.tolist()
    torch.testing.assert_close(one.targets.boxes * 128, two.targets.boxes * 128, atol=1e-3, rtol=0)
    return batches


def test_polygons(tmp_path):
    one, two = compared(tmp_path, poses=False)
    assert one.targets.masks.flatten(1).any(1).all()
    assert (one.targets.masks != two.targets.masks).float().mean() < 1e-4


def test_poses(tmp_path):
    one, two = compared(tmp_path, poses=True)
    assert set(one.targets.keypoints[..., 2].unique().tolist()) == {0, 1, 2}
    scale = torch.tensor([128, 96, 1])
    torch.testing.assert_close(one.targets.keypoints * scale, two.targets.keypoints * scale, atol=1e-3, rtol=0)
