"""Synthetic shapes: a data set that is generated on the fly, six classes with boxes, masks and keypoints.

An image is a pure function of (seed, split, index): a textured background with clutter, and 1-8 shapes (one image in
twenty has none) of 8-35 % of its side, rotated, stretched, textured, partly occluding each other. Colours and textures
do not depend on the class. Every shape is mirror-symmetric about its own axis and not along it, so every keypoint can
be identified, and left distinguished from right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from detr_exp.data.content import SPLITS, Category, Content, Objects
from detr_exp.values import Values

VERSION = 1  # increases when the same seed gives other images
EMPTY = 0.05
MAX_OBJECTS = 8
SIDE = (0.08, 0.35)
LEAST_VISIBLE = 0.35
_SUPERSAMPLE = 3


@dataclass
class _Shape:
    """A shape in the square -1..1, y downwards, pointing up; keypoint 0 and 3 lie on its axis, (1, 2) and (4, 5) mirror
    each other."""

    name: str
    outline: np.ndarray
    keypoints: np.ndarray
    names: list[str]


def _mirrored(right: list[tuple[float, float]]) -> np.ndarray:
    """A closed outline from its right half, listed from top to bottom."""
    left = [(-x, y) for x, y in reversed(right) if x > 0]
    return np.array(right + left, np.float64)


def _crescent() -> np.ndarray:
    outer, inner = np.radians(np.linspace(-35, 215, 22)), np.radians(np.linspace(205, -25, 18))
    arc = np.stack([np.cos(outer), np.sin(outer)], 1)
    bite = np.stack([0.78 * np.cos(inner), 0.78 * np.sin(inner) - 0.32], 1)
    return np.concatenate([arc, bite])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 16, (y - 2.6) / 14.5], 1)


_FIGURE = _mirrored(
    [
        *((0, -1), (0.22, -0.92), (0.28, -0.72), (0.18, -0.52)),
        *((0.9, -0.45), (0.9, -0.2), (0.28, -0.15)),
        *((0.3, 0.2), (0.62, 1), (0.3, 1), (0, 0.35)),
    ]
)
SHAPES = (
    _Shape(
        "arrow",
        _mirrored([(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1)]),
        np.array([(0, -1), (-0.8, -0.1), (0.8, -0.1), (0, 1)]),
        ["tip", "left_barb", "right_barb", "tail"],
    ),
    _Shape(
        "kite",
        _mirrored([(0, -1), (0.75, -0.35), (0, 1)]),
        np.array([(0, -1), (-0.75, -0.35), (0.75, -0.35), (0, 1)]),
        ["top", "left_corner", "right_corner", "bottom"],
    ),
    _Shape(
        "house",
        _mirrored([(0, -1), (0.95, -0.15), (0.7, -0.15), (0.7, 0.9), (0.2, 0.9), (0.2, 0.35), (0, 0.35)]),
        np.array([(0, -1), (-0.95, -0.15), (0.95, -0.15), (0, 0.35), (-0.7, 0.9), (0.7, 0.9)]),
        ["roof", "left_eave", "right_eave", "door", "left_base", "right_base"],
    ),
    _Shape(
        "heart",
        _heart(),
        np.array([(0, -0.52), (-0.6, -0.95), (0.6, -0.95), (0, 0.99)]),
        ["notch", "left_lobe", "right_lobe", "tip"],
    ),
    _Shape(
        "crescent",
        _crescent(),
        np.array([(0, 1), (-0.82, -0.57), (0.82, -0.57)]),
        ["belly", "left_horn", "right_horn"],
    ),
    _Shape(
        "figure",
        _FIGURE,
        np.array([(0, -1), (-0.9, -0.33), (0.9, -0.33), (0, 0.35), (-0.46, 1), (0.46, 1)]),
        ["head", "left_hand", "right_hand", "hip", "left_foot", "right_foot"],
    ),
)
FLIP_PAIRS = [(1, 2), (4, 5)]
MOST_KEYPOINTS = max(len(shape.names) for shape in SHAPES)


def shapes(root: None, places: Mapping[str, int], *, size: int, seed: int) -> Content:
    """Synthetic shapes, as a source for `DataSet`.

    Args:
        root: has to be None.
        places: number of images per split; a split with 0 or None does not exist.
        size: side of the square images, in pixels.
        seed: of the images; the seed of the run does not change them.

    Raises:
        ValueError: `size` is too small, or there is no training split.
    """
    if root is not None:
        raise ValueError(f"data.root is {root!r}, but shapes are generated, not read; drop data.root or use data=auto")
    if size < 64:
        raise ValueError(f"data.source.size is {size}; shapes need images of at least 64 pixels: data.source.size=160")
    if not places["train"]:
        raise ValueError(f"data.train is {places['train']}; it is the number of training images: data.train=2000")
    if negative := [name for name in SPLITS if (places.get(name) or 0) < 0]:
        raise ValueError(
            f"data.{negative[0]} is {places[negative[0]]}; it is a number of images: data.{negative[0]}=200"
        )
    categories = [
        Category(
            id=i + 1,
            name=shape.name,
            keypoints=shape.names,
            skeleton=[(0, k) for k in range(1, len(shape.names))],
            flip_pairs=[pair for pair in FLIP_PAIRS if pair[1] < len(shape.names)],
            sigmas=[0.05] * len(shape.names),
        )
        for i, shape in enumerate(SHAPES)
    ]

    def reader(number: int, count: int) -> Callable[[], ShapesSplit]:
        return lambda: ShapesSplit(number, count, size, seed, categories)

    read = {name: reader(i, places[name]) for i, name in enumerate(SPLITS) if places.get(name)}
    return Content("shapes", "detr_exp.data.shapes", categories, read)


class ShapesSplit:
    """Images `0 .. count - 1` of one split; see `content.Split`."""

    has_masks = True
    has_keypoints = True
    most_objects = MAX_OBJECTS

    def __init__(self, number: int, count: int, side: int, seed: int, categories: list[Category]) -> None:
        self.number, self.count, self.side, self.seed, self.categories = number, count, side, seed, categories
        self.image_ids = range(1, count + 1)
        self.fingerprint = f"shapes-{VERSION}-{seed}-{SPLITS[number]}-{count}-{side}"
        self._last: tuple[int, np.ndarray, Objects] | None = None

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"shapes/{SPLITS[self.number]}/{index}"

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        if self._last is None or self._last[0] != index:
            rng = np.random.default_rng((self.seed, self.number, index))
            self._last = (index, *draw(rng, self.side))
        return self._last[1], self._last[2]

    def objects(self, index: int) -> Objects:
        return self.load(index)[1]

    def image(self, index: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
        return self.load(index)[0]

    def truth(self) -> Values:
        from pycocotools import mask as rle

        annotations: list[Values] = []
        for index, image_id in enumerate(self.image_ids):
            objects = self.objects(index)
            assert objects.segments is not None
            assert objects.keypoints is not None
            for i, category in enumerate(objects.categories.tolist()):
                x0, y0, x1, y1 = objects.boxes_xyxy[i].tolist()
                mask = np.asarray(objects.segments[i])
                points = objects.keypoints[i, : len(SHAPES[category - 1].names)]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": float(np.sum(mask)),
                        "iscrowd": 0,
                        "segmentation": rle.encode(np.asfortranarray(mask, np.uint8)),
                        "keypoints": points.reshape(-1).tolist(),
                        "num_keypoints": int((points[:, 2] > 0).sum()),
                    }
                )
        images = [
            {"id": i, "file_name": self.name(i - 1), "height": self.side, "width": self.side} for i in self.image_ids
        ]
        categories = [
            {
                "id": category.id,
                "name": category.name,
                "keypoints": category.keypoints,
                "skeleton": [[a + 1, b + 1] for a, b in category.skeleton],
            }
            for category in self.categories
        ]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def draw(rng: np.random.Generator, side: int) -> tuple[np.ndarray, Objects]:
    """One image `[side, side, 3]` uint8 and its objects.

    Shapes are placed from front to back: a later one lies behind the earlier ones and is left out when too little of it
    would be visible, so that every object can be detected. Masks are the visible part, boxes enclose them, and
    keypoints that another shape occludes have visibility 1.
    """
    image = _ground(rng, side)
    taken = np.zeros((side, side), bool)
    labels: list[int] = []
    boxes, masks, keypoints, layers = [], [], [], []
    wanted = 0 if rng.random() < EMPTY else int(rng.integers(1, MAX_OBJECTS + 1))
    for _ in range(3 * wanted):
        if len(labels) == wanted:
            break
        label = int(rng.integers(len(SHAPES)))
        x, y, alpha, points = _placed(rng, SHAPES[label], side)
        window = np.s_[y : y + alpha.shape[0], x : x + alpha.shape[1]]
        whole = alpha >= 128
        visible = whole & ~taken[window]
        if visible.sum() < max(LEAST_VISIBLE * whole.sum(), 12):
            continue
        mask = np.zeros((side, side), bool)
        mask[window] = visible
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        labels.append(label + 1)
        boxes.append([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1])
        masks.append(mask)
        keypoints.append(_seen(points, mask))
        layers.append((window, alpha, _paint(rng, image[window], alpha)))
        taken[window] |= whole
    for window, alpha, paint in reversed(layers):
        opacity = alpha[..., None].astype(np.float32) / 255
        ground = image[window].astype(np.float32)
        image[window] = (ground + (paint - ground) * opacity).astype(np.uint8)
    noise = rng.integers(-9, 10, image.shape, np.int16)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    count = len(labels)
    return image, Objects(
        categories=np.array(labels, np.int64),
        boxes_xyxy=np.array(boxes, np.float64).reshape(count, 4),
        segments=[*masks],
        keypoints=np.array(keypoints, np.float32).reshape(count, MOST_KEYPOINTS, 3),
    )


def _placed(rng: np.random.Generator, shape: _Shape, side: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """A shape, rotated, stretched and scaled: its corner, `[h, w]` uint8 coverage, and `[k, 2]` keypoints in pixels."""
    angle = np.radians(rng.uniform(-45, 45))
    stretch = rng.uniform(0.75, 1.0, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outline, points = (shape.outline * stretch) @ turn, (shape.keypoints * stretch) @ turn
    low, high = outline.min(0), outline.max(0)
    scale = rng.uniform(*SIDE) * side / (high - low).max()
    extent = (high - low) * scale
    corner = rng.uniform(0, side - extent)  # completely inside the image
    x, y = np.floor(corner).astype(int)
    width, height = (np.ceil(corner + extent).astype(int) - (x, y)).tolist()
    canvas = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    at = (outline - low) * scale + corner - (x, y)
    ImageDraw.Draw(canvas).polygon((at * _SUPERSAMPLE - 0.5).reshape(-1).tolist(), fill=255)
    alpha = np.asarray(canvas.reduce(_SUPERSAMPLE))
    return int(x), int(y), alpha, (points - low) * scale + corner


def _seen(points: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`[MOST_KEYPOINTS, 3]` with visibility 2 where the shape is visible within two pixels of the point, else 1."""
    found = np.zeros((MOST_KEYPOINTS, 3), np.float32)
    found[: len(points), :2] = points
    for k, (x, y) in enumerate(points.astype(int).tolist()):
        found[k, 2] = 1 + mask[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].any()
    return found


