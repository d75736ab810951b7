"""Synthetic shapes: a pure function of (seed, split, index), with correct and consistent annotations."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from pycocotools import mask as rle

from detr_exp.data.shapes import MAX_OBJECTS, SHAPES, shapes

PLACES = {"train": 120, "val": 40, "test": 0}


def split(name: str = "train", **settings):
    return shapes(None, PLACES, **{"size": 160, "seed": 0, **settings}).read[name]()


@pytest.fixture(scope="module")
def drawn():
    part = split()
    return [part.load(i) for i in range(len(part))]


def test_an_image_depends_on_nothing_but_seed_split_and_index():
    part, again = split(), pickle.loads(pickle.dumps(split()))
    order = [5, 3, 5, 0]
    first = [part.load(i) for i in order]
    second = [again.load(i) for i in order]
    for (pixels, objects), (other_pixels, other) in zip(first, second):
        np.testing.assert_array_equal(pixels, other_pixels)
        np.testing.assert_array_equal(objects.keypoints, other.keypoints)
    different = [split(seed=1).load(5), split("val").load(5), part.load(6)]
    assert all((pixels != first[0][0]).any() for pixels, _ in different)
    assert part.fingerprint != split(seed=1).fingerprint != split("val").fingerprint


def test_every_class_number_of_objects_and_emptiness_occurs(drawn):
    counts = np.array([len(objects) for _, objects in drawn])
    assert set(range(MAX_OBJECTS + 1)) == set(counts.tolist())
    assert 0.01 < (counts == 0).mean() < 0.12
    labels = np.concatenate([objects.categories for _, objects in drawn])
    shares = np.bincount(labels, minlength=len(SHAPES) + 1)[1:] / len(labels)
    assert (np.abs(shares - 1 / 6) < 0.06).all()


def test_boxes_enclose_the_visible_mask_and_masks_are_disjoint(drawn):
    overlapping = 0
    for pixels, objects in drawn:
        assert pixels.shape == (160, 160, 3)
        if not len(objects):
            continue
        masks = np.stack(objects.segments)
        assert masks.sum(0).max() <= 1
        for mask, (x0, y0, x1, y1) in zip(masks, objects.boxes_xyxy):
            assert mask[int(y0) : int(y1), int(x0) : int(x1)].sum() == mask.sum() >= 12
            assert mask[:, int(x0)].any()
            assert mask[:, int(x1) - 1].any()
            assert mask[int(y0)].any()
            assert mask[int(y1) - 1].any()
        boxes = objects.boxes_xyxy
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        overlapping += ((high - low).clip(0).prod(-1) > 0).sum() - len(boxes)
    assert overlapping > 100


def test_sizes_vary_over_the_promised_range(drawn):
    sides = np.concatenate([(o.boxes_xyxy[:, 2:] - o.boxes_xyxy[:, :2]).max(1) for _, o in drawn if len(o)]) / 160
    assert np.quantile(sides, 0.05) < 0.13
    assert np.quantile(sides, 0.95) > 0.30
    assert sides.max() < 0.37


def test_keypoints_belong_to_their_shape(drawn):
    hidden = visible = 0
    for _, objects in drawn:
        for category, points, mask in zip(objects.categories, objects.keypoints, objects.segments):
            count = len(SHAPES[category - 1].names)
            assert (points[:count, 2] > 0).all()
            assert not points[count:].any()
            assert (points[:, :2] >= 0).all()
            assert (points[:, :2] <= 160).all()
            hidden += (points[:count, 2] == 1).sum()
            for x, y, seen in points[:count]:
                if seen == 2:
                    visible += 1
                    near = mask[max(0, int(y) - 3) : int(y) + 4, max(0, int(x) - 3) : int(x) + 4]
                    assert near.any(), SHAPES[category - 1].name
    assert visible > 1000
    assert hidden > 30


def test_left_and_right_can_be_distinguished():
    """Seen from point 0 towards the middle, left points lie on one side of the axis and right ones on the other."""
    for shape in SHAPES:
        axis = shape.outline.mean(0) - shape.keypoints[0]
        for name, point in zip(shape.names, shape.keypoints):
            side = np.sign(np.cross([*axis, 0], [*(point - shape.keypoints[0]), 0])[2])
            # y points down, and the head of a crescent is below
            expected = {"left": 1, "right": -1}.get(name.split("_")[0], 0) * (-1 if shape.name == "crescent" else 1)
            assert side == expected or abs(point[0]) < 1e-9, (shape.name, name)


def test_colour_does_not_give_the_class_away(drawn):
    means = {label: [] for label in range(1, len(SHAPES) + 1)}
    for pixels, objects in drawn:
        for label, mask in zip(objects.categories.tolist(), objects.segments or []):
            means[label].append(pixels[mask].mean(0))
    centres = np.array([np.mean(colours, 0) for colours in means.values()])
    assert centres.std(0).max() < 20  # single shapes differ by about 60


def test_the_ground_truth_equals_the_objects():
    part = split("val")
    truth = part.truth()
    assert len(truth["images"]) == 40
    by_image = {i: [a for a in truth["annotations"] if a["image_id"] == i] for i in part.image_ids}
    for index, image_id in enumerate(part.image_ids):
        objects = part.objects(index)
        assert [a["category_id"] for a in by_image[image_id]] == objects.categories.tolist()
        for annotation, box, mask in zip(by_image[image_id], objects.boxes_xyxy, objects.segments or []):
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()
            np.testing.assert_array_equal(rle.decode(annotation["segmentation"]), mask)
            assert annotation["num_keypoints"] == len(annotation["keypoints"]) // 3


def test_larger_images_have_the_same_proportions():
    part = split(size=320)
    sides = np.concatenate([(o.boxes_xyxy[:, 2:] - o.boxes_xyxy[:, :2]).max(1) for o in map(part.objects, range(30))])
    assert 0.3 < sides.max() / 320 < 0.37


@pytest.mark.parametrize(
    ("root", "places", "size", "message"),
    [
        ("/data", PLACES, 160, r"data\.root"),
        (None, PLACES, 32, r"data\.source\.size=160"),
        (None, {**PLACES, "train": 0}, 160, r"data\.train=2000"),
    ],
)
def test_impossible_settings_are_refused(root, places, size, message):
    with pytest.raises(ValueError, match=message):
        shapes(root, places, size=size, seed=0)


def test_a_split_of_no_images_does_not_exist():
    assert set(shapes(None, PLACES, size=160, seed=0).read) == {"train", "val"}
