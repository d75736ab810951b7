import math

import torch

from detr_exp.model.layer.reference import embed_boxes, refine_boxes


def test_no_change_keeps_the_box():
    boxes = torch.rand(5, 4)
    torch.testing.assert_close(refine_boxes(torch.zeros(5, 4), boxes), boxes)


def test_changes_are_in_sizes_of_the_box():
    box = torch.tensor([0.5, 0.6, 0.2, 0.4])
    moved = refine_boxes(torch.tensor([1.0, -0.5, math.log(2), 0.0]), box)
    torch.testing.assert_close(moved, torch.tensor([0.7, 0.4, 0.4, 0.4]))


def test_boxes_stay_exact_in_half_precision():
    box = torch.rand(3, 4)
    assert refine_boxes(torch.zeros(3, 4, dtype=torch.bfloat16), box).dtype == torch.float32


def test_embedding_is_sines_and_cosines_in_the_order_y_x_w_h():
    box = [0.3, 0.8, 0.1, 0.45]
    actual = embed_boxes(torch.tensor([box]), 6)
    expected = [
        (math.sin if k % 2 == 0 else math.cos)(2 * math.pi * value / 10000 ** (2 * (k // 2) / 6))
        for value in (box[1], box[0], box[2], box[3])
        for k in range(6)
    ]
    torch.testing.assert_close(actual, torch.tensor([expected]))
