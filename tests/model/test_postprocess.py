"""From logits and boxes to detections, by hand (transformers' is compared in test_rtdetrv2_parity.py)."""

from types import SimpleNamespace

import pytest
import torch

from detr_exp.model.head.mask import finite_masks
from detr_exp.model.postprocess import best_detections, best_in_pixels
from detr_exp.structures import MaskLogits, Prediction

LOGITS = torch.tensor([[[0.0, 2.0, -1.0], [3.0, 1.0, -2.0]]])


def test_sigmoid_ranks_pairs_of_query_and_class():
    scores, labels, queries = best_detections(LOGITS, 3, "sigmoid")
    assert labels.tolist() == [[0, 1, 1]]
    assert queries.tolist() == [[1, 0, 1]]
    torch.testing.assert_close(scores, torch.tensor([[3.0, 2.0, 1.0]]).sigmoid())


def test_softmax_ranks_queries_by_their_best_class_and_drops_the_background():
    logits = torch.tensor([[[0.0, 2.0, 9.0], [3.0, 1.0, -2.0]]])
    scores, labels, queries = best_detections(logits, 5, "softmax")
    assert labels.tolist() == [[0, 1]]
    assert queries.tolist() == [[1, 0]]
    torch.testing.assert_close(scores[0, 0], logits[0, 1].softmax(-1)[0])


def test_no_more_detections_than_there_are_pairs():
    assert best_detections(LOGITS, 100, "sigmoid")[0].shape == (1, 6)


@pytest.mark.parametrize("cut", [False, True])
def test_boxes_come_out_in_pixels_of_each_image_cut_if_the_network_cuts_boxes(cut):
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.5], [0.25, 0.5, 0.5, 0.5]]])
    network = SimpleNamespace(activation="sigmoid", num_queries=2, cuts_boxes=cut)
    pred = Prediction(LOGITS.expand(2, -1, -1), boxes.expand(2, -1, -1))
    first, second = best_in_pixels(network, pred, torch.tensor([[100, 200], [10, 10]])).detections()
    assert first.boxes.tolist() == [
        [0.0, 25.0, 100.0, 75.0],
        [50.0, 0.0, 150.0, 100.0] if cut else [50.0, -25.0, 150.0, 125.0],
    ]
    assert second.boxes.tolist() == [[0.0, 2.5, 5.0, 7.5], [2.5, 0.0, 7.5, 10.0] if cut else [2.5, -2.5, 7.5, 12.5]]
    assert first.labels.tolist() == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("what", ["logits", "boxes"])
def test_what_is_not_finite_is_no_sure_detection(what, activation, bad):
    """A sigmoid makes 1 of an infinity; the queries beside it keep their bits."""
    logits, boxes = torch.randn(1, 4, 3), torch.rand(1, 4, 4)
    sizes, network = torch.tensor([[10, 20]]), SimpleNamespace(activation=activation, num_queries=12, cuts_boxes=True)
    [before] = best_in_pixels(network, Prediction(logits, boxes), sizes).detections()
    {"logits": logits, "boxes": boxes}[what][0, 1] = bad
    [actual] = best_in_pixels(network, Prediction(logits, boxes), sizes).detections()
    left = actual.finite()
    gone = (before.boxes[:, None] != left.boxes).any(-1).all(1)
    assert 0 < len(left) == len(actual) - int(gone.sum()) < len(actual)
    kept = before.scores[~gone]
    assert torch.equal(left.scores, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masks_of_numbers_that_are_not_finite_are_told(bad):
    """As pixels they are true or false, and nothing tells them apart."""
    masks = MaskLogits(torch.randn(2, 4, 3, 3), torch.randn(2, 5, 4), torch.zeros(1))
    masks.queries[0, 3, 1] = bad
    chosen = torch.tensor([4, 3, 0])
    assert finite_masks(masks, 0, chosen).tolist() == [True, False, True]
    assert finite_masks(masks, 1, chosen).all()
    masks.features[1, 0, 0, 0] = bad
    assert not finite_masks(masks, 1, chosen).any()
