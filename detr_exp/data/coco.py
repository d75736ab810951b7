"""COCO annotation files: `instances_*.json` with image folders, Roboflow's one file per split, or files by name."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeGuard

import numpy as np

from detr_exp.data.content import SPLITS, Category, Content, Split
from detr_exp.data.files import Folder
from detr_exp.data.picture import read_size
from detr_exp.data.problems import Problems
from detr_exp.data.table import Pictures, Rows, TableSplit

log = logging.getLogger(__name__)

ROBOFLOW = "_annotations.coco.json"
_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
_REFUSED = -1  # a picture that has been complained about; its annotations need no complaint of their own
_NO_PARENT = {"", "none", "null"}


def coco(
    root: str | None,
    places: Mapping[str, Mapping[str, str | None]],
    *,
    extra_roots: Sequence[str] = (),
) -> Content:
    """A COCO-format data set, as a source for `DataSet`.

    Args:
        root: its folder.
        places: per split `annotations` (a JSON file) and `images` (a folder), relative to the root; None: looked for.
        extra_roots: other folders that pictures may lie in.

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
    document = _document(path)
    categories = _categories(document, path)
    held = {"train": document}  # until it is read as a split, so that a large file is parsed only once
    read: dict[str, Callable[[], Split]] = {
        name: partial(_split, folder, name, *place, categories, held)
        for name, place in found.items()
        if place is not None
    }
    return Content("coco", str(path), categories, read)


def find_layout(root: Path) -> list[str]:
    """The training annotation files of this layout that exist below `root`."""
    names = [f"train/{ROBOFLOW}"] if (root / "train" / ROBOFLOW).is_file() else []
    return names + [str(path.relative_to(root)) for path in sorted(root.glob("annotations/instances_train*.json"))]


