from dataclasses import replace
from functools import partial

import pytest
import torch

from detr_exp.loss import box, classification, keypoint, mask
from detr_exp.loss.criterion import SetCriterion
from detr_exp.loss.term import Term
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
KEYPOINT_PARTS = ("l1", "findable", "visible", "nll")
WEIGHTS = {"class": 1.0, "bbox": 5.0, "giou": 2.0, "mask_ce": 5.0, "mask_dice": 5.0}
WEIGHTS |= {f"keypoint_{part}": 1.0 for part in KEYPOINT_PARTS}


def make_terms(loss, overlap=None, eos_coef=None, **changes) -> dict[str, Term]:
    """The table of `conf/loss/terms/detr.yaml`; `weight_<name>` changes the weight of a term."""
    weights = {name: changes.pop(f"weight_{name}", weight) for name, weight in WEIGHTS.items()}
    assert not changes
    divide = {} if eos_coef is None else {"divide": "queries", "background": eos_coef}
    terms = {
        "class": Term(function=partial(classification.of_queries, loss=loss, overlap=overlap), weight=0, **divide),
        "bbox": Term(function=box.l1, weight=0),
        "giou": Term(function=partial(box.giou, overlap=overlap), weight=0),
    }
    for task, module, parts in (("mask", mask, ("ce", "dice")), ("keypoint", keypoint, KEYPOINT_PARTS)):
        places = {"at": ["layers", "encoder"], "needs": [f"{task}s"], "needs_targets": [f"{task}s"]}
        terms |= {f"{task}_{part}": Term(function=getattr(module, part), weight=0, **places) for part in parts}
    return {name: replace(term, weight=weights[name]) for name, term in terms.items()}


@pytest.fixture
def make_criterion():
    """`make_criterion("vfl", num_classes=5, ...)`: the criterion as the options of that name configure it."""

    def make(name: str = "vfl", *, num_classes: int = 5, **changes) -> SetCriterion:
        activation = "softmax" if name == "ce" else "sigmoid"
        matcher = HungarianMatcher(
            activation=activation, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2.0
        )
        settings = {"share_matched_indices": False, "aux_loss": True}
        settings |= {
            name: changes.pop(name) for name in [*settings, "keypoint_counts", "class_weights"] if name in changes
        }
        loss = changes.pop("class_loss", None) or partial(getattr(classification, name), **SHAPES[name])
        eos_coef = changes.pop("eos_coef", 0.1 if name == "ce" else None)
        table = make_terms(loss, changes.pop("boxes_weight_format", None), eos_coef, **changes)
        return SetCriterion(num_classes=num_classes, activation=activation, matcher=matcher, terms=table, **settings)

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
