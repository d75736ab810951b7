"""Every loss against the formula written out entry by entry, and the effect of each parameter."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from detr_exp.loss.classification import bce, ce, focal, ia_bce, mal, vfl

CLASSES = 4
LABELS = torch.tensor([2, CLASSES, 0, CLASSES, 3])
QUALITY = torch.tensor([0.7, 0.0, 0.2, 0.0, 0.0], dtype=torch.float64)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return (torch.randn(5, CLASSES, dtype=torch.float64) * 2).requires_grad_()


def entrywise(logits, formula):
    """`formula(score, is_class, quality) -> loss` at every (query, class)."""
    return torch.tensor(
        [
            [formula(1 / (1 + math.exp(-x)), LABELS[i].item() == c, QUALITY[i].item()) for c, x in enumerate(row)]
            for i, row in enumerate(logits.tolist())
        ],
        dtype=torch.float64,
    )


def cross_entropy(p, t):
    return -t * math.log(p) - (1 - t) * math.log(1 - p)


def test_vfl(logits):
    loss = vfl(logits, LABELS, QUALITY, num_classes=CLASSES, alpha=0.75, gamma=1.5, label_smoothing=0.0)

    def formula(p, is_class, q):
        return q * cross_entropy(p, q) if is_class else 0.75 * p**1.5 * cross_entropy(p, 0)

    torch.testing.assert_close(loss, entrywise(logits, formula))


def test_mal(logits):
    loss = mal(logits, LABELS, QUALITY, num_classes=CLASSES, alpha=0.6, gamma=1.5, label_smoothing=0.0)

    def formula(p, is_class, q):
        return cross_entropy(p, q**1.5) if is_class else 0.6 * p**1.5 * cross_entropy(p, 0)

    torch.testing.assert_close(loss, entrywise(logits, formula))


def test_focal_is_torchvisions(logits):
    loss = focal(logits, LABELS, QUALITY, num_classes=CLASSES, alpha=0.3, gamma=1.5, label_smoothing=0.0)
    one_hot = F.one_hot(LABELS, CLASSES + 1)[:, :-1].double()
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits, one_hot, alpha=0.3, gamma=1.5))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_finite_gradients_at_extreme_logits(gamma):
    extreme = torch.tensor([[90.0, -90.0], [-90.0, 90.0], [18.0, -18.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 2])
    focal(extreme, labels, torch.zeros(3), num_classes=2, alpha=0.25, gamma=gamma, label_smoothing=0.0).sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_bce(logits):
    loss = bce(logits, LABELS, QUALITY, num_classes=CLASSES, label_smoothing=0.0)
    torch.testing.assert_close(loss, entrywise(logits, lambda p, is_class, q: cross_entropy(p, float(is_class))))


def test_ia_bce(logits):
    loss = ia_bce(logits, LABELS, QUALITY, num_classes=CLASSES, alpha=0.25)

    def formula(p, is_class, q):
        t = max(p**0.25 * q**0.75, 0.01)
        return cross_entropy(p, t) if is_class else -(p**2) * math.log(1 - p)

    torch.testing.assert_close(loss, entrywise(logits, formula))


def test_ia_bce_gradient_flows_through_the_negative_weight_only(logits):
    """d/dx of -p^2 log(1 - p) at negatives; the target of positives is a constant."""
    ia_bce(logits, LABELS, QUALITY, num_classes=CLASSES, alpha=0.25).sum().backward()

    def slope(p, is_class, q):
        if is_class:
            return p - max(p**0.25 * q**0.75, 0.01)
        return -2 * p * p * (1 - p) * math.log(1 - p) + p**3

    torch.testing.assert_close(logits.grad, entrywise(logits, slope))


def test_ce_weighs_background():
    torch.manual_seed(0)
    logits = torch.randn(5, CLASSES + 1)
    loss = ce(logits, LABELS, QUALITY, num_classes=CLASSES, eos_coef=0.1, label_smoothing=0.0)
    plain = F.cross_entropy(logits, LABELS, reduction="none")
    torch.testing.assert_close(loss, plain * torch.where(LABELS == CLASSES, 0.1, 1.0))


def test_only_the_scores_of_vfl_and_mal_are_pulled(logits):
    """Their weights are constants: the gradient is weight times (score - target)."""
    for loss in (vfl, mal):
        logits.grad = None
        loss(logits, LABELS, QUALITY, num_classes=CLASSES, alpha=0.75, gamma=2.0, label_smoothing=0.0).sum().backward()
        p = logits.detach().sigmoid()
        negatives = F.one_hot(LABELS, CLASSES + 1)[:, :-1] == 0
        torch.testing.assert_close(logits.grad[negatives], (0.75 * p**2 * p)[negatives])


SHAPES = {
    vfl: {"alpha": 0.75, "gamma": 2.0},
    mal: {"alpha": 1.0, "gamma": 1.5},
    focal: {"alpha": 0.25, "gamma": 2.0},
    bce: {},
}


@pytest.mark.parametrize("loss", [vfl, mal])
def test_smoothing_lowers_the_quality(loss, logits):
    smoothed = loss(logits, LABELS, QUALITY, num_classes=CLASSES, label_smoothing=0.2, **SHAPES[loss])
    lowered = loss(logits, LABELS, QUALITY * 0.8, num_classes=CLASSES, label_smoothing=0.0, **SHAPES[loss])
    torch.testing.assert_close(smoothed, lowered)


def test_smoothing_of_bce_spreads_the_target_of_matches_only(logits):
    loss = bce(logits, LABELS, QUALITY, num_classes=CLASSES, label_smoothing=0.3)
    target = torch.zeros(5, CLASSES, dtype=torch.float64)
    target[LABELS < CLASSES] = 0.1
    target[LABELS < CLASSES, LABELS[LABELS < CLASSES]] = 0.7
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, target, reduction="none"))


def test_smoothing_of_focal_uses_the_spread_target(logits):
    loss = focal(logits, LABELS, QUALITY, num_classes=CLASSES, alpha=0.3, gamma=2.0, label_smoothing=0.3)
    target = torch.zeros(5, CLASSES, dtype=torch.float64)
    target[LABELS < CLASSES] = 0.1
    target[LABELS < CLASSES, LABELS[LABELS < CLASSES]] = 0.7
    torch.testing.assert_close(loss, sigmoid_focal_loss(logits, target, alpha=0.3, gamma=2.0))


@pytest.mark.parametrize("loss", [bce, focal])
def test_one_class_has_nothing_to_spread_over(loss):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 1), torch.tensor([0, 1, 0])
    shape = SHAPES[loss]
    smoothed = loss(logits, labels, torch.rand(3), num_classes=1, label_smoothing=0.3, **shape)
    assert torch.equal(smoothed, loss(logits, labels, torch.rand(3), num_classes=1, label_smoothing=0.0, **shape))


def test_smoothing_of_ce_is_torchs():
    logits = torch.randn(5, CLASSES + 1, generator=torch.Generator().manual_seed(0))
    loss = ce(logits, LABELS, QUALITY, num_classes=CLASSES, eos_coef=1.0, label_smoothing=0.1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1))


@pytest.mark.parametrize("loss", [*SHAPES, ce])
def test_no_smoothing_changes_no_bit(loss):
    """The smallest smoothing tends to none, and none takes the plain path."""
    torch.manual_seed(0)
    logits = torch.randn(5, CLASSES + (loss is ce))
    quality = QUALITY.float()
    shape = {"eos_coef": 0.1} if loss is ce else SHAPES[loss]
    plain = loss(logits, LABELS, quality, num_classes=CLASSES, label_smoothing=0.0, **shape)
    tiny = loss(logits, LABELS, quality, num_classes=CLASSES, label_smoothing=1e-30, **shape)
    assert torch.equal(plain, tiny)
