"""COCO annotation files: `instances_*.json` with image folders, Roboflow's one file per split, or files by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detr_exp.data import index
from detr_exp.data.coco_categories import read_categories, renamed
from detr_exp.data.coco_rows import REFUSED, Annotations, related
from detr_exp.data.content import SPLITS, Category, Content, Split
from detr_exp.data.fields import is_int, is_number
from detr_exp.data.files import Folder
from detr_exp.data.json_stream import read_json
from detr_exp.data.pixels import MAX_PIXELS
from detr_exp.data.problems import Problems, short
from detr_exp.data.rows import Images, tabulated
from detr_exp.data.seen import Stamp, stamp_of
from detr_exp.data.table import TableSplit

ROBOFLOW = "_annotations.coco.json"
_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
_FIELDS = ("id", "file_name", "height", "width")


def coco(
    root: str | None,
    places: Mapping[str, Mapping[str, str | None]],
    *,
    extra_roots: Sequence[str] = (),
    on_error: str = "error",
) -> Content:
    """A COCO-format data set, as a source for `DataSet`.

    Args:
        root: its folder.
        places: per split `annotations` (a JSON file) and `images` (a folder), relative to the root; None: searched.
        extra_roots: further folders that may contain images.
        on_error: `error`, or `skip` for images that are missing or have no readable header.

    Raises:
        ValueError: no training annotations, or a file that cannot be used.
    """
    folder = Folder(root, extra_roots)
    found = {name: _located(folder, name, places.get(name) or {}) for name in SPLITS}
    if found["train"] is None:
        raise ValueError(
            f"data.root is {str(root)!r}, but there is no train/{ROBOFLOW} and no annotations/instances_train*.json "
            f"(found: {folder.names()}); name the file: data.train.annotations=... data.train.images=..."
        )
    path = found["train"][0]
    held: dict[str, _Document] = {}  # kept until the split is read, so that a large file is parsed only once
    problems = Problems(str(path))

    def read_classes() -> tuple[list[Category], int]:
        held["train"] = document = _Document.read(folder, path)
        return read_categories(document.categories, document.annotations, problems), len(document.images)

    categories = index.categories(folder, {"layout": "coco"}, problems, read_classes)
    read: dict[str, Callable[[], Split]] = {
        name: partial(_split, folder, name, *place, categories, held, on_error)
        for name, place in found.items()
        if place is not None
    }
    return Content("coco", str(path), categories, read)


def find_layout(root: Path) -> list[str]:
    """The training annotation files of this layout that exist below `root`."""
    names = [f"train/{ROBOFLOW}"] if (root / "train" / ROBOFLOW).is_file() else []
    return names + [str(path.relative_to(root)) for path in sorted(root.glob("annotations/instances_train*.json"))]


def _located(folder: Folder, name: str, place: Mapping[str, str | None]) -> tuple[Path, Path | None] | None:
    """(annotation file, image folder or None if it has to be searched); None if there is no such split."""
    if unknown := sorted(place.keys() - {"annotations", "images"}):
        raise ValueError(
            f"data.{name} has {', '.join(unknown)}, but a split has annotations, a file, and images, a folder: "
            f"data.{name}.annotations=... data.{name}.images=..."
        )
    root = folder.root
    given = place.get("images")
    images = root / given if given is not None else None
    if images is not None and not os.path.isdir(images):
        raise ValueError(f"data.{name}.images is {given!r}, but {str(images)!r} is not a folder; give an existing one")
    annotations = place.get("annotations")
    if annotations is not None:
        path = root / annotations
        if complaint := folder.complaint(path):
            raise ValueError(f"data.{name}.annotations: {complaint}; it is taken relative to data.root")
        return path, images
    parts = [root / part for part in _FOLDERS[name] if (root / part / ROBOFLOW).is_file()]
    if len(parts) > 1:
        raise ValueError(
            f"there are {' and '.join(str(part / ROBOFLOW) for part in parts)}; choose one: "
            f"data=coco data.{name}.annotations={parts[0].name}/{ROBOFLOW}"
        )
    if parts:
        return parts[0] / ROBOFLOW, images or parts[0]
    files = sorted(root.glob(f"annotations/instances_{name}*.json"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise ValueError(f"annotations/ has {listed}; choose one: data.{name}.annotations=annotations/{files[0].name}")
    return (files[0], images) if files else None


@dataclass
class _Document:
    """What is used of a file.

    Attributes:
        images: its list, of entries without fault only their fields that are used.
        annotations: its list.
        categories: its list.
        sha256: of the file, in hex.
        stamp: of the file, from before it was read.
    """

    images: list[Any] = field(default_factory=list)
    annotations: Annotations = field(default_factory=Annotations)
    categories: list[Any] = field(default_factory=list)
    sha256: str = ""
    stamp: Stamp = (0, 0, 0)
    target: str = ""

    @classmethod
    def read(cls, folder: Folder, path: Path) -> _Document:
        found = cls(stamp=stamp_of(path), target=os.path.realpath(path))
        places = {"images": lambda some: found.images.extend(map(_slim, some)), "annotations": found.annotations.add}
        try:
            rest, found.sha256 = read_json(path, places)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not readable JSON ({error}); export the annotations again") from error
        for key in ("images", "annotations", "categories"):
            if not isinstance(rest.get(key), list):
                raise ValueError(f"{path} has no list {key!r}; a COCO file needs images, annotations and categories")
        found.categories = rest["categories"]
        found.is_seen(folder, path)
        return found

    def is_seen(self, folder: Folder, path: Path) -> None:
        folder.seen.contents[str(path)] = self.stamp, self.sha256
        folder.seen.targets[str(path)] = self.target  # another file may have its size and times


def _slim(entry: object) -> object:
    sound = isinstance(entry, dict) and is_int(entry.get("id")) and isinstance(entry.get("file_name"), str)
    return {key: entry.get(key) for key in _FIELDS} if sound else entry  # type: ignore[attr-defined]


def _split(
    folder: Folder,
    name: str,
    path: Path,
    image_folder: Path | None,
    categories: list[Category],
    held: dict[str, _Document],
    on_error: str,
) -> TableSplit:
    problems = Problems(str(path), on_error)

    def read() -> TableSplit:
        document = held.pop(name, None) or _Document.read(folder, path)
        document.is_seen(folder, path)
        images, index_of = _images(folder, name, path, image_folder, document.images, problems)
        names = renamed(document.categories, document.annotations.used, categories, problems)
        sizes = np.array(images.sizes, np.int64).reshape(-1, 2)
        rows = related(document.annotations, index_of, sizes, categories, names, problems)
        return tabulated(images, rows, categories, document.sha256, problems)

    key = {"layout": "coco", "split": name, "images": image_folder and str(image_folder)}
    split = index.split(folder, key, problems, categories, read)
    if not len(split):
        raise ValueError(f"{path} lists no images; a {name} split needs at least one")
    return split


def _images(
    folder: Folder, name: str, path: Path, image_folder: Path | None, entries: Sequence[Any], problems: Problems
) -> tuple[Images, dict[int, int]]:
    image_folder = image_folder or _image_folder(folder, name, path, entries)
    images, index_of = Images(), {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_int(number) or not isinstance(entry.get("file_name"), str):
            problems.error("images need an integer id and a file_name", f"image {short(entry)}")
            continue
        if number in index_of:
            problems.error("images need ids of their own", f"image {number}: its id occurs twice")
            continue
        file = str(image_folder / entry["file_name"])
        index_of[number] = REFUSED
        if complaint := folder.complaint(file):
            problems.image(f"image {number}: {complaint}")
            continue
        height, width = entry.get("height"), entry.get("width")
        if height is None or width is None:
            try:
                height, width = folder.size(Path(file))
            except ValueError as error:
                problems.image(f"image {number}: {error}")
                continue
        sound = all(is_number(side) and side == int(side) >= 1 for side in (height, width))
        if not sound or height * width > MAX_PIXELS:
            kind = f"sizes of images are whole numbers from 1 on, and at most {MAX_PIXELS // 10**6} megapixels"
            case = f"image {number} {entry['file_name']!r}: its size is {short(width)} x {short(height)}"
            problems.error(kind, case)
            continue
        index_of[number] = len(images.ids)
        images.ids.append(number)
        images.paths.append(file)
        images.sizes.append((int(height), int(width)))
    return images, index_of


def _image_folder(folder: Folder, name: str, path: Path, entries: Sequence[Any]) -> Path:
    """The first likely folder that has the first image."""
    names = (entry.get("file_name") for entry in entries if isinstance(entry, dict))
    first = next((name for name in names if isinstance(name, str)), "")
    stem = path.stem.rsplit("_", 1)[-1]  # instances_train2017 -> train2017
    tried = [path.parent]
    for part in dict.fromkeys((stem, *_FOLDERS[name])):
        tried += [folder.root / part, folder.root / "images" / part]
    tried += [folder.root / "images", folder.root]
    for candidate in tried:
        if first and folder.is_file(candidate / first):
            return candidate
    if not first:
        return path.parent
    where = ", ".join(dict.fromkeys(str(candidate) for candidate in tried))
    raise ValueError(
        f"{path}: its first image {first!r:.200} is in none of {where}; name the folder: data.{name}.images=..."
    )
