from functools import partial

import pytest
import torch

from detr_exp.loss import classification
from detr_exp.loss.criterion import SetCriterion
from detr_exp.matcher.hungarian import HungarianMatcher
from detr_exp.structures import Denoising, Outputs, Prediction, Target, Targets

SHAPES = {
    "vfl": {"alpha": 0.75, "gamma": 2.0, "label_smoothing": 0.0},
    "focal": {"alpha": 0.25, "gamma": 2.0, "label_smoothing": 0.0},
    "bce": {"label_smoothing": 0.0},
    "mal": {"alpha": 1.0, "gamma": 1.5, "label_smoothing": 0.0},
    "ce": {"eos_coef": 0.1, "label_smoothing": 0.0},
    "ia_bce": {"alpha": 0.25},
}


@pytest.fixture
def make_criterion():
    """`make_criterion("vfl", num_classes=5, ...)`: the criterion as the options of that name configure it."""

    def make(name: str = "vfl", *, num_classes: int = 5, **changes) -> SetCriterion:
        activation = "softmax" if name == "ce" else "sigmoid"
        matcher = HungarianMatcher(
            activation=activation, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2.0
        )
        settings = {
            "class_loss": partial(getattr(classification, name), **SHAPES[name]),
            "weight_class": 1.0,
            "weight_bbox": 5.0,
            "weight_giou": 2.0,
            "weight_mask_ce": 5.0,
            "weight_mask_dice": 5.0,
            "weight_keypoint_l1": 1.0,
            "weight_keypoint_findable": 1.0,
            "weight_keypoint_visible": 1.0,
            "weight_keypoint_nll": 1.0,
            "share_matched_indices": False,
            "boxes_weight_format": None,
            "aux_loss": True,
            "eos_coef": 0.1 if name == "ce" else None,
        }
        return SetCriterion(num_classes=num_classes, activation=activation, matcher=matcher, **(settings | changes))

    return make


@pytest.fixture
def make_targets():
    """`make_targets(3, 0)`: packed targets of images with so many objects."""

    def make(*counts: int, num_classes: int = 5, seed: int = 1) -> Targets:
        g = torch.Generator().manual_seed(seed)
        sizes = torch.tensor([1, 1, 0.4, 0.4])
        return Targets.pack(
            [
                Target(torch.randint(0, num_classes, (n,), generator=g), torch.rand(n, 4, generator=g) * sizes + 0.01)
                for n in counts
            ]
        )

    return make


@pytest.fixture
def make_outputs():
    """`make_outputs(targets, columns=5, ...)`: random outputs with gradients, with or without denoising queries."""

    def make(
        targets: Targets,
        *,
        columns: int = 5,
        layers: int = 3,
        queries: int = 12,
        groups: int = 1,
        encoder: bool = True,
        encoder_columns: int | None = None,
        denoising_groups: int = 0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Outputs:
        g = torch.Generator().manual_seed(seed)
        images, most = len(targets.counts), max(targets.counts)

        def prediction(*shape: int, width: int = columns) -> Prediction:
            logits = torch.randn(*shape, width, generator=g).to(dtype).requires_grad_()
            boxes = torch.rand(*shape, 4, generator=g) * torch.tensor([1, 1, 0.4, 0.4]) + 0.01
            return Prediction(logits, boxes.to(dtype).requires_grad_())

        denoising = None
        if denoising_groups:
            starts = torch.tensor([0, *targets.counts]).cumsum(0)
            pairs = [
                (b, 2 * most * group + i, starts[b] + i)
                for b, n in enumerate(targets.counts)
                for group in range(denoising_groups)
                for i in range(n)
            ]
            image, query, target = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).T
            noisy = prediction(layers, images, max(2 * most * denoising_groups, 2))
            denoising = Denoising(noisy, image, query, target, denoising_groups)
        return Outputs(
            prediction(layers, images, groups * queries),
            prediction(images, groups * queries, width=encoder_columns or columns) if encoder else None,
            denoising,
            groups,
        )

    return make
