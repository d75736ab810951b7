"""The planar costs equal the plain ones: every query against every object of its image, term by term."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou

from detr_exp.matcher.cost import (
    TaskWeights,
    box_cost,
    keypoint_cost,
    mask_cost,
    object_logits,
    sigmoid_class_cost,
    softmax_class_cost,
)
from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.ops.keypoints import existing_keypoints, keypoint_errors
from detr_exp.structures import MaskLogits, Target, Targets

COUNTS = (3, 0, 5)
IMAGE = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])


@pytest.fixture
def scene():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 10, 6, dtype=torch.float64) * 3
    boxes = torch.rand(2, 3, 10, 4, dtype=torch.float64)
    return logits, boxes, torch.randint(0, 6, (8,)), torch.rand(8, 4, dtype=torch.float64)


def test_sigmoid_class_cost(scene):
    logits, _, labels, _ = scene
    cost = sigmoid_class_cost(object_logits(logits, IMAGE, labels), alpha=0.25, gamma=2.0)
    p = logits.sigmoid()
    plain = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    for place, (image, label) in enumerate(zip(IMAGE, labels)):
        torch.testing.assert_close(cost[:, place], plain[:, image, :, label])


def test_sigmoid_class_cost_of_sure_logits_is_finite_and_ordered():
    cost = sigmoid_class_cost(torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0]), alpha=0.25, gamma=2.0)
    assert cost.isfinite().all()
    assert (cost.diff() < 0).all()


def test_softmax_class_cost(scene):
    logits, _, labels, _ = scene
    cost = softmax_class_cost(object_logits(logits.log_softmax(-1), IMAGE, labels))
    for place, (image, label) in enumerate(zip(IMAGE, labels)):
        torch.testing.assert_close(cost[:, place], -logits.softmax(-1)[:, image, :, label])


def test_box_cost(scene):
    _, boxes, _, target_boxes = scene
    cost = box_cost(boxes.permute(3, 0, 1, 2), target_boxes, IMAGE, cost_bbox=5.0, cost_giou=2.0)
    for layer in range(2):
        for place, image in enumerate(IMAGE):
            l1 = torch.cdist(boxes[layer, image], target_boxes[place : place + 1], p=1)[:, 0]
            corners = cxcywh_to_xyxy(boxes[layer, image]), cxcywh_to_xyxy(target_boxes[place : place + 1])
            plain = 5 * l1 - 2 * generalized_box_iou(*corners)[:, 0]
            torch.testing.assert_close(cost[layer, place], plain)


def test_box_cost_leaves_its_inputs_alone(scene):
    _, boxes, _, target_boxes = scene
    before = boxes.clone(), target_boxes.clone()
    box_cost(boxes.permute(3, 0, 1, 2), target_boxes, IMAGE, cost_bbox=5.0, cost_giou=2.0)
    assert torch.equal(boxes, before[0])
    assert torch.equal(target_boxes, before[1])


def test_mask_cost_of_every_point_is_that_of_the_dense_masks(monkeypatch):
    """With the pixel centres as points, sampling reads every pixel once."""
    torch.manual_seed(0)
    size = 4
    masks = MaskLogits(torch.randn(3, 5, size, size), torch.randn(3, 7, 5), torch.tensor([0.3]))
    target_masks = torch.rand(8, size, size) > 0.5
    rows, columns = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    centres = torch.stack((columns, rows), -1).view(1, -1, 2)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: centres)
    cost = mask_cost(masks, target_masks, COUNTS, TaskWeights(mask_ce=5.0, mask_dice=3.0))
    for place, image in enumerate(IMAGE):
        dense, label = masks.dense()[image].flatten(1), target_masks[place].flatten().float()
        ce = F.binary_cross_entropy_with_logits(dense, label.expand_as(dense), reduction="none").mean(1)
        score = dense.sigmoid()
        dice = 1 - (2 * (score * label).sum(1) + 1) / (score.sum(1) + label.sum() + 1)
        torch.testing.assert_close(cost[place], 5 * ce + 3 * dice)


def test_keypoint_cost():
    torch.manual_seed(0)
    counts, weights = [3, 0, 2], TaskWeights(0, 0, 1.0, 2.0, 3.0, 4.0)
    keypoints = torch.randn(2, 3, 10, 9, 8)
    objects = torch.rand(8, 3, 3)
    objects[..., 2] = torch.randint(0, 3, (8, 3))
    labels, boxes = torch.tensor([0, 1, 2, 2, 0, 0, 2, 1]), torch.rand(8, 4) * 0.3 + 0.1
    split = zip(labels.split(COUNTS), boxes.split(COUNTS), objects.split(COUNTS))
    targets = Targets.pack([Target(a, b, keypoints=c) for a, b, c in split])
    chunk = slice(2, 7)
    cost = keypoint_cost(keypoints, targets, chunk, IMAGE[chunk], counts, [], weights)
    exists = existing_keypoints(counts, keypoints.device)
    for place in range(2, 7):
        label = int(labels[place])
        predicted = keypoints[:, IMAGE[place], :, 3 * label : 3 * label + 3]
        errors = keypoint_errors(predicted, objects[place], boxes[place, 2:].prod(), exists[label])
        plain = errors.l1 + 2 * errors.findable + 3 * errors.visible + 4 * errors.nll
        torch.testing.assert_close(cost[:, place - 2], plain)


def test_cost_of_places_of_keypoints():
    """Of predictions for each class, and of those for all classes together."""
    torch.manual_seed(0)
    counts, sigmas, weights = [3, 2], [0.1, 0.2, 0.3], TaskWeights(keypoint_distance=10.0, keypoint_oks=4.0)
    of_classes = torch.rand(2, 3, 10, 6, 8)
    objects = torch.rand(8, 3, 3)
    objects[..., 2] = torch.randint(0, 3, (8, 3))
    labels, boxes = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1]), torch.rand(8, 4) * 0.3 + 0.1
    split = zip(labels.split(COUNTS), boxes.split(COUNTS), objects.split(COUNTS))
    targets = Targets.pack([Target(a, b, keypoints=c) for a, b, c in split])
    for keypoints in (of_classes, of_classes[..., :3, :2]):
        cost = keypoint_cost(keypoints, targets, slice(0, 8), IMAGE, counts, sigmas, weights)
        for place in range(8):
            label = int(labels[place])
            first = 3 * label if keypoints is of_classes else 0
            apart = (
                keypoints[:, IMAGE[place], :, first : first + counts[label], :2] - objects[place, : counts[label], :2]
            )
            labelled = objects[place, : counts[label], 2] > 0
            scale = 2 * boxes[place, 2:].prod() * (2 * torch.tensor(sigmas[: counts[label]])) ** 2
            alike = ((-apart.square().sum(-1) / scale).exp() * labelled).sum(-1) / (labelled.sum() + 1e-6)
            plain = 10 * (apart.abs().sum(-1) * labelled).sum(-1) - 4 * alike.clamp(min=1e-6)
            torch.testing.assert_close(cost[:, place], plain)