def _located(folder: Folder, name: str, place: Mapping[str, str | None]) -> tuple[Path, Path | None] | None:
    """(annotation file, image folder or None if it has to be found by its pictures); None if there is no such split."""
    root = folder.root
    given = place.get("images")
    images = root / given if given is not None else None
    if images is not None and not images.is_dir():
        raise ValueError(f"data.{name}.images is {given!r}, but {str(images)!r} is not a folder; give an existing one")
    annotations = place.get("annotations")
    if annotations is not None:
        path = root / annotations
        if complaint := folder.complaint(path):
            raise ValueError(f"data.{name}.annotations: {complaint}; it is taken relative to data.root")
        return path, images
    for part in _FOLDERS[name]:
        if (root / part / ROBOFLOW).is_file():
            return root / part / ROBOFLOW, images or root / part
    files = sorted(root.glob(f"annotations/instances_{name}*.json"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise ValueError(f"annotations/ has {listed}; choose one: data.{name}.annotations=annotations/{files[0].name}")
    return (files[0], images) if files else None


def _document(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        document = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); export the annotations again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}; a COCO file is an object with images, annotations")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise ValueError(f"{path} has no list {key!r}; a COCO file needs images, annotations and categories")
    document["sha256"] = hashlib.sha256(data).hexdigest()
    return document


def _categories(document: Mapping[str, Any], path: Path) -> list[Category]:
    """The categories that stand for objects, in the order of their ids."""
    problems = Problems(str(path))
    found: dict[int, Category] = {}
    names: set[str] = set()
    lengths = _keypoint_lengths(document)
    for entry in document["categories"]:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not _is_int(number) or not isinstance(entry.get("name"), str):
            problems.error(f"category {short(entry)}: needs an integer id and a name")
        elif number in found or entry["name"] in names:
            problems.error(f"category {number} {entry['name']!r}: its id or name occurs twice")
        else:
            found[number] = _category(entry, lengths.get(number, 0), problems)
            names.add(entry["name"])
    problems.report()
    parents = {
        str(entry.get("supercategory"))
        for entry in document["categories"]
        if entry.get("supercategory") != entry["name"]
    }
    used = {a.get("category_id") for a in document["annotations"] if isinstance(a, dict)}
    dropped = [c for c in found.values() if c.name in parents - _NO_PARENT and c.id not in used]
    if dropped and len(dropped) < len(found):
        log.info(
            "%s: dropped %s: only the heading of other categories, no object has it",
            path,
            ", ".join(f"category {c.id} {c.name!r}" for c in dropped),
        )
        for category in dropped:
            del found[category.id]
    return sorted(found.values(), key=lambda category: category.id)


def _category(entry: Mapping[str, Any], annotated: int, problems: Problems) -> Category:
    """`annotated`: keypoints that its annotations have; used where the category itself names none."""
    names = entry.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.error(f"category {entry['id']} {entry['name']!r}: its keypoints are not a list of names")
        names = []
    names = names or [str(k) for k in range(annotated)]
    lines = entry.get("skeleton") or []
    sound = isinstance(lines, list) and all(
        isinstance(line, list) and len(line) == 2 and all(_is_int(k) and 1 <= k <= len(names) for k in line)
        for line in lines
    )
    if not sound:
        problems.warn("skeletons that do not fit their keypoints are not drawn", f"category {entry['id']}")
        lines = []
    return Category(entry["id"], entry["name"], list(names), [(a - 1, b - 1) for a, b in lines])


def _keypoint_lengths(document: Mapping[str, Any]) -> dict[int, int]:
    lengths: dict[int, int] = {}
    for annotation in document["annotations"]:
        points = annotation.get("keypoints") if isinstance(annotation, dict) else None
        if isinstance(points, list) and len(points) % 3 == 0:
            category = annotation.get("category_id")
            lengths[category] = max(lengths.get(category, 0), len(points) // 3)
    return lengths


def _split(
    folder: Folder,
    name: str,
    path: Path,
    images: Path | None,
    categories: list[Category],
    held: dict[str, dict[str, Any]],
) -> TableSplit:
    document = held.pop(name, None) or _document(path)
    problems = Problems(str(path))
    pictures, index_of = _pictures(folder, name, path, images, document, problems)
    rows = _rows(document, index_of, categories, _renamed(document, categories, problems), problems)
    split = TableSplit(pictures, rows, categories, document["sha256"], problems)
    problems.report()
    if not len(split):
        raise ValueError(f"{path} lists no images; a {name} split needs at least one")
    return split


def _pictures(
    folder: Folder, name: str, path: Path, images: Path | None, document: Mapping[str, Any], problems: Problems
) -> tuple[Pictures, dict[int, int]]:
    images = images or _image_folder(folder, name, path, document)
    pictures, index_of = Pictures(), {}
    for entry in document["images"]:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not _is_int(number) or not isinstance(entry.get("file_name"), str):
            problems.error(f"image {short(entry)}: needs an integer id and a file_name")
            continue
        if number in index_of:
            problems.error(f"image {number}: its id occurs twice")
            continue
        file = images / entry["file_name"]
        index_of[number] = _REFUSED
        if complaint := folder.complaint(file):
            problems.error(f"image {number}: {complaint}")
            continue
        height, width = entry.get("height"), entry.get("width")
        if height is None or width is None:
            try:
                height, width = read_size(file)
            except ValueError as error:
                problems.error(f"image {number}: {error}")
                continue
        if not (_is_number(height) and _is_number(width) and height >= 1 and width >= 1):
            problems.error(f"image {number} {entry['file_name']!r}: its size is {short(width)} x {short(height)}")
            continue
        index_of[number] = len(pictures.ids)
        pictures.ids.append(number)
        pictures.paths.append(file)
        pictures.sizes.append((int(height), int(width)))
    return pictures, index_of


def _image_folder(folder: Folder, name: str, path: Path, document: Mapping[str, Any]) -> Path:
    """The first likely folder that has the first picture."""
    first = next((e["file_name"] for e in document["images"] if isinstance(e, dict) and "file_name" in e), "")
    stem = path.stem.rsplit("_", 1)[-1]  # instances_train2017 -> train2017
    tried = [path.parent]
    for part in dict.fromkeys((stem, *_FOLDERS[name])):
        tried += [folder.root / part, folder.root / "images" / part]
    tried += [folder.root / "images", folder.root]
    for candidate in tried:
        if first and (candidate / first).is_file():
            return candidate
    if not first:
        return path.parent
    where = ", ".join(dict.fromkeys(str(candidate) for candidate in tried))
    raise ValueError(
        f"{path}: its first picture {first!r} is in none of {where}; name the folder: data.{name}.images=..."
    )


def _renamed(document: Mapping[str, Any], categories: list[Category], problems: Problems) -> dict[int, int]:
    """This file's category ids to the training file's: equal where id and name agree, else by name."""
    by_id = {category.id: category.name for category in categories}
    by_name = {category.name: category.id for category in categories}
    renamed: dict[int, int] = {}
    for entry in document["categories"]:
        number, name = entry.get("id"), entry.get("name")
        if by_id.get(number) == name:
            renamed[number] = number
        elif name in by_name:
            renamed[number] = by_name[name]
            problems.warn("categories have other ids than in training and were mapped by name", f"{name!r} {number}")
    return renamed


def _rows(
    document: Mapping[str, Any],
    index_of: Mapping[int, int],
    categories: list[Category],
    renamed: Mapping[int, int],
    problems: Problems,
) -> Rows:
    rows = Rows()
    counts = {category.id: len(category.keypoints) for category in categories}
    for place, entry in enumerate(document["annotations"]):
        if not isinstance(entry, dict):
            problems.error(f"annotation number {place + 1} is a {type(entry).__name__}")
            continue
        where = f"annotation {entry.get('id', f'number {place + 1}')}"
        picture, category = _at(index_of, entry.get("image_id")), _at(renamed, entry.get("category_id"))
        if picture == _REFUSED:
            continue
        if picture is None:
            problems.error(f"{where}: there is no image {entry.get('image_id')!r}")
            continue
        if category is None:
            known = ", ".join(f"{c.id} {c.name!r}" for c in categories[:12])
            problems.error(
                f"{where}: category {entry.get('category_id')!r} is not one of the training file's ({known})"
            )
            continue
        box = entry.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(v, finite=False) for v in box)):
            problems.error(f"{where}: its bbox is {short(box)}; four numbers x, y, width, height are needed")
            continue
        x, y, width, height = box
        rows.where.append(where)
        rows.picture.append(picture)
        rows.category.append(category)
        rows.box_xywh.append((x, y, width, height))
        rows.crowd.append(bool(entry.get("iscrowd", 0)))
        rows.area.append(entry["area"] if _is_number(entry.get("area")) else None)
        rows.segments.append(_segments(entry.get("segmentation"), where, problems))
        rows.keypoints.append(_points(entry.get("keypoints"), counts[category], where, problems))
    return rows


