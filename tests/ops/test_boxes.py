import pytest
import torch
from torchvision.ops import box_iou as all_pairs_iou
from torchvision.ops import generalized_box_iou as all_pairs_giou

from detr_exp.ops.boxes import box_iou, cxcywh_to_xyxy, iou_and_giou, xyxy_to_cxcywh


def random_corners(count: int, seed: int) -> torch.Tensor:
    boxes = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cxcywh_to_xyxy(boxes * torch.tensor([1, 1, 0.5, 0.5]) + 0.01)


def test_formats_by_hand():
    corners = cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6]))
    torch.testing.assert_close(corners, torch.tensor([0.4, 0.1, 0.6, 0.7]))
    torch.testing.assert_close(xyxy_to_cxcywh(corners), torch.tensor([0.5, 0.4, 0.2, 0.6]))


def test_a_negative_size_counts_as_zero():
    boxes = torch.tensor([0.5, 0.5, -0.2, 0.4])
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), torch.tensor([0.5, 0.3, 0.5, 0.7]))


def test_overlaps_by_hand():
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])
    assert box_iou(a, b).item() == pytest.approx(1 / 7)
    assert iou_and_giou(a, b)[1].item() == pytest.approx(1 / 7 - 2 / 9)
    apart = torch.tensor([3.0, 0.0, 4.0, 2.0])
    assert box_iou(a, apart).item() == 0
    assert iou_and_giou(a, apart)[1].item() == pytest.approx(-2 / 8)


def test_overlaps_equal_torchvision():
    a, b = random_corners(40, 0), random_corners(30, 1)
    torch.testing.assert_close(box_iou(a[:, None], b), all_pairs_iou(a, b))
    torch.testing.assert_close(iou_and_giou(a[:, None], b)[1], all_pairs_giou(a, b))


DEGENERATE = {
    "same point": ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]),
    "two points": ([0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9]),
    "line in a box": ([0.2, 0.5, 0.8, 0.5], [0.0, 0.0, 1.0, 1.0]),
    "inverted": ([0.8, 0.8, 0.2, 0.2], [0.0, 0.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_boxes_have_finite_values_and_gradients(case):
    a, b = (torch.tensor(box, requires_grad=True) for box in DEGENERATE[case])
    giou = iou_and_giou(a, b)[1]
    assert box_iou(a, b).item() == 0
    assert -1 <= giou.item() <= 0
    giou.backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert b.grad is not None
    assert b.grad.isfinite().all()
