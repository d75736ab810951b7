"""Augmentation that is planned before a pixel is touched.

Zoom-out, crop, flips and resize are sampled on the boxes alone and give one plan: this rectangle of the image goes to
that rectangle of the output, mirrored or not, in these colours. Pixels, masks and keypoints then follow the plan, each
in one step (`render.py`). A mosaic is four plans that share an output, a mix two outputs that are blended. The
distributions are those of torchvision's transforms v2 in the order RT-DETR applies them (photometric distortion,
zoom-out, IoU crop, flip, resize), and RF-DETR's resize-crop. User-defined operations come last: each receives the
rendered image and its objects, and returns both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from detr_exp.data.colour import Colour
from detr_exp.data.fit import STRETCH, Fit
from detr_exp.data.operations import refuse_spoiled
from detr_exp.protocols import Combining, Operation
from detr_exp.structures import Target

# Random IoU crop (Liu et al. 2016, SSD): relative sides, aspect ratio, least overlap with some box, tries per overlap.
CROP_SCALE = (0.3, 1.0)
CROP_ASPECT = (0.5, 2.0)
CROP_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
CROP_TRIES = 40
# RF-DETR's (and DETR's) resize-crop: short side after a first resize, then a square of this side is cut out.
RESIZE_SIDES = (400, 500, 600)
SQUARE = (384, 600)
LEAST_SIDE = 1.0  # pixels; smaller boxes are dropped, or those below another value that is chosen
MOSAIC_CENTRE = (0.3, 0.7)  # where the four tiles of a mosaic meet, in sides of the output
MIX_SHARE = (0.45, 0.55)  # of the first image in a mix (Huang et al. 2024, DEIM)

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels
Tiles = list[tuple[int, Rect]]  # images, and the rectangles of the output they fill


@dataclass
class Plan:
    """Where an image goes. Rectangles are (x0, y0, x1, y1) in whole pixels.

    Attributes:
        size: (height, width) of the image.
        out: (height, width) of the output.
        source: rectangle of the image that is seen.
        target: rectangle of the output it fills.
        frame: rectangle of the output that what is seen fills, with the black around a zoomed-out image.
        mirrored: left and right are exchanged.
        upended: top and bottom are exchanged.
        keep: `[m]` int64, the objects that are still there.
        boxes_xyxy: `[m, 4]` float64, their boxes in the output.
        colour: distortion of the pixels, or None.
    """

    size: tuple[int, int]
    out: tuple[int, int]
    source: Rect
    target: Rect
    frame: Rect
    mirrored: bool
    upended: bool
    keep: np.ndarray
    boxes_xyxy: np.ndarray
    colour: Colour | None = None

    def moved(self, points: np.ndarray) -> np.ndarray:
        """`[..., 2]` x, y of the image to the output; not clipped."""
        low, high = np.array(self.source[:2], float), np.array(self.source[2:], float)
        start, end = np.array(self.target[:2], float), np.array(self.target[2:], float)
        share = (points - low) / (high - low)
        share = np.where([self.mirrored, self.upended], 1 - share, share)
        return start + share * (end - start)


class Augment:
    """Which random changes a training image goes through.

    Every entry is a probability; 0 leaves that change out. `changes` has the keys of all others.

    Args:
        photometric: brightness, contrast, saturation, hue and channel order, each of them with this probability.
        zoom_out: the image on a black canvas 1 to `zoom_out_max` times as large.
        zoom_out_max: largest side of that canvas, in sides of the image.
        iou_crop: a crop that overlaps some box by a sampled minimum IoU; objects whose centre is outside are dropped.
        resize_crop: RF-DETR's option B, a random square of the resized image.
        flip: mirror left and right.
        vertical_flip: mirror top and bottom; for images without an up, such as microscopy or aerial views.
        mosaic: four images in one, each in a tile of its own, cropped and coloured but not zoomed out.
        mixup: a second image (or mosaic) is blended in, with its objects.
        least_side: pixels; objects of which less is seen, in the image or in the output, are dropped.
        operations: user-defined, applied after all others; part of the strong augmentation.

    Raises:
        ValueError: a probability outside 0..1, a zoom below 1, or an operation that cannot be called.
    """

    def __init__(
        self,
        *,
        photometric: float = 0.0,
        zoom_out: float = 0.0,
        zoom_out_max: float = 4.0,
        iou_crop: float = 0.0,
        resize_crop: float = 0.0,
        flip: float = 0.0,
        vertical_flip: float = 0.0,
        mosaic: float = 0.0,
        mixup: float = 0.0,
        least_side: float = LEAST_SIDE,
        operations: Sequence[Operation | Combining] | None = None,
    ) -> None:
        chances = {
            "photometric": photometric,
            "zoom_out": zoom_out,
            "iou_crop": iou_crop,
            "resize_crop": resize_crop,
            "flip": flip,
            "vertical_flip": vertical_flip,
            "mosaic": mosaic,
            "mixup": mixup,
        }
        for name, value in chances.items():
            if not 0 <= value <= 1:
                raise ValueError(f"data.augment.{name} is {value}; it is a probability: data.augment.{name}=0.5")
        if zoom_out_max < 1:
            raise ValueError(
                f"data.augment.zoom_out_max is {zoom_out_max}; the canvas cannot be smaller than the image"
            )
        self.photometric, self.zoom_out, self.zoom_out_max = photometric, zoom_out, zoom_out_max
        self.iou_crop, self.resize_crop = iou_crop, resize_crop
        self.flip, self.vertical_flip = flip, vertical_flip
        self.mosaic, self.mixup, self.least_side = mosaic, mixup, least_side
        self.operations = tuple(operations or ())
        self.changes = [f"data.augment.{k}" for k, v in {**chances, "operations": self.operations}.items() if v]
        for operation in self.operations:
            if not callable(operation):
                raise ValueError(
                    f"data.augment.operations has {operation!r}, which is no operation: name what makes one, "
                    "data.augment.operations=[{_target_: mine.Rain}]"
                )

    def layers(
        self,
        rng: np.random.Generator,
        image: int,
        count: int,
        out: tuple[int, int],
        *,
        mosaic: bool = True,
        mixup: bool = True,
    ) -> list[Tiles]:
        """Which images a training sample is made of: one layer of tiles, or two that are blended.

        Dense one-to-one matching (Huang et al. 2024, DEIM): more objects an image, so more of the queries learn.

        Args:
            rng: decides everything.
            image: index of the requested image; it is always part of the sample.
            count: images to choose the others from.
            out: (height, width) of the output.
            mosaic: False leaves them out.
            mixup: likewise.
        """
        chance = self.mosaic if mosaic else 0.0
        layers = [self._tiles(rng, chance, image, count, out)]
        if mixup and self.mixup and rng.random() < self.mixup:
            layers.append(self._tiles(rng, chance, int(rng.integers(count)), count, out))
        return layers

    def _tiles(self, rng: np.random.Generator, chance: float, image: int, count: int, out: tuple[int, int]) -> Tiles:
        height, width = out
        if not chance or rng.random() >= chance:
            return [(image, (0, 0, width, height))]
        x, y = (int(side * value) for side, value in zip((width, height), rng.uniform(*MOSAIC_CENTRE, 2)))
        corners = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
        others = rng.integers(count, size=3).tolist()
        return list(zip([image, *others], [corners[i] for i in rng.permutation(4)]))

    def plan(
        self,
        rng: np.random.Generator,
        size: tuple[int, int],
        boxes_xyxy: np.ndarray,
        out: tuple[int, int],
        *,
        tile: Rect | None = None,
        strong: bool = True,
        flippable: bool = True,
        fit: Fit = STRETCH,
    ) -> Plan:
        """Sample one plan.

        Args:
            rng: decides everything.
            size: (height, width) of the image.
            boxes_xyxy: `[n, 4]` in its pixels.
            out: (height, width) of the output.
            tile: the rectangle of the output that it fills, for a part of a mosaic; None: all of it.
            strong: False leaves only the flips and the resize-crop, as in the last epochs of a run.
            flippable: False leaves out the flips (keypoints whose mirror pairs are not known).
            fit: what is seen of the image to the output, or to its tile.
        """
        colour = Colour.draw(rng, self.photometric) if strong else None
        height, width = size
        view = (0, 0, width, height)  # the part of the plane that becomes the output, in pixels of the image
        centred = np.ones(len(boxes_xyxy), bool)
        alone = tile is None or tile == (0, 0, out[1], out[0])
        if strong and alone and rng.random() < self.zoom_out:
            view = _zoomed_out(rng, size, self.zoom_out_max)
        if strong and rng.random() < self.iou_crop:
            view, centred = _iou_crop(rng, view, boxes_xyxy)
        if rng.random() < self.resize_crop:
            view = _resize_crop(rng, size)
        flips = rng.random(2) < (self.flip, self.vertical_flip)
        mirrored, upended = (flips & flippable).tolist()
        return planned(size, boxes_xyxy, out, view, centred, mirrored, upended, colour, tile, fit, self.least_side)

    def operated(
        self,
        rng: np.random.Generator,
        image: np.ndarray,
        target: Target,
        another: Callable[[], tuple[np.ndarray, Target]] | None = None,
    ) -> tuple[np.ndarray, Target]:
        """Apply the user-defined operations to an image `[H, W, C]` uint8 and its objects.

        Args:
            rng: decides everything.
            image, target: to change.
            another: gives another image of this size with its objects; None: there is none.

        Raises:
            ValueError: an operation returns something that cannot be batched.
        """
        for operation in self.operations:
            shape, annotated = image.shape, target.annotated
            if isinstance(operation, Combining):
                if another is None or not operation.is_due(rng):
                    continue
                image, target = operation(rng, image, target, *another())
            else:
                image, target = operation(rng, image, target)
            refuse_spoiled(operation, shape, image, target)
            target.annotated = annotated if target.annotated is None else target.annotated  # of a new target
        return image, target


def plain(size: tuple[int, int], boxes_xyxy: np.ndarray, out: tuple[int, int], fit: Fit = STRETCH) -> Plan:
    """The plan of evaluation: the whole image, resized."""
    everything = np.ones(len(boxes_xyxy), bool)
    return planned(size, boxes_xyxy, out, (0, 0, size[1], size[0]), everything, False, False, None, fit=fit)


def planned(
    size: tuple[int, int],
    boxes_xyxy: np.ndarray,
    out: tuple[int, int],
    view: Rect,
    wanted: np.ndarray,
    mirrored: bool,
    upended: bool,
    colour: Colour | None,
    tile: Rect | None = None,
    fit: Fit = STRETCH,
    least_side: float = LEAST_SIDE,
) -> Plan:
    """The plan that fits `view`, a rectangle that may reach beyond the image, into `tile` (None: the output).

    Objects stay when `wanted` and when both sides of what is seen of them have `least_side` pixels, before and after
    the resize.
    """
    height, width = size
    x0, y0, x1, y1 = view
    start_x, start_y, end_x, end_y = tile or (0, 0, out[1], out[0])
    content_height, content_width = fit.content((y1 - y0, x1 - x0), (end_y - start_y, end_x - start_x))
    end_x, end_y = start_x + content_width, start_y + content_height
    source = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
    to_out = np.array([(end_x - start_x) / (x1 - x0), (end_y - start_y) / (y1 - y0)] * 2)
    tile_start = np.array([start_x, start_y] * 2)
    left, top, right, bottom = (tile_start + np.rint((np.array(source) - [x0, y0] * 2) * to_out).astype(int)).tolist()
    left, top = min(left, end_x - 1), min(top, end_y - 1)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    if mirrored:
        left, right = start_x + end_x - right, start_x + end_x - left
    if upended:
        top, bottom = start_y + end_y - bottom, start_y + end_y - top
    target, frame, nothing = (left, top, right, bottom), (start_x, start_y, end_x, end_y), np.zeros(0, np.int64)
    plan = Plan(size, out, source, target, frame, mirrored, upended, nothing, np.zeros((0, 4)), colour)
    if len(boxes_xyxy):
        seen = np.clip(boxes_xyxy, (source[0], source[1]) * 2, (source[2], source[3]) * 2)
        corners = plan.moved(seen.reshape(-1, 2, 2))
        moved = np.concatenate([corners.min(1), corners.max(1)], 1)
        large = np.minimum(seen[:, 2:] - seen[:, :2], moved[:, 2:] - moved[:, :2]).min(1) >= least_side
        plan.keep = np.flatnonzero(wanted & large)
        plan.boxes_xyxy = moved[plan.keep]
    return plan


def _zoomed_out(rng: np.random.Generator, size: tuple[int, int], most: float) -> Rect:
    factor = 1 + (most - 1) * rng.random()
    height, width = size
    canvas_height, canvas_width = int(height * factor), int(width * factor)
    at = rng.random(2)
    left, top = int((canvas_width - width) * at[0]), int((canvas_height - height) * at[1])
    return -left, -top, canvas_width - left, canvas_height - top


def _iou_crop(rng: np.random.Generator, view: Rect, boxes_xyxy: np.ndarray) -> tuple[Rect, np.ndarray]:
    """A part of `view`, and whether each box has its centre in it. All tries of an overlap are judged at once.

    With the same random numbers, torchvision's crop and its sanitising keep the same objects. There too, a large object
    among several has its centre outside in a few percent of the crops.
    """
    everything = np.ones(len(boxes_xyxy), bool)
    x0, y0, x1, y1 = view
    width, height = x1 - x0, y1 - y0
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    while True:
        least = CROP_OVERLAPS[rng.integers(len(CROP_OVERLAPS))]
        if least >= 1 or not len(boxes_xyxy):
            return view, everything
        low, high = CROP_SCALE
        draws = rng.random((CROP_TRIES, 4))
        sides = ((low + (high - low) * draws[:, :2]) * (width, height)).astype(np.int64)
        starts = np.array([x0, y0]) + ((np.array([width, height]) - sides) * draws[:, 2:]).astype(np.int64)
        ends = starts + sides
        aspect = sides[:, 0] / np.maximum(sides[:, 1], 1)
        sound = (sides > 0).all(1) & (aspect >= CROP_ASPECT[0]) & (aspect <= CROP_ASPECT[1])
        within = ((starts[:, None] < centres) & (centres < ends[:, None])).all(-1)
        overlap = np.minimum(ends[:, None], boxes_xyxy[:, 2:]) - np.maximum(starts[:, None], boxes_xyxy[:, :2])
        shared = overlap.clip(0).prod(-1)
        iou = shared / (areas + sides.prod(1)[:, None] - shared)
        sound &= within.any(1) & (np.where(within, iou, -1).max(1) >= least)
        if sound.any():
            i = int(sound.argmax())
            (left, top), (right, bottom) = starts[i].tolist(), ends[i].tolist()
            return (left, top, right, bottom), within[i]


def _resize_crop(rng: np.random.Generator, size: tuple[int, int]) -> Rect:
    height, width = size
    short = RESIZE_SIDES[rng.integers(len(RESIZE_SIDES))]
    scale = short / min(height, width)
    side = max(1, round(int(rng.integers(min(SQUARE[0], short), min(SQUARE[1], short) + 1)) / scale))
    at = rng.random(2)
    x, y = round((width - side) * at[0]), round((height - side) * at[1])
    return max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)
