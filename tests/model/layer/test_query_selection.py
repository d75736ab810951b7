"""Anchors and the choice of cells."""

import pytest
import torch

from detr_exp.model.layer.query_selection import anchor_logits, inverse_sigmoid, top_cells


def test_anchors_stand_on_cell_centres_and_double_per_level():
    logits, valid = anchor_logits([(4, 8), (2, 4)], torch.float64, torch.device("cpu"))
    assert valid.all()
    boxes = logits.sigmoid()
    torch.testing.assert_close(boxes[0], torch.tensor([1 / 16, 1 / 8, 0.05, 0.05]).double())
    torch.testing.assert_close(boxes[9], torch.tensor([3 / 16, 3 / 8, 0.05, 0.05]).double())
    torch.testing.assert_close(boxes[-1], torch.tensor([7 / 8, 3 / 4, 0.1, 0.1]).double())


def test_the_published_size_has_8084_valid_anchors():
    logits, valid = anchor_logits([(80, 80), (40, 40), (20, 20)], torch.float32, torch.device("cpu"))
    assert len(valid) == 8400
    assert valid.sum() == 8084
    assert (logits[~valid[:, 0]].sigmoid() == 1).all()
    assert logits.isfinite().all()


def test_padded_cells_have_no_anchor():
    padding = torch.zeros(2, 32, dtype=torch.bool)
    padding[1, 5] = True
    _, valid = anchor_logits([(4, 8)], torch.float32, torch.device("cpu"), padding)
    assert valid.shape == (2, 32, 1)
    assert (~valid).nonzero().tolist() == [[1, 5, 0]]


def test_inverse_sigmoid_undoes_the_sigmoid_and_stays_finite():
    values = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5])
    assert inverse_sigmoid(values).isfinite().all()
    torch.testing.assert_close(inverse_sigmoid(values).sigmoid(), values.clamp(0, 1), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "activation", "chosen"),
    [
        ("default", "sigmoid", [1, 2]),  # best class of each cell
        ("one2many", "sigmoid", [1, 1]),  # cell 1 twice, with two classes
        ("default", "softmax", [2, 0]),  # the last column is the background, which is sure of itself in cell 1
    ],
)
def test_which_cells_are_chosen(method, activation, chosen):
    logits = torch.tensor([[[1.0, 0.0, 0.5], [5.0, 4.0, 9.0], [2.0, 3.0, 0.0]]])
    if activation == "sigmoid":
        logits = logits[..., :2]
    assert top_cells(logits, 2, method, activation)[0].tolist() == chosen
