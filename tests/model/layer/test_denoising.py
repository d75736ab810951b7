"""Denoising queries: against transformers' with the same seed, and what must hold for any draw."""

import math
from dataclasses import replace

import pytest
import torch

from detr_exp.model.layer.denoising import group_count, noisy_queries
from detr_exp.structures import Target, Targets

SETTINGS = {
    "num_classes": 7,
    "num_queries": 5,
    "num_denoising": 10,
    "label_noise_ratio": 0.5,
    "box_noise_scale": 1.0,
}


def some_targets(*counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = [torch.rand(n, 4, generator=generator) * 0.4 + 0.3 for n in counts]
    return Targets.pack([Target(torch.randint(7, (len(b),), generator=generator), b) for b in boxes])


@pytest.mark.parametrize("counts", [(2, 0, 3), (1,), (10, 4), (25, 3), (11,)])
def test_equal_those_of_transformers_with_the_same_seed(counts):
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import get_contrastive_denoising_training_group

    targets = some_targets(*counts)
    theirs = [
        {"class_labels": labels, "boxes": boxes}
        for labels, boxes in zip(targets.labels.split(counts), targets.boxes.split(counts))
    ]
    torch.manual_seed(3)
    labels, boxes, mask, meta = get_contrastive_denoising_training_group(theirs, 7, 5, lambda labels: labels, 10)
    torch.manual_seed(3)
    ours = noisy_queries(targets, **SETTINGS)
    assert ours.labels.tolist() == labels.tolist()
    torch.testing.assert_close(ours.places, boxes, rtol=1e-5, atol=1e-5)
    assert ours.groups == meta["dn_num_group"]
    assert ours.supervised == meta["dn_num_split"][0]
    assert torch.equal(ours.allowed, mask == 0)
    for image, expected in enumerate(meta["dn_positive_idx"]):
        assert ours.query[ours.image == image].tolist() == expected.tolist()


def test_positives_are_near_copies_and_negatives_far_ones():
    torch.manual_seed(0)
    targets = some_targets(3)
    noisy = noisy_queries(targets, **SETTINGS | {"num_denoising": 300})
    center, size = noisy.places.sigmoid()[0].split(2, dim=-1)
    corners = torch.cat([center - size / 2, center + size / 2], dim=-1).view(-1, 2, 3, 4)
    exact_center, half = targets.boxes[:, :2], targets.boxes[:, 2:] / 2
    moved = (corners - torch.cat([exact_center - half, exact_center + half], dim=-1)).abs() / half.tile(2)
    # Elsewhere the border cut the move, or the box turned inside out and lost its size.
    inside = (corners > 1e-3) & (corners < 1 - 1e-3) & (size.tile(2).view_as(corners) > 1e-3)
    assert (moved[:, 0][inside[:, 0]] <= 1.001).all()
    assert (moved[:, 1][inside[:, 1]] >= 0.999).all()
    assert (moved[:, 1][inside[:, 1]] <= 2.001).all()
    assert 0.45 < moved[:, 0][inside[:, 0]].mean() < 0.55


def test_a_quarter_of_the_labels_is_sampled_again():
    torch.manual_seed(0)
    targets = some_targets(5, 5)
    noisy = noisy_queries(targets, **SETTINGS | {"num_denoising": 5000})
    kept = (noisy.labels.view(2, -1, 5) == targets.labels.view(2, 1, 5)).float().mean()
    assert kept == pytest.approx(1 - 0.25 * 6 / 7, abs=0.01)


def test_every_positive_stands_for_its_object():
    targets = some_targets(2, 0, 3)
    noisy = noisy_queries(targets, **SETTINGS | {"label_noise_ratio": 0.0, "box_noise_scale": 0.0})
    assert noisy.labels[noisy.image, noisy.query].tolist() == targets.labels[noisy.target].tolist()
    torch.testing.assert_close(noisy.places[noisy.image, noisy.query].sigmoid(), targets.boxes[noisy.target])
    assert len(noisy.target) == noisy.groups * len(targets)
    assert (noisy.labels[1] == 7).all()


@pytest.mark.parametrize(
    ("num", "objects", "groups"), [(100, 0, 1), (100, 1, 100), (100, 7, 14), (100, 100, 1), (100, 150, 1)]
)
def test_number_of_groups(num, objects, groups):
    assert group_count(num, objects) == groups


def test_more_objects_than_queries_are_all_denoised_in_one_group():
    noisy = noisy_queries(some_targets(25, 3), **SETTINGS)
    assert noisy.groups == 1
    assert noisy.labels.shape == (2, 50)
    assert noisy.target.tolist() == list(range(28))


@pytest.mark.parametrize(("objects", "size"), [(0, 20), (1, 20), (10, 20), (11, 40), (20, 40), (21, 60), (50, 100)])
def test_compiled_shapes_are_few(objects, size):
    """Multiples of twice `num_denoising`; what is added counts nowhere."""
    noisy = noisy_queries(some_targets(objects, 0), **SETTINGS, fixed_size=True)
    assert noisy.labels.shape == (2, size)
    assert noisy.places.shape == (2, size, 4)
    assert noisy.supervised == 2 * noisy.groups * max(1, objects)
    assert (noisy.labels[:, noisy.supervised :] == 7).all()


@pytest.mark.parametrize("groups", [None, 3])
def test_a_batch_without_objects_makes_one_group_or_as_many_as_other_ranks(groups):
    targets = Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), (0, 0))
    noisy = noisy_queries(targets, **SETTINGS, groups=groups)
    assert noisy.labels.shape == (2, 2 * (groups or 1))
    assert (noisy.labels == 7).all()
    assert noisy.places.isfinite().all()
    assert len(noisy.target) == 0
    embedding = torch.nn.Embedding(8, 4, padding_idx=7)
    embedding(noisy.labels).sum().backward()
    assert embedding.weight.grad is not None


