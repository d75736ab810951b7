"""YOLO data sets: a `data.yaml`, folders or lists of pictures, and one text file of rows per picture.

A row is `class x y width height` (centre and sides), `class x0 y0 x1 y1 ...` (a polygon), or, where the YAML has
`kpt_shape`, `class x y width height` and the keypoints; all relative to the picture. A picture without a text file has
no objects.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from detr_exp.data.content import SPLITS, Category, Content, Split
from detr_exp.data.files import Folder, decoded
from detr_exp.data.picture import SUFFIXES, read_size
from detr_exp.data.problems import Problems, short
from detr_exp.data.table import Pictures, Rows, TableSplit

log = logging.getLogger(__name__)

FILES = ("data.yaml", "data.yml")
_KEYS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
_LARGEST_YAML = 2**20
_MOST_KEYPOINTS = 1000
_MARGIN = 0.01  # coordinates may leave 0..1 by rounding; the box is clipped


def yolo(
    root: str | None,
    places: Mapping[str, Any],
    *,
    file: str | None = None,
    extra_roots: Sequence[str] = (),
    on_error: str = "error",
) -> Content:
    """A YOLO-format data set, as a source for `DataSet`.

    Args:
        root: its folder.
        places: not used: the YAML file names the splits.
        file: the YAML file, relative to the root; None: `data.yaml` or `data.yml`.
        extra_roots: other folders that pictures may lie in.
        on_error: `error`, or `skip` for pictures that are not there or have no readable header.

    Raises:
        ValueError: no YAML file, or one that cannot be used.
    """
    folder = Folder(root, extra_roots)
    path = folder.root / file if file else find_file(folder.root)
    if path is None or not path.is_file():
        raise ValueError(
            f"data.root is {str(root)!r}, but there is no {file or 'data.yaml'} (found: {folder.names()}); name the "
            "file: data.source.file=..."
        )
    if complaint := folder.complaint(path):
        raise ValueError(complaint)
    description = _description(path)
    rows = _Rows(categories=_categories(description, path), shape=_keypoint_shape(description, path))
    read: dict[str, Callable[[], Split]] = {}
    for name in SPLITS:
        entry = next((description[key] for key in _KEYS[name] if description.get(key)), None)
        pictures = _entries(folder, path, description, name, entry)
        if pictures is not None:
            read[name] = partial(_split, folder, path, name, pictures, rows, on_error)
        elif entry is not None:
            log.warning("%s: %s is %s, which is not there; there is no %s split", path, name, short(entry), name)
    if "train" not in read:
        raise ValueError(
            f"{path}: no training pictures at {short(description.get('train'))}, nor in train/images (found: "
            f"{folder.names()}); mend the path, it is relative to the file or to its 'path'"
        )
    return Content("yolo", str(path), rows.categories, read)


def find_file(root: Path) -> Path | None:
    """The YAML file of this layout in `root`."""
    return next((root / name for name in FILES if (root / name).is_file()), None)


# ------------------------------------------------------------------------------------------------------ the YAML file


def _description(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_YAML:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a data.yaml is small, list pictures in text files")
    try:
        description = yaml.safe_load(decoded(path.read_bytes(), path))
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds a {type(description).__name__}; it needs keys names, train and val")
    return description


def _categories(description: Mapping[str, Any], path: Path) -> list[Category]:
    names = description.get("names")
    if isinstance(names, dict):
        by_number = {str(key): value for key, value in names.items()}
        if sorted(by_number) != sorted(str(i) for i in range(len(names))):
            raise ValueError(f"{path}: the keys of names are {short(list(names))}; they must be 0 .. {len(names) - 1}")
        names = [by_number[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int)) for name in names):
        raise ValueError(f"{path}: names is {short(names)}; give the class names as a list or as 0: name, 1: name, ...")
    if len({str(name) for name in names}) < len(names):
        raise ValueError(f"{path}: names has a name twice: {short(names)}; each class needs its own")
    if description.get("nc", len(names)) != len(names):
        raise ValueError(f"{path}: nc is {short(description['nc'])}, but there are {len(names)} names; drop nc")
    shape = _keypoint_shape(description, path)
    points = _keypoint_names(description, shape[0], path) if shape else []
    pairs = _flip_pairs(description, shape[0], path) if shape else None
    return [Category(i, str(name), keypoints=list(points), flip_pairs=pairs) for i, name in enumerate(names)]


def _keypoint_shape(description: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    shape = description.get("kpt_shape")
    if shape is None:
        return None
    sound = isinstance(shape, list) and len(shape) == 2 and all(isinstance(v, int) for v in shape)
    if not sound or not 1 <= shape[0] <= _MOST_KEYPOINTS or shape[1] not in (2, 3):
        raise ValueError(
            f"{path}: kpt_shape is {short(shape)}; it is [number of keypoints, 2 or 3], of at most {_MOST_KEYPOINTS}"
        )
    return shape[0], shape[1]


def _keypoint_names(description: Mapping[str, Any], count: int, path: Path) -> list[str]:
    names = description.get("kpt_names")
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if names is None:
        return [str(k) for k in range(count)]
    if not isinstance(names, list) or len(names) != count:
        raise ValueError(f"{path}: kpt_names is {short(names)}; kpt_shape asks for {count} names")
    return [str(name) for name in names]


def _flip_pairs(description: Mapping[str, Any], count: int, path: Path) -> list[tuple[int, int]] | None:
    order = description.get("flip_idx")
    if order is None:
        return None
    sound = isinstance(order, list) and all(isinstance(k, int) for k in order) and sorted(order) == list(range(count))
    if not sound or any(order[order[k]] != k for k in range(count)):
        raise ValueError(f"{path}: flip_idx is {short(order)}; it must exchange pairs of the numbers 0 .. {count - 1}")
    return [(k, other) for k, other in enumerate(order) if k < other]


# --------------------------------------------------------------------------------------------------------- the pictures


def _entries(folder: Folder, path: Path, description: Mapping[str, Any], name: str, entry: Any) -> list[Path] | None:
    """The folders and lists of a split that exist; None if there are none."""
    entries = entry if isinstance(entry, list) else [entry] if entry is not None else []
    if not all(isinstance(item, str) for item in entries):
        raise ValueError(f"{path}: {name} is {short(entry)}; it is a folder, a text file of paths, or a list of them")
    base = path.parent / str(description.get("path") or "")
    found = []
    for item in entries:
        inner = Path(*(part for part in Path(item).parts if part not in ("..", ".", os.sep)))
        candidates = [place for place in (base / item, path.parent / item, folder.root / inner) if place.exists()]
        inside = [place for place in candidates if folder.inside(place)]
        if candidates and not inside:
            raise ValueError(
                f"{path}: {name} is {item!r}, which lies outside data.root ({os.path.realpath(candidates[0])}); allow "
                "its folder with data.source.extra_roots=[...]"
            )
        found += inside[:1]
    usual = ("valid", "val") if name == "val" else (name,)
    if not found:
        found = [folder.root / part / "images" for part in usual if (folder.root / part / "images").is_dir()][:1]
    return found or None


def _listed(folder: Folder, description: Path, entry: Path) -> Iterator[Path]:
    """The pictures of one entry: of a folder and the folders in it, or of a text file."""
    if entry.is_dir():
        start = entry / "images" if (entry / "images").is_dir() else entry
        for place, _, names in os.walk(start):
            yield from (Path(place, name) for name in names if Path(name).suffix.lower() in SUFFIXES)
        return
    if complaint := folder.complaint(entry):
        raise ValueError(f"{description}: {complaint}")
    for line in decoded(entry.read_bytes(), entry).splitlines():
        if line.strip():
            item = Path(line.strip())
            tried = [entry.parent / item, description.parent / item, folder.root / item]
            yield next((place for place in tried if place.exists()), tried[0])


def label_file(picture: Path, root: Path) -> Path:
    """The text file of a picture: the last folder `images` below the root becomes `labels`."""
    try:
        parts = list(picture.parent.relative_to(root).parts)
    except ValueError:
        root, parts = Path(picture.anchor), list(picture.parent.relative_to(picture.anchor).parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return root.joinpath(*parts, picture.stem + ".txt")


def _split(folder: Folder, path: Path, name: str, entries: list[Path], rows: _Rows, on_error: str) -> TableSplit:
    problems = Problems(str(path), on_error)
    pictures, found = Pictures(), Rows()
    digest = hashlib.sha256(repr((rows.categories, rows.shape)).encode())
    for file in sorted({file for entry in entries for file in _listed(folder, path, entry)}):
        if complaint := folder.complaint(file):
            problems.picture(complaint)
            continue
        try:
            size = read_size(file)
        except ValueError as error:
            problems.picture(str(error))
            continue
        labels = label_file(file, folder.root)
        text = b""
        if os.path.lexists(labels):
            if complaint := folder.complaint(labels):
                problems.error("text files that cannot be read", complaint)
                continue
            text = labels.read_bytes()
        index = len(pictures.ids)
        pictures.ids.append(index + 1)
        pictures.paths.append(file)
        pictures.sizes.append(size)
        digest.update(f"{os.path.relpath(file, folder.root)} {size} {len(text)} ".encode() + text)
        rows.read(text, labels, index, size, found, problems)
    split = TableSplit(pictures, found, rows.categories, digest.hexdigest(), problems)
    problems.report()
    if not len(split):
        raise ValueError(f"{path}: no pictures in {', '.join(map(str, entries))}; a {name} split needs at least one")
    return split


# ------------------------------------------------------------------------------------------------------------- the rows


@dataclass
class _Rows:
    """How the rows of a data set are read."""

    categories: list[Category]
    shape: tuple[int, int] | None

    @property
    def kind(self) -> str:
        """What a row has to be, for messages."""
        if self.shape is not None:
            count, channels = self.shape
            return (
                f"rows are class x y width height and {count} keypoints of {channels} numbers, relative to the picture"
            )
        return "rows are class x y width height, or class and a polygon, relative to the picture"

    def read(
        self, text: bytes, file: Path, picture: int, size: tuple[int, int], found: Rows, problems: Problems
    ) -> None:
        """Add the rows of one file to `found`, or say in `problems` what is wrong with them."""
        try:
            lines = decoded(text, file).splitlines()
        except ValueError as error:
            problems.error("text files that cannot be read", str(error))
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                category, box, polygon, points = self._row(line.split(), size)
            except ValueError as error:
                problems.error(self.kind, f"{where}: {error}")
                continue
            found.where.append(where)
            found.picture.append(picture)
            found.category.append(category)
            found.box_xywh.append(box)
            found.crowd.append(False)
            found.area.append(None)
            found.segments.append(polygon)
            found.keypoints.append(points)

    def _row(self, words: list[str], size: tuple[int, int]) -> tuple[int, Any, Any, Any]:
        try:
            values = [float(word) for word in words]
        except ValueError:
            raise ValueError(f"{short(' '.join(words))} has a word that is not a number") from None
        height, width = size
        label = values[0]
        if not label.is_integer() or not 0 <= label < len(self.categories):
            raise ValueError(f"class {words[0]} is not one of 0 .. {len(self.categories) - 1}")
        category, rest = int(label), values[1:]
        if self.shape is not None:
            count, channels = self.shape
            if len(rest) != 4 + count * channels:
                raise ValueError(
                    f"{len(values)} columns, but kpt_shape {list(self.shape)} asks for {5 + count * channels}"
                )
            points = _points(rest[4:], channels, size)
            return category, _box(rest[:4], size), None, points
        if len(rest) == 4:
            return category, _box(rest, size), None, None
        if len(rest) < 6 or len(rest) % 2:
            raise ValueError(f"{len(values)} columns; 5 make a box, an odd number from 7 on makes a polygon")
        _check_range(rest)
        polygon = [v * (height if i % 2 else width) for i, v in enumerate(rest)]
        x, y = min(polygon[::2]), min(polygon[1::2])
        return category, (x, y, max(polygon[::2]) - x, max(polygon[1::2]) - y), [polygon], None


def _box(values: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    _check_range(values)
    height, width = size
    x, y, w, h = values
    return (x - w / 2) * width, (y - h / 2) * height, w * width, h * height


def _points(values: list[float], channels: int, size: tuple[int, int]) -> list[float]:
    height, width = size
    points: list[float] = []
    for first in range(0, len(values), channels):
        x, y = values[first : first + 2]
        seen = values[first + 2] if channels == 3 else (2.0 if x > 0 or y > 0 else 0.0)
        if seen not in (0, 1, 2):
            raise ValueError(f"visibility {seen:g} of keypoint {first // channels}; it is 0, 1 or 2")
        if seen:
            _check_range([x, y])
        points += [min(max(x, 0), 1) * width, min(max(y, 0), 1) * height, seen] if seen else [0.0, 0.0, 0.0]
    return points


def _check_range(values: list[float]) -> None:
    for value in values:
        if not (math.isfinite(value) and -_MARGIN <= value <= 1 + _MARGIN):
            raise ValueError(f"{value:g} is outside 0..1; coordinates are relative to the picture, not pixels")
