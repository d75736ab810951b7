"""Apply a plan to pixels, masks and keypoints: one crop, one resize, one paste."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from detr_exp.data.augment import Plan
from detr_exp.data.content import Objects, Segment
from detr_exp.data.fit import STRETCH, Fit
from detr_exp.structures import Target, Targets
from detr_exp.values import Values


def needed(plan: Plan) -> tuple[int, int]:
    """Smallest (height, width) at which the image may be decoded, so that its visible part is not enlarged further."""
    x0, y0, x1, y1 = plan.source
    left, top, right, bottom = plan.target
    scale = max(min(1.0, (bottom - top) / (y1 - y0)), min(1.0, (right - left) / (x1 - x0)))
    return math.ceil(plan.size[0] * scale), math.ceil(plan.size[1] * scale)


def render(plan: Plan, image: np.ndarray) -> np.ndarray:
    """`[H, W, C]` uint8: the image after a plan. It may be decoded smaller than the size that the plan is for."""
    return layer([(plan, image)])


def layer(pastes: Sequence[tuple[Plan, np.ndarray]], fit: Fit = STRETCH) -> np.ndarray:
    """`[H, W, C]` uint8: several images in one output, each in the rectangle of its plan, the rest filled."""
    plan, image = pastes[0]
    if plan.target == (0, 0, plan.out[1], plan.out[0]):
        return _seen(plan, image)
    canvas = _filled(plan.out, fit, image.shape[2])
    for plan, image in pastes:
        if fit.pads and plan.frame != plan.target:
            left, top, right, bottom = plan.frame
            canvas[top:bottom, left:right] = 0
        left, top, right, bottom = plan.target
        canvas[top:bottom, left:right] = _seen(plan, image)
    return canvas


def blended(layers: Sequence[np.ndarray], share: float) -> np.ndarray:
    """`[H, W, C]` uint8: two layers blended, with weight `share` of the first."""
    first, second = layers
    return cv2.addWeighted(first, share, second, 1 - share, 0).reshape(first.shape)  # OpenCV drops an axis of one


def _seen(plan: Plan, image: np.ndarray) -> np.ndarray:
    """The visible part of the image, at the size it has in the output."""
    height, width = image.shape[:2]
    x0, x1 = (round(x * width / plan.size[1]) for x in plan.source[::2])
    y0, y1 = (round(y * height / plan.size[0]) for y in plan.source[1::2])
    left, top, right, bottom = plan.target
    seen = image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    # where there are fewer pixels; colours of a reduced part are then averaged before what is too bright is clipped
    colour_first = seen.shape[0] * seen.shape[1] <= (right - left) * (bottom - top)
    if plan.colour is not None and colour_first:
        seen = plan.colour.on(seen, image)
    if plan.mirrored or plan.upended:
        seen = cv2.flip(seen, -1 if plan.mirrored and plan.upended else int(plan.mirrored)).reshape(seen.shape)
    part = _resized(seen, bottom - top, right - left)
    if plan.colour is not None and not colour_first:
        part = plan.colour.on(part, image)
    return part


def fitted(image: np.ndarray, out: tuple[int, int], fit: Fit) -> np.ndarray:
    """`[H, W, C]` uint8: an image as evaluation shows it to a network of this input size."""
    height, width = fit.content((image.shape[0], image.shape[1]), out)
    pixels = resized_plainly(image, (height, width))
    if (height, width) == out:
        return pixels
    canvas = _filled(out, fit, image.shape[2])
    canvas[:height, :width] = pixels
    return canvas


def _filled(out: tuple[int, int], fit: Fit, channels: int) -> np.ndarray:
    canvas = np.zeros((*out, channels), np.uint8)
    if any(fit.fill):
        canvas[:] = fit.fill
    return canvas


def resized_plainly(image: np.ndarray, out: tuple[int, int]) -> np.ndarray:
    """`[H, W, C]` uint8: the resize of evaluation, equal to Pillow's antialiased bilinear, as in published results."""
    height, width = image.shape[:2]
    if is_exact(height, out[0]) and is_exact(width, out[1]):
        return _resized(image, *out)
    if image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize((out[1], out[0]), Image.Resampling.BILINEAR))
    planes = [Image.fromarray(plane) for plane in np.ascontiguousarray(np.moveaxis(image, 2, 0))]
    return np.stack([np.asarray(plane.resize((out[1], out[0]), Image.Resampling.BILINEAR)) for plane in planes], 2)


def is_exact(size: int, out: int) -> bool:
    """Whether torch's resize from `size` to `out` pixels equals Pillow's to the bit.

    Both use integer weights: Pillow's have 22 bits, those of torch, which is faster, 14 or more. The results are equal
    where 14 bits represent the weights exactly; when enlarging, the weights are multiples of 1 / (2 out).
    """
    steps = 2 * out // math.gcd(size, 2 * out)
    return size <= out and steps <= 1 << 14 and steps & (steps - 1) == 0


