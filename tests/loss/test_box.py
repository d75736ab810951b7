import pytest
import torch

from detr_exp.loss.box import pair_losses

BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]])
OBJECTS = torch.tensor([[0.6, 0.5, 0.4, 0.4], [0.8, 0.2, 0.2, 0.2]])
IOU = torch.tensor([0.12 / 0.20, 0.0])
GIOU = torch.tensor([0.6, -0.08 / 0.16])


def test_losses_by_hand():
    losses = pair_losses(BOXES, OBJECTS)
    torch.testing.assert_close(losses.bbox, torch.tensor([0.1, 0.6]))
    torch.testing.assert_close(losses.giou, 1 - GIOU)
    torch.testing.assert_close(losses.quality, IOU)


@pytest.mark.parametrize(("overlap", "quality"), [("iou", IOU), ("giou", GIOU.clamp(min=0))])
def test_overlaps_weigh_the_giou_loss_and_are_the_quality(overlap, quality):
    losses = pair_losses(BOXES, OBJECTS, overlap)
    torch.testing.assert_close(losses.quality, quality)
    torch.testing.assert_close(losses.giou, (1 - GIOU) * quality)
    torch.testing.assert_close(losses.bbox, torch.tensor([0.1, 0.6]))


@pytest.mark.parametrize("overlap", [None, "iou", "giou"])
def test_quality_is_a_constant(overlap):
    boxes = BOXES.clone().requires_grad_()
    losses = pair_losses(boxes, OBJECTS, overlap)
    assert not losses.quality.requires_grad
    weight = 1 if overlap is None else losses.quality
    (gradient,) = torch.autograd.grad(losses.giou.sum(), boxes)
    (expected,) = torch.autograd.grad(((pair_losses(boxes, OBJECTS).giou) * weight).sum(), boxes)
    torch.testing.assert_close(gradient, expected)


def test_no_pairs_stay_in_the_graph():
    boxes = BOXES.clone().requires_grad_()
    losses = pair_losses(boxes[:0], OBJECTS[:0])
    (losses.bbox.sum() + losses.giou.sum()).backward()
    assert boxes.grad is not None
    assert torch.equal(boxes.grad, torch.zeros_like(boxes))
