"""Rows of YOLO text files: boxes, polygons, or boxes with keypoints, relative to their image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from detr_exp.data.content import Category
from detr_exp.data.files import decoded
from detr_exp.data.problems import Problems, short
from detr_exp.data.rows import Rows

_MARGIN = 0.01  # coordinates may leave 0..1 by rounding; the box is clipped
Box = tuple[float, float, float, float]  # x, y, width, height in pixels
_FEW = 3  # polygons that could be a box and points by chance


@dataclass
class RowReader:
    """Reads the rows of one split.

    Attributes:
        categories: of the data set.
        shape: (keypoints, 2 or 3 numbers each) of a row; None: rows are boxes and polygons.
        polygons: where a polygon was read, its numbers.
    """

    categories: list[Category]
    shape: tuple[int, int] | None
    polygons: list[tuple[str, list[float]]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What a row has to be, for messages."""
        if self.shape is not None:
            count, channels = self.shape
            return f"rows are class x y width height and {count} keypoints of {channels} numbers, relative to the image"
        return "rows are class x y width height, or class and a polygon, relative to the image"

    def read(self, text: bytes, file: Path, image: int, size: tuple[int, int], found: Rows, problems: Problems) -> None:
        """Add the rows of one file to `found`, or say in `problems` what is wrong with them."""
        try:
            lines = decoded(text, file).splitlines()
        except ValueError as error:
            problems.error("text files that cannot be read", str(error))
            return
        found.files.append(str(file))
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                category, box, polygon, points = self._row(line.split(), size, where)
            except ValueError as error:
                problems.error(self.kind, f"{where}: {error}")
                continue
            found.add(image, category, box, number, outline=polygon, points=points or ())

    def refuse_poses(self, problems: Problems) -> None:
        """Complain where every polygon looks like a box and the keypoints in it, and few like a polygon."""
        lengths = {len(values) for _, values in self.polygons}
        if len(lengths) != 1 or not all(_points_in_box(values, 2) for _, values in self.polygons):
            return
        if 2 * sum(_second_is_far(values) for _, values in self.polygons) < len(self.polygons):
            return
        count = (lengths.pop() - 4) // 2
        where = self.polygons[0][0]
        case = f"{where}: all {len(self.polygons)} polygons are four numbers that make a box around {count} points"
        if len(self.polygons) >= _FEW:
            problems.error(f"rows of a box and keypoints need kpt_shape: [{count}, 2] in the data.yaml", case)
        else:
            problems.warn(f"polygons that may be a box and keypoints; if so, add kpt_shape: [{count}, 2]", case)

    def _row(
        self, words: list[str], size: tuple[int, int], where: str
    ) -> tuple[int, Box, list[list[float]] | None, list[float] | None]:
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
        if len(rest) > 4 and (len(rest) - 4) % 3 == 0 and _points_in_box(rest, 3):
            raise ValueError(
                f"{len(values)} columns that make a box and {(len(rest) - 4) // 3} keypoints with their visibility; "
                f"add kpt_shape: [{(len(rest) - 4) // 3}, 3] to the data.yaml"
            )
        if len(rest) < 6 or len(rest) % 2:
            raise ValueError(f"{len(values)} columns; 5 make a box, an odd number from 7 on makes a polygon")
        _check_range(rest)
        self.polygons.append((where, rest))
        polygon = [v * (height if i % 2 else width) for i, v in enumerate(rest)]
        x, y = min(polygon[::2]), min(polygon[1::2])
        return category, (x, y, max(polygon[::2]) - x, max(polygon[1::2]) - y), [polygon], None


def _points_in_box(values: list[float], channels: int) -> bool:
    """Whether numbers can be a box (centre and sides) and points: with a visibility of 0, 1 or 2 each, some above 0 and
    those in the box, where `channels` is 3; all in the box, or at 0, where it is 2."""
    x, y, w, h = values[:4]
    seen = values[6::3] if channels == 3 else [2.0] * ((len(values) - 4) // 2)
    if not any(seen) or not all(v in (0, 1, 2) for v in seen):
        return False
    points = list(zip(values[4::channels], values[5::channels], seen))
    shown = [(px, py) for px, py, v in points if v and (px, py) != (0, 0)]
    return bool(shown) and all(abs(px - x) <= w / 2 + _MARGIN and abs(py - y) <= h / 2 + _MARGIN for px, py in shown)


def _second_is_far(values: list[float]) -> bool:
    """Whether the second vertex of a polygon lies away from all others, as the sides of a box would."""
    for axis in (0, 1):
        others = [values[axis], *values[4 + axis :: 2]]
        reach = max(others) - min(others) + _MARGIN
        if not min(others) - reach <= values[2 + axis] <= max(others) + reach:
            return True
    return False


def _box(values: list[float], size: tuple[int, int]) -> Box:
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
            raise ValueError(f"{value:g} is outside 0..1; coordinates are relative to the image, not pixels")