def _segments(given: Any, where: str, problems: Problems) -> Any:
    """Polygons of at least three points, an RLE dict, or None."""
    if isinstance(given, dict):
        size, counts = given.get("size"), given.get("counts")
        sized = isinstance(size, list) and len(size) == 2 and all(_is_int(v) and v > 0 for v in size)
        runs = isinstance(counts, list) and all(_is_int(v) and v >= 0 for v in counts)
        if sized and (isinstance(counts, str) or (runs and sum(counts or ()) == math.prod(size or ()))):
            return {"size": size, "counts": counts}
    elif isinstance(given, list):
        polygons = [_polygon(part) for part in given]
        if None not in polygons:
            kept = [polygon for polygon in polygons if polygon and len(polygon) >= 6 and len(polygon) % 2 == 0]
            if kept or not given:
                return kept or None
    elif given is None:
        return None
    problems.warn("segmentations that cannot be used were replaced by their box", where)
    return None


def _polygon(given: Any) -> list[float] | None:
    """Its coordinates, all finite; None if it is anything else. NumPy reads COCO's millions faster than a loop."""
    try:
        values = np.array(given, np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return values.tolist() if values.ndim == 1 and np.isfinite(values).all() else None


def _points(given: Any, count: int, where: str, problems: Problems) -> list[float] | None:
    if given is None or given == []:
        return None
    if not isinstance(given, list) or not all(_is_number(v) for v in given) or len(given) % 3:
        problems.error(f"{where}: its keypoints are not finite numbers x, y, visibility")
        return None
    if len(given) != 3 * count:
        problems.error(f"{where}: it has {len(given) // 3} keypoints, its category {count}")
        return None
    return given


def _at(table: Mapping[int, int], key: Any) -> int | None:
    return table.get(key) if _is_int(key) else None


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_number(value: Any, finite: bool = True) -> TypeGuard[float]:
    return _is_int(value) or (isinstance(value, float) and (not finite or math.isfinite(value)))