def target_of(
    plan: Plan, objects: Objects, labels: np.ndarray, *, with_masks: bool, flip_order: np.ndarray | None
) -> Target:
    """The training target of the network.

    Args:
        plan: of the image.
        objects: of the image.
        labels: `[n]` their class indices.
        with_masks: rasterise masks at the size of the output.
        flip_order: `[C, K]` order of a mirrored object's keypoints; None: no keypoints are needed.
    """
    height, width = plan.out
    x0, y0, x1, y1 = plan.boxes_xyxy.T
    boxes = np.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], 1)
    kept = plan.keep.tolist()
    masks = None
    if with_masks:
        segments = objects.segments or [None] * len(objects)
        stack = [_mask(plan, segments[i], box) for i, box in zip(kept, plan.boxes_xyxy)]
        masks = torch.from_numpy(np.stack(stack) if stack else np.zeros((0, height, width), bool))
    keypoints = None
    if flip_order is not None:
        empty = np.zeros((len(objects), flip_order.shape[1], 3), np.float32)
        points = empty if objects.keypoints is None else objects.keypoints
        keypoints = torch.from_numpy(_keypoints(plan, points[plan.keep], flip_order[labels[plan.keep]]))
    return Target(
        labels=torch.from_numpy(labels[plan.keep]),
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        masks=masks,
        keypoints=keypoints,
        extra={name: torch.from_numpy(values[plan.keep]) for name, values in objects.extra.items()},
        image_extra={name: torch.from_numpy(values.copy()) for name, values in objects.image_extra.items()},
    )


def together(targets: Sequence[Target]) -> Target:
    """The targets of several images that were combined into one: it has the annotated classes that all of them have.

    Raises:
        ValueError: they have fields of the whole image (`image_extra`).
    """
    if len(targets) == 1:
        return targets[0]
    packed = Targets.pack(list(targets))
    if packed.image_extra:
        raise ValueError(
            f"{', '.join(packed.image_extra)} of a whole image cannot be that of several in one; leave out what puts "
            "images together: data.augment.mosaic=0 data.augment.mixup=0 data.augment.operations=[]"
        )
    annotated = None if packed.annotated is None else packed.annotated.all(0)
    return Target(packed.labels, packed.boxes, packed.masks, packed.keypoints, packed.extra, annotated=annotated)


def on_canvas(target: Target, size: tuple[int, int], canvas: tuple[int, int]) -> Target:
    """Objects relative to an image of `size`, relative to the canvas in whose corner it lies; or the reverse.

    Args:
        target: relative to `size`.
        size, canvas: (height, width); masks are cut or filled up to the second.
    """
    factor = torch.tensor([size[1] / canvas[1], size[0] / canvas[0]])
    masks = target.masks
    if masks is not None:
        height, width = (min(pair) for pair in zip(size, canvas))
        moved = masks.new_zeros(len(masks), *canvas)
        moved[:, :height, :width] = masks[:, :height, :width]
        masks = moved
    keypoints = None if target.keypoints is None else target.keypoints * torch.cat([factor, torch.ones(1)])
    return replace(target, boxes=target.boxes * factor.repeat(2), masks=masks, keypoints=keypoints)


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear on bytes; many times faster than Pillow and within one level of its result."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # add the batch axis before the permutation; in the other order torch does not detect channels_last
    planes = torch.from_numpy(np.require(pixels, requirements="W"))[None].permute(0, 3, 1, 2)
    planes = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return planes[0].permute(1, 2, 0).numpy()


def _keypoints(plan: Plan, points: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`[m, K, 3]` in 0..1 of the output; points outside the view are unlabelled, and mirrored pairs are swapped."""
    x, y = points[..., 0], points[..., 1]
    x0, y0, x1, y1 = plan.source
    there = (points[..., 2] > 0) & (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    moved = np.zeros(points.shape, np.float32)
    moved[..., :2] = plan.moved(points[..., :2]) / plan.out[::-1]
    moved[..., 2] = points[..., 2]
    moved[~there] = 0
    if plan.mirrored != plan.upended:  # both together are a rotation by 180 degrees, which does not swap left and right
        moved = np.take_along_axis(moved, order[..., None], 1)
    return moved


def _mask(plan: Plan, segment: Segment | None, box_xyxy: np.ndarray) -> np.ndarray:
    """`[H, W]` bool of one object in the output; where only its box is known, that is its mask."""
    height, width = plan.out
    if segment is None:
        mask = np.zeros((height, width), bool)
        x0, y0, x1, y1 = np.rint(box_xyxy).astype(int).tolist()
        mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
        return mask
    if isinstance(segment, list):
        return _polygons(plan, segment)
    left, top, right, bottom = plan.target
    x0, y0, x1, y1 = plan.source
    whole = segment if isinstance(segment, np.ndarray) else _decoded(segment)
    columns = x0 + ((np.arange(right - left) + 0.5) * ((x1 - x0) / (right - left))).astype(int)
    rows = y0 + ((np.arange(bottom - top) + 0.5) * ((y1 - y0) / (bottom - top))).astype(int)
    rows, columns = rows[:: -1 if plan.upended else 1], columns[:: -1 if plan.mirrored else 1]
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = whole[rows[:, None], columns]
    return mask


def _polygons(plan: Plan, polygons: list[list[float]]) -> np.ndarray:
    from pycocotools import mask as rle

    height, width = plan.out
    moved = []
    for polygon in polygons:
        # clamped near the image: an outlying vertex would use memory in proportion to its distance
        points = np.clip(np.array(polygon, np.float64).reshape(-1, 2), 0, plan.size[::-1])
        moved.append(plan.moved(points).reshape(-1).tolist())
    mask = rle.decode(rle.merge(rle.frPyObjects(moved, height, width))).astype(bool)
    left, top, right, bottom = plan.target
    mask[:top], mask[bottom:], mask[:, :left], mask[:, right:] = False, False, False, False
    return mask


def _decoded(segment: Values) -> np.ndarray:
    from pycocotools import mask as rle

    if isinstance(segment["counts"], list):
        segment = rle.frPyObjects(segment, *segment["size"])
    return rle.decode(segment).astype(bool)
