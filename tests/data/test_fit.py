"""Images with their proportions: where they lie, and that everything comes back to the original pixel."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detr_exp.data.augment import Augment, plain, planned
from detr_exp.data.collate import Sample, collate
from detr_exp.data.content import Objects
from detr_exp.data.fit import STRETCH, Fit, buckets_of, fit_of, sizes_of, use_one_size, written
from detr_exp.data.loader import _operated
from detr_exp.data.render import fitted, layer, render, target_of
from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.ops.canvas import canvas_sizes
from detr_exp.structures import Target

FIT = Fit("letterbox", (124, 116, 104))
OUT = (96, 128)
SIZES = [(48, 64), (200, 90), (90, 200), (301, 77), (31, 500)]
ORDER = np.arange(3)[None]  # of keypoints that are not swapped


def objects_of(size, rng, count=5):
    """Objects with boxes of at least a third of the image, polygons that fill them, and keypoints at three corners."""
    height, width = size
    low = rng.random((count, 2)) * 0.4
    boxes = np.concatenate([low, low + 1 / 3 + rng.random((count, 2)) * 0.25], 1) * [width, height, width, height]
    x0, y0, x1, y1 = boxes.T
    points = np.stack([np.stack([x, y, np.full(count, 2.0)], 1) for x, y in ((x0, y0), (x1, y0), (x1, y1))], 1)
    polygons = [[[a, b, c, b, c, d, a, d]] for a, b, c, d in boxes.tolist()]
    return Objects(np.zeros(count, np.int64), boxes, polygons, points.astype(np.float32))


def target(plan, objects):
    return target_of(plan, objects, objects.categories, with_masks=True, flip_order=ORDER)


@pytest.mark.parametrize("size", SIZES)
def test_targets_come_back_to_the_original_pixel(size):
    objects = objects_of(size, np.random.default_rng(0))
    plan = plain(size, objects.boxes_xyxy, OUT, FIT)
    found = target(plan, objects)
    content = FIT.content(size, OUT)
    height, width = canvas_sizes(torch.tensor([size]), torch.tensor([content]), OUT)[0].tolist()
    whole = torch.tensor([width, height, width, height])
    np.testing.assert_allclose(cxcywh_to_xyxy(found.boxes) * whole, objects.boxes_xyxy[plan.keep], atol=1e-3)
    np.testing.assert_allclose(found.keypoints[..., :2] * whole[:2], objects.keypoints[plan.keep, :, :2], atol=1e-3)
    assert not found.masks[:, content[0] :].any()
    assert not found.masks[:, :, content[1] :].any()
    for mask, box in zip(found.masks.numpy(), plan.boxes_xyxy):
        rows, columns = np.nonzero(mask)
        spanned = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(spanned - box).max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_pixels_lie_where_the_boxes_say(size):
    """A bright rectangle on black, whatever happens to the image; around it nothing but the fill."""
    augment = Augment(flip=0.5, vertical_flip=0.5, iou_crop=0.5, zoom_out=0.5, resize_crop=0.3)
    height, width = size
    box = np.array([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]]).round()
    image = np.zeros((*size, 3), np.uint8)
    x0, y0, x1, y1 = box[0].astype(int)
    image[y0:y1, x0:x1] = 255
    for seed in range(30):
        plan = augment.plan(np.random.default_rng(seed), size, box, OUT, fit=FIT)
        shown = layer([(plan, image)], FIT)
        content = plan.frame[:1:-1]
        assert (shown[content[0] :] == FIT.fill).all()
        assert (shown[:, content[1] :] == FIT.fill).all()
        expected = np.zeros(content, bool)
        for x0, y0, x1, y1 in plan.boxes_xyxy.round().astype(int):
            expected[y0:y1, x0:x1] = True
        seen = shown[: content[0], : content[1], 0]
        inner = np.zeros_like(expected)
        for x0, y0, x1, y1 in plan.boxes_xyxy.round().astype(int):
            inner[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = True
        assert (seen[inner] > 200).all()
        if len(plan.boxes_xyxy) == len(box):
            outside = np.ones_like(expected)
            for x0, y0, x1, y1 in plan.boxes_xyxy.round().astype(int):
                outside[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = False
            assert (seen[outside] < 60).all()


def test_proportions_of_what_is_seen_are_kept():
    augment = Augment(iou_crop=1.0, zoom_out=0.5)
    size, boxes = (120, 300), np.array([[10, 10, 280, 100]], float)
    for seed in range(50):
        plan = augment.plan(np.random.default_rng(seed), size, boxes, OUT, fit=FIT)
        x0, y0, x1, y1 = plan.source
        left, top, right, bottom = plan.target
        across, down = (right - left) / (x1 - x0), (bottom - top) / (y1 - y0)
        assert abs(across - down) * max(x1 - x0, y1 - y0) <= 2  # pixels of the output


def test_evaluation_shows_what_its_plan_says():
    image = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    shown = fitted(image, OUT, FIT)
    assert shown.shape == (*OUT, 3)
    np.testing.assert_allclose(
        shown.astype(int), layer([(plain((90, 200), np.zeros((0, 4)), OUT, FIT), image)], FIT), atol=2
    )
    assert (shown[58:] == FIT.fill).all()
    assert np.array_equal(fitted(image, OUT, STRETCH), fitted(image, OUT, Fit()))


def test_without_a_fit_plans_and_pixels_are_those_of_a_stretch():
    image = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    boxes = np.array([[10, 10, 150, 80]], float)
    augment = Augment(flip=0.5, iou_crop=0.5, zoom_out=0.5)
    for seed in range(20):
        plan = augment.plan(np.random.default_rng(seed), (90, 200), boxes, OUT)
        assert plan.frame == (0, 0, OUT[1], OUT[0])
        assert np.array_equal(render(plan, image), layer([(plan, image)], STRETCH))
        left, top, right, bottom = plan.target
        black = render(plan, image).copy()
        black[top:bottom, left:right] = 0
        assert not black.any()


def sample(content):
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    return Sample(torch.zeros(*OUT, 3, dtype=torch.uint8), nothing, (48, 64), 1, content)


def test_a_batch_has_a_mask_wherever_images_are_padded():
    mask = collate([sample((96, 128)), sample((96, 40))]).padding_mask
    assert mask.shape == (2, *OUT)
    assert (~mask).sum((1, 2)).tolist() == [96 * 128, 96 * 40]
    assert collate([sample((96, 128))]).padding_mask is not None  # the same computation as beside others
    assert collate([sample(None)]).padding_mask is None


def test_the_fill_is_what_the_network_sees_as_zero():
    network = SimpleNamespace(pixel_mean=torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    assert fit_of("letterbox", network) == FIT
    assert fit_of(None, network) == fit_of("stretch", SimpleNamespace()) == STRETCH


def test_another_name_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.fit is 'pad'; use one of stretch, letterbox, short_side: data\.fit=letterbox"
    ):
        fit_of("pad", SimpleNamespace())


def test_operations_change_the_image_and_not_its_padding():
    """A user's own mirror: without the padding it is the mirror of the plan."""

    def mirror(rng, image, target):
        boxes = target.boxes * torch.tensor([-1.0, 1, 1, 1]) + torch.tensor([1.0, 0, 0, 0])
        keypoints = target.keypoints * torch.tensor([-1.0, 1, 1]) + torch.tensor([1.0, 0, 0])
        return image[:, ::-1].copy(), replace(target, boxes=boxes, masks=target.masks.flip(2), keypoints=keypoints)

    size = (90, 60)
    objects = objects_of(size, np.random.default_rng(0))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    plan = plain(size, objects.boxes_xyxy, OUT, FIT)
    augment = Augment(operations=[mirror])
    shown, found = _operated(
        augment, np.random.default_rng(0), layer([(plan, image)], FIT), target(plan, objects), plan.frame[:1:-1]
    )
    everything = np.ones(len(objects), bool)
    mirrored = planned(size, objects.boxes_xyxy, OUT, (0, 0, 60, 90), everything, True, False, None, fit=FIT)
    expected = target(mirrored, objects)
    assert np.abs(shown.astype(int) - layer([(mirrored, image)], FIT)).max() <= 1
    torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.keypoints, expected.keypoints, atol=1e-5, rtol=0)
    assert (found.masks == expected.masks).float().mean() > 0.98


