"""Plans: the same distribution as torchvision's transforms, and geometry that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from detr_exp.data.augment import (
    CROP_ASPECT,
    CROP_OVERLAPS,
    CROP_SCALE,
    CROP_TRIES,
    Augment,
    _iou_crop,
    plain,
    planned,
)
from detr_exp.structures import Target

SIZE, OUT = (48, 64), (96, 96)
BOXES = np.array([[4, 4, 16, 20], [30, 10, 60, 44], [20, 30, 26, 40], [0, 0, 64, 6]], float)
RTDETR = {"zoom_out": 0.5, "iou_crop": 0.8, "flip": 0.5}


def statistics(boxes: np.ndarray) -> list[float]:
    """Objects, their mean place and size (fractions of the output), and how many touch its border."""
    if not len(boxes):
        return [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]
    share = boxes / OUT[0]
    sides = share[:, 2:] - share[:, :2]
    centre = (share[:, 2:] + share[:, :2]) / 2
    touching = ((share < 1e-6) | (share > 1 - 1e-6)).any(1).mean()
    return [len(boxes), centre[:, 0].mean(), centre[:, 1].mean(), sides[:, 0].mean(), sides[:, 1].mean(), touching]


def test_the_distribution_is_torchvisions():
    count = 500
    torch.manual_seed(0)
    transform = v2.Compose(
        [
            v2.RandomZoomOut(fill=0),
            v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.RandomHorizontalFlip(),
            v2.Resize(OUT),
            v2.ClampBoundingBoxes(),  # float32 puts some a hair outside, and then they would be dropped
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )
    theirs = []
    canvas = tv_tensors.Image(torch.zeros(3, *SIZE, dtype=torch.uint8))
    for _ in range(count):
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(BOXES).float(), format="XYXY", canvas_size=SIZE)
        sample = {"boxes": boxes, "labels": torch.arange(len(BOXES)), "image": canvas}
        theirs.append(statistics(transform(sample)["boxes"].numpy()))
    augment = Augment(**RTDETR)
    rngs = (np.random.default_rng((1, i)) for i in range(10 * count))
    ours = [statistics(augment.plan(rng, SIZE, BOXES, OUT).boxes_xyxy) for rng in rngs]
    theirs, ours = np.array(theirs).round(3), np.array(ours).round(3)
    error = np.sqrt(theirs.var(0) / len(theirs) + ours.var(0) / len(ours))
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 4 * error + 1e-9).all()
    for column in range(theirs.shape[1]):
        # Kolmogorov-Smirnov: the largest distance of the two distribution functions, critical value for 0.1 %
        a, b = np.sort(theirs[:, column]), np.sort(ours[:, column])
        points = np.concatenate([a, b])
        distance = np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)
        assert np.abs(distance).max() < 1.95 * np.sqrt(1 / len(a) + 1 / len(b))


def test_evaluation_only_resizes():
    plan = plain(SIZE, BOXES, OUT)
    assert (plan.source, plan.target) == ((0, 0, 64, 48), (0, 0, 96, 96))
    np.testing.assert_allclose(plan.boxes_xyxy, BOXES * [1.5, 2, 1.5, 2])
    assert plan.keep.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("mirrored", "upended", "expected"),
    [
        (False, False, [20, 40, 60, 80]),
        (True, False, [40, 40, 80, 80]),
        (False, True, [20, 20, 60, 60]),
        (True, True, [40, 20, 80, 60]),
    ],
)
def test_a_view_reaching_beyond_the_image(mirrored, upended, expected):
    """An image of 10 x 10 at (2, 4) of a canvas of 20 x 20 that becomes 100 x 100."""
    boxes = np.array([[2.0, 4.0, 10.0, 12.0]])
    wanted = np.ones(1, bool)
    plan = planned((10, 10), boxes, (100, 100), (-2, -4, 18, 16), wanted, mirrored, upended, None)
    assert plan.source == (0, 0, 10, 10)
    full = [10, 20, 60, 70]
    if mirrored:
        full = [100 - full[2], full[1], 100 - full[0], full[3]]
    if upended:
        full = [full[0], 100 - full[3], full[2], 100 - full[1]]
    assert list(plan.target) == full
    expected = np.array(expected, float)
    clipped = boxes[0].clip(0, 10)
    by_hand = (clipped + np.array([2, 4, 2, 4])) * 5
    if mirrored:
        by_hand[[0, 2]] = 100 - by_hand[[2, 0]]
    if upended:
        by_hand[[1, 3]] = 100 - by_hand[[3, 1]]
    np.testing.assert_allclose(plan.boxes_xyxy[0], by_hand)
    np.testing.assert_allclose(plan.moved(clipped.reshape(2, 2)).min(0), by_hand[:2])


def test_objects_below_a_pixel_are_dropped():
    boxes = np.array([[0, 0, 0.9, 10], [0, 0, 1.1, 10], [20, 20, 40, 40], [70, 0, 90, 10]], float)
    assert plain((64, 64), boxes, (64, 64)).keep.tolist() == [0 + 1, 2]
    assert plain((64, 64), boxes, (6, 6)).keep.tolist() == [2]


def test_kept_objects_have_their_centre_in_the_view():
    augment = Augment(iou_crop=1.0)
    cropped = 0
    for seed in range(200):
        plan = augment.plan(np.random.default_rng(seed), SIZE, BOXES, OUT)
        x0, y0, x1, y1 = plan.source
        cropped += plan.source != (0, 0, SIZE[1], SIZE[0])
        assert plan.target == (0, 0, 96, 96)
        centres = (BOXES[plan.keep, :2] + BOXES[plan.keep, 2:]) / 2
        assert ((centres > (x0, y0)) & (centres < (x1, y1))).all()
        assert len(plan.keep) > 0
        assert 0.5 <= (x1 - x0) / (y1 - y0) <= 2
    assert 145 < cropped < 190  # one overlap in seven, and more of those that can be met, leaves the image whole


def test_zoom_out_fills_at_most_the_canvas():
    augment = Augment(zoom_out=1.0)
    shares = []
    for seed in range(200):
        plan = augment.plan(np.random.default_rng(seed), SIZE, BOXES, OUT)
        left, top, right, bottom = plan.target
        assert 0 <= left < right <= 96
        assert 0 <= top < bottom <= 96
        shares.append((right - left) / 96)
        assert len(plan.keep) == len(BOXES) or shares[-1] < 0.5
    assert min(shares) < 0.28
    assert max(shares) > 0.9


def test_resize_crop_takes_a_square():
    augment = Augment(resize_crop=1.0)
    sides = set()
    for seed in range(100):
        x0, y0, x1, y1 = augment.plan(np.random.default_rng(seed), (480, 640), BOXES * 10, OUT).source
        assert x1 - x0 == y1 - y0
        assert 0 <= x0 < x1 <= 640
        assert 0 <= y0 < y1 <= 480
        sides.add(x1 - x0)
    assert min(sides) >= 384 / 600 * 480 - 1
    assert max(sides) == 480
    assert Augment(resize_crop=1.0).plan(np.random.default_rng(0), (3, 2), BOXES[:0], OUT).source[2] <= 2


def test_the_same_draw_gives_the_same_plan():
    augment = Augment(photometric=1.0, **RTDETR)
    first, second = (augment.plan(np.random.default_rng(5), SIZE, BOXES, OUT) for _ in range(2))
    assert str(first) == str(second)


def test_the_last_epochs_only_flip():
    augment = Augment(photometric=1.0, zoom_out=1.0, iou_crop=1.0, flip=1.0)
    plan = augment.plan(np.random.default_rng(0), SIZE, BOXES, OUT, strong=False)
    assert plan.colour is None
    assert (plan.source, plan.target, plan.mirrored) == ((0, 0, 64, 48), (0, 0, 96, 96), True)


def test_unknown_mirror_images_forbid_flips():
    plan = Augment(flip=1.0, vertical_flip=1.0).plan(np.random.default_rng(0), SIZE, BOXES, OUT, flippable=False)
    assert not plan.mirrored
    assert not plan.upended


@pytest.mark.parametrize("empty", [SIZE, (1, 1), (1, 400), (300, 2)])
def test_images_without_objects_and_of_any_shape(empty):
    augment = Augment(photometric=0.5, resize_crop=0.3, vertical_flip=0.5, **RTDETR)
    for seed in range(50):
        plan = augment.plan(np.random.default_rng(seed), empty, np.zeros((0, 4)), OUT)
        assert plan.boxes_xyxy.shape == (0, 4)
        x0, y0, x1, y1 = plan.source
        assert x1 > x0
        assert y1 > y0


@pytest.mark.parametrize("settings", [{"flip": 1.5}, {"zoom_out": -0.1}, {"zoom_out_max": 0.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=rf"data\.augment\.{next(iter(settings))}"):
        Augment(**settings)


class Draws:
    """The same random numbers for our crop, which samples all tries at once, and for torchvision's, one by one."""

    def __init__(self, seed: int, size: tuple[int, int]) -> None:
        source = np.random.default_rng(seed)
        self.options = source.integers(len(CROP_OVERLAPS), size=20)
        self.tries = source.random((20, CROP_TRIES, 4), np.float32)
        self.size, self.option, self.place = size, -1, [0, 0]

    def integers(self, high: int) -> int:
        self.option += 1
        self.place = [0, 0]
        return int(self.options[self.option])

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        return self.tries[self.option].astype(float)

    def rand(self, count: int) -> torch.Tensor:
        """The sides of the next try; then where it lies, unless its aspect ratio has ended it."""
        number, half = self.place
        numbers = self.tries[self.option, number]
        low, high = CROP_SCALE
        width, height = (int(side * (low + (high - low) * share)) for side, share in zip(self.size[::-1], numbers[:2]))
        goes_on = half == 0 and CROP_ASPECT[0] <= width / height <= CROP_ASPECT[1]
        self.place = [number, 1] if goes_on else [number + 1, 0]
        return torch.from_numpy(numbers[2 * half : 2 * half + 2].copy())