def test_the_number_of_groups_can_be_given():
    assert noisy_queries(some_targets(2), **SETTINGS, groups=3).labels.shape == (1, 12)


def test_a_fixed_size_adds_queries_that_nobody_else_sees():
    targets = some_targets(3)
    torch.manual_seed(0)
    plain = noisy_queries(targets, **SETTINGS)
    torch.manual_seed(0)
    fixed = noisy_queries(targets, **SETTINGS, fixed_size=True)
    assert plain.labels.shape[1] == plain.supervised == fixed.supervised == 18
    assert fixed.labels.shape[1] == 20
    assert torch.equal(fixed.labels[:, :18], plain.labels)
    keep = torch.tensor([*range(18), *range(20, 25)])
    assert torch.equal(fixed.allowed[keep][:, keep], plain.allowed)
    assert not fixed.allowed[keep][:, 18:20].any()
    assert fixed.allowed.any(1).all()


def test_noisy_labels_are_of_classes_that_the_image_has_annotations_of():
    targets = some_targets(4, 3, 2)
    targets.labels[:] = 1
    targets.annotated = torch.tensor([[False, True, False, True, False, False, True], [False, True] + [False] * 5] * 2)[
        :3
    ]
    seen = [set(), set(), set()]
    for seed in range(40):
        torch.manual_seed(seed)
        labels = noisy_queries(targets, **SETTINGS | {"label_noise_ratio": 2.0}).labels
        for image, row in enumerate(labels.tolist()):
            seen[image] |= set(row) - {7}
    assert seen == [{1, 3, 6}, {1}, {1, 3, 6}]


def test_copies_of_keypoints_are_as_similar_as_they_should_be():
    """OKS of 0.5 to 1, that of negatives 0.1 to 0.5, in all directions; unlabelled points, centres and gaps stay."""
    targets, sigmas = some_targets(3, 0, 1), [0.05, 0.1]
    points = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.3
    points[..., 2] = 2
    points[0, 1] = 0
    targets = replace(targets, keypoints=points)
    settings = SETTINGS | {"num_denoising": 600, "sigmas": sigmas, "image_size": (100, 100)}
    noisy = noisy_queries(targets, **settings)
    assert noisy.places.shape == (3, 1200, 3, 2)
    found = noisy.places[noisy.image, noisy.query].sigmoid()
    torch.testing.assert_close(found[:, 0], targets.boxes[noisy.target, :2])
    negatives = noisy.places[noisy.image, noisy.query + 3].sigmoid()
    for copies, low, high in ((found, 0.5, 1.0), (negatives, 0.1, 0.5)):
        apart = copies[:, 1:] - points[noisy.target, :, :2]
        scale = 2 * targets.boxes[noisy.target, 2:].prod(-1)[:, None] * (2 * torch.tensor(sigmas)) ** 2
        labelled = points[noisy.target, :, 2] > 0
        inside = ((copies[:, 1:] > 0.002) & (copies[:, 1:] < 0.998)).all(-1) & labelled
        alike = (-apart.square().sum(-1) / scale).exp()[inside]
        assert low - 1e-3 <= alike.min() < low + 0.1 < high - 0.1 < alike.max() <= high + 1e-3
        angles = torch.atan2(apart[..., 1], apart[..., 0])[inside]
        assert torch.histc(angles, 4, -math.pi, math.pi).min() > len(angles) / 6
        assert (copies[:, 1:][~labelled] < 0.0011).all()
    assert not noisy.places[1].any()
    wide = noisy_queries(targets, **settings | {"image_size": (50, 100), "box_noise_scale": 0.0}).places
    torch.testing.assert_close(wide[noisy.image, noisy.query, 1:].sigmoid()[2], points[2, :, :2])