BUCKETS = Fit("short_side", (0, 0, 0), buckets_of((64, 128), 16))


def test_buckets_are_between_both_sides_and_in_both_directions():
    wide = ((64, 64), (64, 80), (64, 96), (64, 112), (64, 128))
    assert set(BUCKETS.buckets) == {*wide, *((width, height) for height, width in wide)}
    assert buckets_of((128, 64), 16) == BUCKETS.buckets
    with pytest.raises(ValueError, match=r"one shape, that of a letterbox.*model\.image_size=\[64,96\]"):
        buckets_of((64, 64), 32)


@pytest.mark.parametrize(
    "size", [(100, 100), (100, 130), (130, 100), (480, 640), (640, 426), (30, 60), (333, 500), (99, 1)]
)
def test_the_short_side_has_its_length_and_little_is_padded(size):
    """Where the long side fits; and as of a letterbox otherwise."""
    canvas = BUCKETS.canvas(size, (64, 128))
    content = BUCKETS.content(size, canvas)
    assert canvas in BUCKETS.buckets
    assert (size[0] > size[1]) <= (canvas[0] >= canvas[1])
    if max(size) / min(size) <= 2:
        assert min(content) == 64
        assert max(canvas) - max(content) < 16, "no smaller bucket would do"
    else:
        assert max(content) == 128


def test_without_buckets_the_input_is_that_of_the_network():
    assert Fit("letterbox").canvas((3, 5), (64, 128)) == (64, 128)


SEVERAL = ((320, 480), (480, 320), (400, 400))


def several(image_size=SEVERAL[0]):
    return SimpleNamespace(image_size=image_size, stride=32, pixel_mean=torch.zeros(3, 1, 1), buckets=SEVERAL)


@pytest.mark.parametrize("name", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (50, 50), (47, 60), (100, 150), (600, 480), (0, 0)])
def test_of_several_sizes_an_image_gets_the_nearest_in_proportions(name, size):
    fit = fit_of(name, several())
    chosen = fit.canvas(size, SEVERAL[0])
    apart = {
        one: max(a, b) / min(a, b) for one in SEVERAL for a, b in [(one[0] * max(1, size[1]), one[1] * max(1, size[0]))]
    }
    assert apart[chosen] == min(apart.values())
    assert name == "letterbox" or fit.content(size, chosen) == chosen


def test_a_member_of_another_size_has_that_size_alone():
    assert sizes_of(several()) == SEVERAL
    assert sizes_of(several((400, 400))) == ()
    assert fit_of(None, several((400, 400))) == STRETCH
    network = several()
    use_one_size(network)
    assert sizes_of(network) == ()


def test_sizes_are_written_as_overrides():
    assert written(SEVERAL) == "[[320,480],[480,320],[400,400]]"
    assert written(SEVERAL[:1]) == "[320,480]"
