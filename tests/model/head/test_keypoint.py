import math

import pytest
import torch

from detr_exp.model.head.keypoint import (
    KeypointQueries,
    attention_among,
    class_evidence,
    placed_keypoints,
    with_keypoints,
)
from detr_exp.structures import Detections

COUNTS = (2, 0, 3)


def output(*shape):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(0))


def test_points_are_offsets_in_sizes_of_the_box_class_by_class():
    reference = torch.tensor([[0.5, 0.4, 0.2, 0.1], [0.3, 0.3, 0.0, 0.0]])
    raw = output(2, 5)
    placed = placed_keypoints(raw, reference, COUNTS)
    assert placed.shape == (2, 9, 8)
    slots = placed.unflatten(1, (3, 3))
    torch.testing.assert_close(slots[0, 0, :2, 0], 0.5 + 0.2 * raw[0, :2, 0])
    torch.testing.assert_close(slots[0, 2, :, 1], 0.4 + 0.1 * raw[0, 2:, 1])
    torch.testing.assert_close(slots[:, 2, :, 2:], raw[:, 2:, 2:])
    assert (slots[:, 1] == 0).all()
    assert (slots[:, 0, 2] == 0).all()
    assert (slots[1, 2, :, :2] == 0.3).all()


def test_evidence_is_summed_over_a_class_and_never_background():
    placed = placed_keypoints(output(4, 5), torch.rand(4, 4), COUNTS)
    evidence = class_evidence(placed, COUNTS, num_logits=4)
    raw = output(4, 5)[..., 7]
    expected = torch.stack([raw[:, :2].sum(1), torch.zeros(4), raw[:, 2:].sum(1), torch.zeros(4)], dim=1)
    torch.testing.assert_close(evidence, expected)


def test_keypoints_see_their_class_and_the_query():
    allowed = attention_among(COUNTS)
    rows = ["111111", "111000", "111000", "100111", "100111", "100111"]
    assert allowed.tolist() == [[cell == "1" for cell in row] for row in rows]
    assert attention_among((0, 4)) is None


def test_queries_start_as_learned_tokens_where_the_gate_is_shut():
    queries = KeypointQueries(hidden_dim=8, num_keypoints=3)
    torch.nn.init.zeros_(queries.modulation[2].weight)
    inputs = torch.randn(2, 5, 8)
    torch.testing.assert_close(queries(inputs), queries.tokens.expand(2, 5, 3, 8))
    torch.nn.init.ones_(queries.modulation[2].bias)  # scale, shift and gate of one
    normal = torch.nn.functional.layer_norm(queries.tokens, (8,))
    torch.testing.assert_close(queries(inputs)[1, 4], queries.out_proj(normal * 2 + 1) + queries.tokens)


def of_one(detections, keypoints, boxes, counts, size, alpha):
    """The detections of one image, each of its own query."""
    best = [
        part[None] for part in (detections.scores, detections.labels, detections.boxes, torch.arange(len(detections)))
    ]
    parts = with_keypoints(best, keypoints[None], boxes[None], counts, size[None], alpha)
    scores, labels, boxes, points, covariance = (part[0] for part in parts)
    return Detections(scores, labels, boxes, keypoints=points, keypoint_covariance=covariance)


def detections(scores=(0.9, 0.6, 0.5), labels=(2, 1, 0)):
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.arange(12.0).view(3, 4))


def scene():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.5, 0.5, 0.3, 0.3], [0.2, 0.2, 0.1, 0.3]])
    return placed_keypoints(0.3 * output(3, 5), boxes, COUNTS), boxes


def test_points_in_pixels_with_their_confidence():
    keypoints, boxes = scene()
    result = of_one(detections(), keypoints, boxes, COUNTS, torch.tensor([100, 200]), 0.0)
    assert result.scores.tolist() == detections().scores.tolist()
    own = keypoints.unflatten(1, (3, 3))[0, 2]
    torch.testing.assert_close(result.keypoints[0, :, :2], own[:, :2] * torch.tensor([200.0, 100.0]))
    torch.testing.assert_close(result.keypoints[0, :, 2], own[:, 2].sigmoid())
    assert (result.keypoints[1] == 0).all()
    assert (result.keypoints[2, 2] == 0).all()
    assert result.keypoint_covariance[1].isnan().all()
    assert result.keypoint_covariance.isnan().all(-1).all(-1).sum(1).tolist() == [0, 3, 1]


def test_covariance_is_the_inverse_precision_times_the_area_of_the_box():
    keypoints, boxes = scene()
    result = of_one(detections(), keypoints, boxes, COUNTS, torch.tensor([100, 200]), 0.0)
    log_l11, l21, log_l22 = keypoints.unflatten(1, (3, 3))[0, 2, 1, 4:7].double()
    factor = torch.stack([torch.stack([log_l11.exp(), l21]), torch.stack([l21 * 0, log_l22.exp()])])
    covariance = 0.4 * 0.2 * (factor.T @ factor).inverse()
    to_pixels = torch.diag(torch.tensor([200.0, 100.0])).double()
    expected = (to_pixels @ covariance @ to_pixels).float()
    torch.testing.assert_close(result.keypoint_covariance[0, 1], expected, rtol=1e-4, atol=1e-4)


def test_unsure_keypoints_lower_the_score_and_the_rank():
    keypoints, boxes = scene()
    slots = keypoints.unflatten(1, (3, 3))
    slots[..., 4:7] = 0
    slots[0, 2, :, 4], slots[0, 2, :, 6] = -2.0, -2.0  # variance exp(4) on both axes
    result = of_one(detections(), slots.flatten(1, 2), boxes, COUNTS, torch.tensor([100, 200]), 0.2)
    # s / (s + trace^0.2): twice a unit variance; none for a class without keypoints
    expected = {2: 0.9 / (0.9 + (2 * math.exp(4)) ** 0.2), 1: 0.6 / 1.6, 0: 0.5 / (0.5 + 2**0.2)}
    assert result.labels.tolist() == sorted(expected, key=expected.get, reverse=True)
    assert result.scores.tolist() == pytest.approx(sorted(expected.values(), reverse=True), abs=1e-5)
    first = result.labels.tolist().index(2)
    assert result.boxes[first].tolist() == detections().boxes[0].tolist()


def test_no_detections_stay_none():
    nothing = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    size = torch.tensor([9, 9])
    assert len(of_one(nothing, torch.zeros(0, 9, 8), torch.zeros(0, 4), COUNTS, size, 0.2)) == 0
