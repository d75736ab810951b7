"""A small set of images with one square each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from detr_exp.contest.job import ANNOTATIONS

BOX = [8, 6, 12, 12]


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Ten images, six to train on (black) and four others (blue), whose ids are the same in both splits."""
    for split, count in (("train", 6), ("valid", 4)):
        folder = tmp_path / "squares" / split
        folder.mkdir(parents=True)
        images, objects = [], []
        for number in range(count):
            Image.new("RGB", (40, 30), (number, 0, 0 if split == "train" else 255)).save(folder / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 30})
            box = {"bbox": BOX, "area": 144, "iscrowd": 0}
            objects.append({"id": number, "image_id": number, "category_id": 3, **box})
        content = {"images": images, "annotations": objects, "categories": [{"id": 3, "name": "square"}]}
        (folder / ANNOTATIONS).write_text(json.dumps(content))
    return tmp_path / "squares"
