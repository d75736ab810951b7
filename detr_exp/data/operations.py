"""Operations for `operations` of a `data/augment` option, beside those that are planned: see `protocols.Operation`.

They come after the plan, on the rendered image, so each costs a pass over its pixels. All have a `chance`, the
probability for an image; lists are ranges from which a value is sampled.

Legend: (H, W) height and width of the image, n objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import cv2
import numpy as np
import torch

from detr_exp.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_exp.protocols import Combining, Operation
from detr_exp.structures import Target, leaves

LEAST_VISIBLE = 0.3  # of a box: an object of which less is left is dropped


@dataclass(frozen=True)
class Grey:
    """Colours become grey: for cameras that change to infrared at night."""

    chance: float = 0.1
    of_colours: ClassVar[bool] = True  # for images of three channels

    def __post_init__(self) -> None:
        refuse_chance(self, self.chance)

    def __call__(self, rng: np.random.Generator, image: np.ndarray, target: Target) -> tuple[np.ndarray, Target]:
        if rng.random() >= self.chance:
            return image, target
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), target


@dataclass(frozen=True)
class Jpeg:
    """The image after a compression with a quality out of 100."""

    chance: float = 0.2
    quality: Sequence[int] = (30, 90)
    of_colours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_chance(self, self.chance)
        _refuse_range(self, "quality", self.quality, 1, 100)

    def __call__(self, rng: np.random.Generator, image: np.ndarray, target: Target) -> tuple[np.ndarray, Target]:
        if rng.random() >= self.chance:
            return image, target
        quality = int(rng.integers(self.quality[0], self.quality[1] + 1))
        _, content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        return cv2.cvtColor(np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB), target


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur with a standard deviation in pixels."""

    chance: float = 0.2
    sigma: Sequence[float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        refuse_chance(self, self.chance)
        _refuse_range(self, "sigma", self.sigma, 0.1, 50)

    def __call__(self, rng: np.random.Generator, image: np.ndarray, target: Target) -> tuple[np.ndarray, Target]:
        if rng.random() >= self.chance:
            return image, target
        return cv2.GaussianBlur(image, (0, 0), rng.uniform(self.sigma[0], self.sigma[1])).reshape(image.shape), target


@dataclass(frozen=True)
class Cutout:
    """Black rectangles (DeVries & Taylor 2017): objects behind them are seen in part.

    Attributes:
        count: rectangles.
        side: of a rectangle, as a share of the side of the image.

    Masks are those of what is still seen, and hidden keypoints are labelled and not visible (1). An object stays if at
    least 30 % of its box is seen.
    """

    chance: float = 0.3
    count: int = 2
    side: Sequence[float] = (0.1, 0.3)

    def __post_init__(self) -> None:
        refuse_chance(self, self.chance)
        _refuse_range(self, "side", self.side, 0.0, 1.0)
        if self.count < 1:
            raise ValueError(f"Cutout has count {self.count}; it is a number of rectangles: count: 2")

    def __call__(self, rng: np.random.Generator, image: np.ndarray, target: Target) -> tuple[np.ndarray, Target]:
        if rng.random() >= self.chance:
            return image, target
        height, width = image.shape[:2]
        hidden = np.zeros((height, width), bool)
        for _ in range(self.count):
            across, down = (rng.uniform(self.side[0], self.side[1], 2) * (width, height)).astype(int)
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            hidden[top : top + down, left : left + across] = True
        return np.where(hidden[..., None], np.uint8(0), image), hidden_behind(target, hidden)


@dataclass(frozen=True)
class Affine:
    """The image turned and sheared around its middle; what comes from outside of it is black.

    Attributes:
        degrees: largest rotation, either way.
        shear: largest angle by which its left and right sides lean, either way.

    The new box of an object is that of its mask, or, where there is none, that of the ellipse in its old box: that of
    the corners would be too large for nearly all objects. An object stays if at least 30 % of its new box is inside.
    """

    chance: float = 0.5
    degrees: float = 10.0
    shear: float = 0.0

    def __post_init__(self) -> None:
        refuse_chance(self, self.chance)
        if not 0 <= self.degrees <= 180 or not 0 <= self.shear <= 60:
            raise ValueError(
                f"Affine has degrees {self.degrees} and shear {self.shear}; they are angles, from 0 to 180 and from 0 "
                "to 60: degrees: 10, shear: 5"
            )

    def __call__(self, rng: np.random.Generator, image: np.ndarray, target: Target) -> tuple[np.ndarray, Target]:
        if rng.random() >= self.chance:
            return image, target
        angle, lean = np.deg2rad(rng.uniform(-1, 1, 2) * (self.degrees, self.shear))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return moved(image, target, turn @ np.array([[1, math.tan(lean)], [0, 1]]))


def hidden_behind(target: Target, hidden: np.ndarray) -> Target:
    """The objects of an image behind something that hides a part of it.

    Args:
        target: the objects.
        hidden: `[H, W]` bool.
    """
    height, width = hidden.shape
    keypoints = target.keypoints
    if keypoints is not None:
        columns, rows = ((keypoints[..., i] * side).long() for i, side in enumerate((width, height)))
        behind = torch.from_numpy(hidden)[rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
        keypoints = keypoints.clone()
        keypoints[..., 2] = torch.where(behind, keypoints[..., 2].clamp(max=1), keypoints[..., 2])
    masks = None if target.masks is None else target.masks & ~torch.from_numpy(hidden)
    seen = torch.tensor([_share_seen(hidden, box) for box in cxcywh_to_xyxy(target.boxes).tolist()])
    return replace(target, masks=masks, keypoints=keypoints).kept(seen.reshape(-1) >= LEAST_VISIBLE)


def moved(image: np.ndarray, target: Target, matrix: np.ndarray) -> tuple[np.ndarray, Target]:
    """An image and its objects after a linear map around its middle.

    Args:
        matrix: `[2, 2]`, of x, y in pixels.
    """
    height, width = image.shape[:2]
    middle = np.array([width, height]) / 2
    shift = middle - matrix @ middle
    of_pixels = np.concatenate([matrix, (shift + matrix @ [0.5, 0.5] - 0.5)[:, None]], 1)  # their centres are integers

    def warped(pixels: np.ndarray, flags: int) -> np.ndarray:
        return cv2.warpAffine(pixels, of_pixels, (width, height), flags=flags)

    sides = torch.tensor([width, height], dtype=torch.float32)
    linear, offset = torch.from_numpy(matrix).float(), torch.from_numpy(shift).float()
    centres = (target.boxes[:, :2] * sides) @ linear.T + offset
    half = ((target.boxes[:, 2:] * sides / 2)[:, None] * linear).square().sum(-1).sqrt()
    boxes, masks, keypoints = torch.cat([centres - half, centres + half], 1), target.masks, target.keypoints
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    if masks is not None:
        planes = [warped(mask.numpy().view(np.uint8), cv2.INTER_NEAREST) for mask in masks]
        masks = torch.from_numpy(np.stack(planes)).bool() if planes else masks
        outlined = [_box_of(mask) if mask.any() else box for mask, box in zip(masks, boxes)]
        boxes = torch.stack(outlined) if outlined else boxes
    inside = torch.minimum(boxes.clamp(min=0), sides.repeat(2))
    seen = (inside[:, 2:] - inside[:, :2]).clamp(min=0)
    if keypoints is not None:
        places = (keypoints[..., :2] * sides) @ linear.T + offset
        there = ((places >= 0) & (places <= sides)).all(-1) & (keypoints[..., 2] > 0)
        keypoints = torch.cat([places / sides, keypoints[..., 2:]], -1) * there[..., None]
    keep = (seen.min(1).values >= 1) & (seen.prod(1) >= LEAST_VISIBLE * area)
    relative = xyxy_to_cxcywh(inside / sides.repeat(2))
    changed = replace(target, boxes=relative, masks=masks, keypoints=keypoints).kept(keep)
    return warped(image, cv2.INTER_LINEAR).reshape(image.shape), changed


def _box_of(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def _share_seen(hidden: np.ndarray, box: Sequence[float]) -> float:
    height, width = hidden.shape
    left, top = (min(int(place * side), side - 1) for place, side in zip(box[:2], (width, height)))
    right, bottom = (math.ceil(place * side) for place, side in zip(box[2:], (width, height)))
    return 1.0 - float(hidden[top : max(bottom, top + 1), left : max(right, left + 1)].mean())


def refuse_chance(operation: object, chance: float) -> None:
    if not 0 <= chance <= 1:
        raise ValueError(
            f"{type(operation).__name__} has chance {chance}; it is the probability for an image, from 0 to 1: "
            "chance: 0.5"
        )


def _refuse_range(operation: object, name: str, values: Sequence[float], low: float, high: float) -> None:
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise ValueError(
            f"{type(operation).__name__} has {name} {list(values)}; it is a lowest and a highest value, from {low} to "
            f"{high}: {name}: [{low}, {high}]"
        )


def refuse_spoiled(operation: Operation | Combining, shape: tuple[int, ...], image: np.ndarray, target: Target) -> None:
    objects = (target.labels, target.boxes, target.masks, target.keypoints, target.extra)
    rows = [len(tensor) for tensor in leaves(list(objects))]
    wrong = None
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != shape:
        wrong = "another kind of image; it has to keep its size and type"
    elif min(rows) != max(rows):
        wrong = f"{', '.join(map(str, rows))} rows of labels, boxes ...; Target.kept drops objects from all of them"
    elif not bool(target.boxes.isfinite().all()) or bool((target.boxes[:, 2:] <= 0).any()):
        wrong = "boxes without area or that are not finite; leave these objects out, target.kept(...)"
    if wrong is not None:
        made_of = operation.func if isinstance(operation, partial) else operation
        name = getattr(made_of, "__qualname__", type(operation).__qualname__)
        raise ValueError(f"data.augment.operations: {name} gives back {wrong}")
