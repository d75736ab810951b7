import pytest
import torch

from detr_exp.loss import box
from detr_exp.loss.matches import Matches, Stack
from detr_exp.matcher.hungarian import Assignment
from detr_exp.structures import Prediction, Targets

BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]])
OBJECTS = torch.tensor([[0.6, 0.5, 0.4, 0.4], [0.8, 0.2, 0.2, 0.2]])
IOU = torch.tensor([0.12 / 0.20, 0.0])
GIOU = torch.tensor([0.6, -0.08 / 0.16])


def matched(boxes: torch.Tensor, objects: torch.Tensor = OBJECTS) -> Matches:
    """One layer of one image, every query matched with the object of its number."""
    number = torch.arange(len(objects))[None]
    pairs = Assignment(torch.zeros_like(number), number, number, counts=(len(objects),))
    prediction = Prediction(torch.zeros(1, 1, len(boxes), 2), boxes[None, None])
    stack = Stack(frozenset(["layers"]), prediction, pairs, [""], 1, 1.0, 1.0)
    targets = Targets(torch.zeros(len(objects), dtype=torch.int64), objects, (len(objects),))
    return Matches([stack], targets, num_classes=2, activation="sigmoid")


def test_losses_by_hand():
    matches = matched(BOXES)
    torch.testing.assert_close(box.l1(matches), [torch.tensor([[0.1, 0.6]])])
    torch.testing.assert_close(box.giou(matches, overlap=None), [1 - GIOU[None]])
    torch.testing.assert_close(box.quality(matches, overlap=None), IOU)


@pytest.mark.parametrize(("overlap", "quality"), [("iou", IOU), ("giou", GIOU.clamp(min=0))])
def test_overlaps_weigh_the_giou_loss_and_are_the_quality(overlap, quality):
    matches = matched(BOXES)
    torch.testing.assert_close(box.quality(matches, overlap=overlap), quality)
    torch.testing.assert_close(box.giou(matches, overlap=overlap), [((1 - GIOU) * quality)[None]])


@pytest.mark.parametrize("overlap", [None, "iou", "giou"])
def test_quality_is_a_constant(overlap):
    boxes = BOXES.clone().requires_grad_()
    matches = matched(boxes)
    quality = box.quality(matches, overlap=overlap)
    assert not quality.requires_grad
    weight = 1 if overlap is None else quality
    (gradient,) = torch.autograd.grad(box.giou(matches, overlap=overlap)[0].sum(), boxes)
    (expected,) = torch.autograd.grad((box.giou(matched(boxes), overlap=None)[0] * weight).sum(), boxes)
    torch.testing.assert_close(gradient, expected)


def test_no_pairs_stay_in_the_graph():
    boxes = BOXES.clone().requires_grad_()
    matches = matched(boxes, OBJECTS[:0])
    (box.l1(matches)[0].sum() + box.giou(matches, overlap=None)[0].sum()).backward()
    assert boxes.grad is not None
    assert torch.equal(boxes.grad, torch.zeros_like(boxes))


def test_another_overlap_is_refused():
    with pytest.raises(ValueError, match=r"loss\.boxes_weight_format=iou"):
        box.quality(matched(BOXES), overlap="diou")
