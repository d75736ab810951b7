"""Pixels, masks and keypoints are transformed like the boxes by every plan."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from detr_exp.data.augment import Augment, plain, planned
from detr_exp.data.content import Objects
from detr_exp.data.render import is_exact, needed, render, resized_plainly, target_of

SIZE, OUT = (90, 120), (96, 128)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
BOXES = np.array([[10, 10, 50, 40], [60, 20, 110, 70], [20, 50, 50, 85]], float)
FLIP_ORDER = np.array([[1, 0, 2]])


def scene() -> tuple[np.ndarray, Objects]:
    """Three rectangles in pure colours on grey; each has its upper left, upper right and lower left corner marked."""
    pixels = np.full((*SIZE, 3), 90, np.uint8)
    segments, keypoints = [], []
    for (x0, y0, x1, y1), colour in zip(BOXES.astype(int), COLOURS):
        pixels[y0:y1, x0:x1] = colour
        segments.append([[x0, y0, x1, y0, x1, y1, x0, y1]])
        keypoints.append([(x0, y0, 2), (x1, y0, 2), (x0, y1, 1)])
    objects = Objects(
        *(np.zeros(3, np.int64), BOXES, segments, np.array(keypoints, np.float32)),
        extra={"place": np.arange(3)},
        image_extra={"teacher": np.ones((2, 2), np.float32)},
    )
    return pixels, objects


def extent(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("seed", range(60))
def test_pixels_masks_and_keypoints_lie_in_their_boxes(seed):
    image, objects = scene()
    settings = {"zoom_out": 0.5, "zoom_out_max": 2.0, "iou_crop": 0.5, "flip": 0.5, "vertical_flip": 0.5}
    plan = Augment(resize_crop=0.2, **settings).plan(np.random.default_rng(seed), SIZE, BOXES, OUT)
    pixels = render(plan, image).astype(int)
    target = target_of(plan, objects, np.zeros(3, np.int64), with_masks=True, flip_order=FLIP_ORDER)
    assert pixels.shape == (*OUT, 3)
    assert len(target.labels) == len(plan.keep) == len(target.masks) == len(target.keypoints)
    assert target.extra["place"].tolist() == plan.keep.tolist(), "what a source says of an object stays with it"
    assert target.image_extra["teacher"].shape == (2, 2)
    for i, box, mask, points in zip(plan.keep, plan.boxes_xyxy, target.masks.numpy(), target.keypoints.numpy()):
        seen = (np.abs(pixels - COLOURS[i]).max(-1) < 120) & (pixels.max(-1) > 130)
        np.testing.assert_allclose(extent(seen), box, atol=1.51)
        np.testing.assert_allclose(extent(mask), box, atol=1.01)
        assert (mask & seen).sum() / (mask | seen).sum() > 0.85
        x0, y0, x1, y1 = BOXES[i]
        corners = plan.moved(np.array([[x0, y0], [x1, y0], [x0, y1]]))
        if plan.mirrored != plan.upended:
            corners = corners[FLIP_ORDER[0]]
        left, top, right, bottom = plan.target
        inside = ((corners >= (left, top)) & (corners <= (right, bottom))).all(1)
        assert (points[:, 2] > 0).tolist() == inside.tolist()
        np.testing.assert_allclose(points[inside, :2] * OUT[::-1], corners[inside], atol=1e-3)
        assert not points[~inside].any()


@pytest.mark.parametrize("seed", range(12))
def test_all_ways_to_write_a_mask_agree(seed):
    _, objects = scene()
    dense = np.zeros(SIZE, bool)
    dense[10:40, 10:50] = True
    dense[20:30, 20:30] = False
    code = rle.encode(np.asfortranarray(dense, np.uint8))
    flat = dense.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    segments = [dense, code, {**code, "counts": code["counts"].decode()}, {"size": list(SIZE), "counts": counts}]
    plan = Augment(zoom_out=0.5, flip=0.5, vertical_flip=0.5).plan(np.random.default_rng(seed), SIZE, BOXES, OUT)
    masks = []
    for segment in segments:
        objects.segments = [segment, None, None]
        masks.append(target_of(plan, objects, np.zeros(3, np.int64), with_masks=True, flip_order=None).masks[0].numpy())
    assert all((mask == masks[0]).all() for mask in masks)
    np.testing.assert_allclose(extent(masks[0]), plan.boxes_xyxy[0], atol=1)


def test_an_object_without_outline_is_its_box():
    _, objects = scene()
    objects.segments = [None] * 3
    plan = plain(SIZE, BOXES, SIZE)
    masks = target_of(plan, objects, np.zeros(3, np.int64), with_masks=True, flip_order=None).masks.numpy()
    assert [extent(mask) for mask in masks] == BOXES.tolist()


def test_two_mirrors_are_a_half_turn():
    """Left and right are swapped by one mirroring, and restored by two."""
    _, objects = scene()
    labels = np.zeros(3, np.int64)

    def points(mirrored: bool, upended: bool) -> np.ndarray:
        plan = planned(SIZE, BOXES, OUT, (0, 0, 120, 90), np.ones(3, bool), mirrored, upended, None)
        return target_of(plan, objects, labels, with_masks=False, flip_order=FLIP_ORDER).keypoints.numpy()

    plain_points = points(False, False)
    mirrored = plain_points[:, [1, 0, 2]] * [-1, 1, 1] + [1, 0, 0]
    np.testing.assert_allclose(points(True, False), mirrored, atol=1e-6)
    np.testing.assert_allclose(points(True, True), plain_points * [-1, -1, 1] + [1, 1, 0], atol=1e-6)


def test_boxes_are_normalised():
    _, objects = scene()
    target = target_of(plain(SIZE, BOXES, OUT), objects, np.zeros(3, np.int64), with_masks=False, flip_order=None)
    np.testing.assert_allclose(target.boxes[0], [30 / 120, 25 / 90, 40 / 120, 30 / 90], rtol=1e-6)
    assert target.masks is None
    assert target.keypoints is None


def test_no_objects_make_empty_targets():
    objects = Objects(np.zeros(0, np.int64), np.zeros((0, 4)))
    plan = plain(SIZE, objects.boxes_xyxy, OUT)
    target = target_of(plan, objects, np.zeros(0, np.int64), with_masks=True, flip_order=FLIP_ORDER)
    assert target.boxes.shape == (0, 4)
    assert target.masks.shape == (0, *OUT)
    assert target.keypoints.shape == (0, 3, 3)


def test_evaluation_resizes_exactly_like_pillow_and_training_nearly():
    rng = np.random.default_rng(0)
    for size in ((90, 120), (131, 47), (33, 500)):
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        expected = np.asarray(Image.fromarray(image).resize(OUT[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(resized_plainly(image, OUT), expected)
        trained = render(plain(size, np.zeros((0, 4)), OUT), image).astype(int)
        assert np.abs(trained - expected).max() <= 1


def test_a_smaller_decoded_image_gives_nearly_the_same():
    rng = np.random.default_rng(1)
    large = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    view = (40, 32, 600, 452)
    plan = planned((480, 640), np.zeros((0, 4)), (64, 96), view, np.zeros(0, bool), True, False, None)
    height, width = needed(plan)
    assert (height, width) == (83, 110)
    small = large.reduce(4)
    assert small.height >= height
    assert small.width >= width
    difference = np.abs(render(plan, np.array(large)).astype(int) - render(plan, np.array(small)))
    assert difference.mean() < 1.5


def test_an_enlarged_part_needs_the_whole_resolution():
    plan = planned((480, 640), np.zeros((0, 4)), (64, 64), (10, 10, 40, 400), np.zeros(0, bool), False, False, None)
    assert needed(plan) == (480, 640)


@pytest.mark.parametrize("out", [64, 320, 384, 640])
def test_evaluation_resizes_as_pillow_does(out):
    """Whatever the size, also where torch does it: on random bytes and on the extremes."""
    rng = np.random.default_rng(out)
    sizes = [1, out // 2, out, out + 1, *rng.integers(2, 2 * out, 6).tolist(), *(out * k // 8 for k in range(1, 8))]
    fast = [size for size in sizes if is_exact(size, out)]
    assert 3 <= len(fast) < len(sizes)
    for size in sizes:
        for values in (np.arange(256), np.array([0, 255])):
            pixels = rng.choice(values.astype(np.uint8), (size, out // 2, 3))
            expected = np.asarray(Image.fromarray(pixels).resize((out, out), Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(resized_plainly(pixels, (out, out)), expected)
