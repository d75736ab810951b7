"""Small data sets on disk, and the members of a network that a loader needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_exp.data.augment import Augment
from detr_exp.data.coco import coco
from detr_exp.data.dataset import DataSet

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 3, "name": "ball"}]
NONE = {"annotations": None, "images": None}


def write_image(path: Path, size: tuple[int, int] = (40, 60), seed: int = 0) -> Path:
    """A random image of (height, width) on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def document(**changes: Any) -> dict[str, Any]:
    """Two images of 60 x 40, one of them without objects."""
    return {
        "images": [
            {"id": 11, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 12, "file_name": "b.png", "width": 60, "height": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 7, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 0},
            {"id": 2, "image_id": 11, "category_id": 3, "bbox": [50, 30, 20, 20], "iscrowd": 0},
        ],
        "categories": CATEGORIES,
        **changes,
    }


@pytest.fixture
def roboflow(tmp_path: Path) -> Callable[..., Path]:
    """Writes a Roboflow-style data set: one document per split, the images beside it."""

    def write(**documents: Any) -> Path:
        for split, content in documents.items():
            for i, name in enumerate(("a.png", "b.png")):
                write_image(tmp_path / split / name, seed=i)
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / split / "_annotations.coco.json").write_text(text)
        return tmp_path

    return write


def read(root: Path, split: str = "train", **places: Any) -> Any:
    """One split of a COCO-format folder."""
    return coco(str(root), {"train": NONE, "val": NONE, "test": NONE, **places}).read[split]()


def data_set(root: Path, source: Any = coco, **settings: Any) -> DataSet:
    places = {} if source is not coco else {"train": NONE, "val": NONE, "test": NONE}
    return DataSet(
        **{"source": source, "root": str(root), "augment": Augment(), "num_workers": 0, **places, **settings}
    )


@pytest.fixture
def network() -> SimpleNamespace:
    return SimpleNamespace(image_size=(64, 96), stride=32, tasks=("boxes",))