def cropped_by_torchvision(draws: Draws, boxes: np.ndarray, monkeypatch) -> dict:
    """What its random IoU crop and then its sanitising leave of boxes and their numbers."""
    sample = {
        "image": tv_tensors.Image(torch.zeros(1, *draws.size, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=draws.size),
        "labels": torch.arange(len(boxes)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **settings: torch.tensor([draws.integers(settings["high"])]))
        patch.setattr(torch, "rand", draws.rand)
        return v2.SanitizeBoundingBoxes(min_size=1)(v2.RandomIoUCrop()(sample))


@pytest.mark.parametrize("size", [(480, 640), (64, 64)])
def test_a_crop_and_what_it_keeps_are_torchvisions_for_the_same_draws(size, monkeypatch):
    """Draw by draw: what sanitising removes afterwards are boxes below a pixel, which a plan drops as well."""
    height, width = size
    shares = np.array([[0.1, 0.1, 0.8, 0.9], [0.02, 0.02, 0.1, 0.1], [0.9, 0.8, 1.0, 1.0], [0.4, 0.6, 0.4004, 0.6004]])
    boxes = shares * [width, height, width, height]
    shrunk = 0
    for seed in range(150):
        view, within = _iou_crop(Draws(seed, size), (0, 0, width, height), boxes)
        found = cropped_by_torchvision(Draws(seed, size), boxes, monkeypatch)
        out = (view[3] - view[1], view[2] - view[0])
        assert tuple(found["image"].shape[-2:]) == out
        plan = planned(size, boxes, out, view, within, False, False, None)
        assert plan.keep.tolist() == found["labels"].tolist()
        np.testing.assert_allclose(plan.boxes_xyxy, found["boxes"].numpy(), atol=1e-3)
        shrunk += view != (0, 0, width, height)
    assert shrunk > 100


def test_user_defined_operations_come_last_and_use_the_random_numbers_of_their_sample():
    seen = []

    def darker(rng, image, target):
        seen.append(rng.random())
        return image // 2, target

    def fewer(rng, image, target):
        return image, target.kept(torch.tensor([2, 0]))

    image, target = np.full((8, 8, 3), 100, np.uint8), whole(3)
    augment = Augment(operations=[darker, fewer])
    found = [augment.operated(np.random.default_rng(5), image, target) for _ in range(2)]
    assert seen[0] == seen[1] == np.random.default_rng(5).random()
    for pixels, kept in found:
        assert (pixels == 50).all()
        assert kept.labels.tolist() == kept.extra["row"].tolist() == [2, 0]


def test_what_is_no_operation_is_refused():
    with pytest.raises(ValueError, match=r"data\.augment\.operations has 'rain', which is no operation"):
        Augment(operations=["rain"])
    assert Augment(operations=None).operations == ()


def whole(count):
    boxes = torch.full((count, 4), 0.5)
    return Target(torch.arange(count), boxes, extra={"row": torch.arange(count)})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda image, target: (image[:4], target), "another kind of image"),
        (lambda image, target: (image / 255, target), "another kind of image"),
        (lambda image, target: (image, replace(target, boxes=target.boxes[:1])), "3, 1, 3 rows"),
        (lambda image, target: (image, replace(target, extra={"row": torch.arange(2)})), "3, 3, 2 rows"),
        (lambda image, target: (image, replace(target, boxes=0 * target.boxes)), "boxes without area"),
        (lambda image, target: (image, replace(target, boxes=target.boxes / 0)), "not finite"),
    ],
)
def test_an_operation_that_spoils_its_sample_is_named(spoil, said):
    class Spoiled:
        def __call__(self, rng, image, target):
            return spoil(image, target)

    with pytest.raises(ValueError, match=f"Spoiled gives back .*{said}"):
        Augment(operations=[Spoiled()]).operated(np.random.default_rng(0), np.zeros((8, 8, 3), np.uint8), whole(3))


def test_objects_of_which_little_is_seen_are_dropped():
    """In pixels of the image and of the output; the smaller of both counts."""
    rng = np.random.default_rng(0)
    assert Augment(least_side=10).plan(rng, SIZE, BOXES, OUT).keep.tolist() == [0, 1]
    assert Augment(least_side=6).plan(rng, SIZE, BOXES, OUT).keep.tolist() == [0, 1, 2, 3]
    assert Augment(least_side=12).plan(rng, SIZE, BOXES, (24, 32)).keep.tolist() == [1]
    tile = Augment(least_side=12).plan(rng, SIZE, BOXES, OUT, tile=(0, 0, 32, 32))
    assert tile.keep.tolist() == [1], "of a mosaic, in its tile"