def _ground(rng: np.random.Generator, side: int) -> np.ndarray:
    """A textured background with clutter: smooth patches of two scales, stripes, lines and blobs."""
    base = rng.uniform(40, 215, 3)
    image = np.zeros((side, side, 3), np.float32) + base.astype(np.float32)
    for cells, strength in ((4, 45), (14, 28)):
        coarse = (128 + rng.uniform(-strength, strength, (cells, cells, 3))).astype(np.uint8)
        image += np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128
    if rng.random() < 0.5:
        direction, period = rng.uniform(0, np.pi), rng.uniform(4, 20)
        axis = np.arange(side, dtype=np.float32)
        phase = (axis[:, None] * np.sin(direction) + axis * np.cos(direction)) * np.float32(2 * np.pi / period)
        image += (np.sin(phase) * np.float32(rng.uniform(5, 22)))[..., None]
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 6))):
        ink = tuple(np.clip(base + rng.uniform(-90, 90, 3), 0, 255).astype(int).tolist())
        ends = rng.uniform(0, side, 4).tolist()
        if rng.random() < 0.6:
            pen.line(ends, fill=ink, width=int(rng.integers(1, max(2, side // 50))))
        else:
            x, y = ends[:2]
            rx, ry = (rng.uniform(0.02, 0.12, 2) * side).tolist()
            pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=ink)
    return np.array(canvas)


def _paint(rng: np.random.Generator, ground: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`[h, w, 3]` float32 colours for a shape: different from the background, shaded, sometimes striped."""
    height, width = alpha.shape
    below = ground.reshape(-1, 3).mean(0)
    colour = rng.uniform(10, 245, 3)
    while np.abs(colour - below).max() < 55:
        colour = rng.uniform(10, 245, 3)
    rows, columns = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    slope = rng.uniform(-25, 25, 2).astype(np.float32)
    shade = rows[:, None] * slope[0] + columns * slope[1]
    if rng.random() < 0.35:
        period, direction = rng.uniform(3, 8), rng.uniform(0, np.pi)
        across = (rows[:, None] * (height / 2) * np.sin(direction)) + columns * (width / 2) * np.cos(direction)
        shade = shade + np.where(np.sin(across * (2 * np.pi / period)) > 0, 18, -18)
    return np.clip(colour.astype(np.float32) + shade[..., None], 0, 255).astype(np.float32)
