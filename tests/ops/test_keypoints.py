import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from detr_exp.ops.keypoints import (
    LOG_SCALE_LIMIT,
    existing_keypoints,
    keypoint_covariance,
    keypoint_errors,
    slot_keypoints,
)


def random_case(seed: int = 0, objects: int = 5, points: int = 4):
    torch.manual_seed(seed)
    predicted = torch.randn(objects, points, 8, dtype=torch.float64)
    target = torch.rand(objects, points, 3, dtype=torch.float64)
    target[..., 2] = torch.randint(0, 3, (objects, points))
    return predicted, target, torch.rand(objects, dtype=torch.float64) * 0.3 + 0.1


def test_errors_by_hand():
    predicted = torch.tensor([[[0.5, 0.6, 0.0, 2.0, math.log(2), 1.0, 0.0, 9.0], [9.0] * 8]])
    target = torch.tensor([[[0.3, 0.7, 1.0], [0.0, 0.0, 0.0]]])
    errors = keypoint_errors(predicted, target, torch.tensor([0.04]), torch.tensor([[True, False]]))
    assert errors.l1.item() == pytest.approx(0.3 / 0.2)
    assert errors.findable.item() == pytest.approx(math.log(2))
    assert errors.visible.item() == pytest.approx(math.log(1 + math.exp(2)))
    # u = (2 * 0.2 + 1 * -0.1, 1 * -0.1)
    assert errors.nll.item() == pytest.approx(0.5 * (0.3**2 + 0.1**2) / 0.04 - math.log(2), rel=1e-5)


def test_likelihood_and_covariance_are_those_of_a_gaussian():
    predicted, target, area = random_case(objects=6, points=1)
    target[..., 2] = 2
    exists = torch.ones(6, 1, dtype=torch.bool)
    nll = keypoint_errors(predicted, target, area, exists).nll
    gaussian = MultivariateNormal(predicted[:, 0, :2], keypoint_covariance(predicted[:, 0], area))
    constant = math.log(2 * math.pi) + area.log()
    torch.testing.assert_close(nll, -gaussian.log_prob(target[:, 0, :2]) - constant)


def test_pairs_broadcast():
    predicted, target, area = random_case()
    exists = torch.ones(5, 4, dtype=torch.bool)
    together = keypoint_errors(predicted[:, None], target, area, exists)
    for i in range(5):
        alone = keypoint_errors(predicted[i].expand(5, -1, -1), target, area, exists)
        for name in alone._fields:
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name))


@pytest.mark.parametrize("case", ["unlabelled", "no area", "no keypoints"])
def test_objects_without_anything_to_compare_give_zero_in_the_graph(case):
    predicted, target, area = random_case(objects=1)
    predicted.requires_grad_()
    exists = torch.ones(1, 4, dtype=torch.bool)
    if case == "unlabelled":
        target.zero_()
    elif case == "no area":
        area.zero_()
    else:
        exists.zero_()
    errors = keypoint_errors(predicted, target, area, exists)
    located = errors.l1 + errors.nll + (errors.findable + errors.visible if case == "no keypoints" else 0)
    assert located.item() == 0
    located.backward()
    assert predicted.grad is not None
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))


def test_the_likelihood_is_bounded():
    _, target, area = random_case()
    target[..., 2] = 2
    sure = torch.zeros(5, 4, 8, dtype=torch.float64)
    sure[..., :2] = target[..., :2]
    sure[..., 4] = sure[..., 6] = 1000.0
    nll = keypoint_errors(sure, target, area, torch.ones(5, 4, dtype=torch.bool)).nll
    torch.testing.assert_close(nll, torch.full_like(nll, -2 * LOG_SCALE_LIMIT))


def test_slots_are_class_major():
    keypoints = torch.arange(2 * 3 * 8.0).view(1, 6, 8)
    assert slot_keypoints(keypoints, 2).shape == (1, 2, 3, 8)
    assert torch.equal(slot_keypoints(keypoints, 2)[:, 1], keypoints[:, 3:])
    assert existing_keypoints([2, 0, 3], torch.device("cpu")).tolist() == [
        [True, True, False],
        [False, False, False],
        [True, True, True],
    ]
