"""A source that is no list of paths: images and objects out of one SQLite file, with a field of its own."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detr_exp.data.content import Category, Content, Objects

SCHEMA = """
CREATE TABLE class (id INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE image (id INTEGER PRIMARY KEY, split TEXT, height INTEGER, width INTEGER, rgb BLOB);
CREATE TABLE object (image INTEGER, class INTEGER, x0 REAL, y0 REAL, x1 REAL, y1 REAL, sharpness REAL);
"""


def database(root: str | None, places: Mapping[str, Any]) -> Content:
    """`data.root` is the file.

    Raises:
        ValueError: there is none.
    """
    if root is None or not Path(root).is_file():
        raise ValueError(f"data.root is {root}, but no database is there: data.root=scenes.sqlite")
    categories = [Category(number, name) for number, name in rows(root, "SELECT id, name FROM class ORDER BY id")]
    splits = [name for (name,) in rows(root, "SELECT DISTINCT split FROM image")]
    return Content("SQLite", root, categories, {name: partial(Scenes, root, name, categories) for name in splits})


class Scenes:
    """The members of `data.content.Split`. Every look into the file opens it: loader workers share no connection."""

    has_masks = has_keypoints = False

    def __init__(self, path: str, split: str, categories: list[Category]) -> None:
        self.path, self.categories = path, categories
        found = rows(path, "SELECT id, height, width FROM image WHERE split = ? ORDER BY id", split)
        self.image_ids: Sequence[int] = [number for number, _, _ in found]
        self.sizes = [(height, width) for _, height, width in found]
        self.most_objects = max(len(self.objects(index)) for index in range(len(self)))
        self.fingerprint = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        return f"{self.path}: image {self.image_ids[index]}"

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def objects(self, index: int) -> Objects:
        asked = "SELECT class, x0, y0, x1, y1, sharpness FROM object WHERE image = ? ORDER BY rowid"
        table = np.array(rows(self.path, asked, self.image_ids[index]), np.float64).reshape(-1, 6)
        sharpness = table[:, 5].astype(np.float32)
        return Objects(table[:, 0].astype(np.int64), table[:, 1:5], extra={"sharpness": sharpness})

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        ((rgb,),) = rows(self.path, "SELECT rgb FROM image WHERE id = ?", self.image_ids[index])
        return np.frombuffer(rgb, np.uint8).reshape(*self.size(index), 3)

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        return self.image(index), self.objects(index)

    def truth(self) -> dict[str, Any]:
        images, annotations = [], []
        for index, number in enumerate(self.image_ids):
            height, width = self.size(index)
            images.append({"id": number, "file_name": self.name(index), "height": height, "width": width})
            objects = self.objects(index)
            for category, (x0, y0, x1, y1) in zip(objects.categories.tolist(), objects.boxes_xyxy.tolist()):
                box, area = [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)
                one = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                annotations.append({**one, "bbox": box, "area": area})
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


def rows(path: str, asked: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(path)) as file:
        return file.execute(asked, values).fetchall()
