"""Losses of the distributions of edges, by loops over pairs and queries as the paper writes them."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from detr_exp import train
from detr_exp.loss import box, edge
from detr_exp.loss.criterion import SetCriterion
from detr_exp.loss.matches import union_pairs
from detr_exp.loss.term import Term
from detr_exp.ops.boxes import box_iou, cxcywh_to_xyxy
from detr_exp.ops.edges import edge_positions
from detr_exp.structures import Outputs, Prediction, Targets, mapped

BINS = {"num_bins": 32, "bound": 0.5, "scale": 4.0}
UNION = {"pairs": "union", "divide": "pairs", "needs": ["edges"]}
TERMS = {
    "bbox": Term(function=box.l1, weight=5.0, pairs="union", divide="pairs"),
    "fgl": Term(function=partial(edge.focal, **BINS), weight=0.15, **UNION),
    "ddf": Term(function=partial(edge.distillation, temperature=5.0), weight=1.5, **{**UNION, "divide": "none"}),
}


TERMS["edge_entropy"] = Term(function=edge.entropy, weight=None, at=["layers"], **UNION)


class Edged(NamedTuple):
    logits: Tensor
    boxes: Tensor
    edges: Tensor
    reference: Tensor


@pytest.fixture
def make_edged(make_outputs):
    """`make_edged(targets, ...)`: as `make_outputs`, and layers predict distributions of edges around one reference."""

    def make(targets: Targets, dtype: torch.dtype = torch.float32, spread: float = 1.0, **changes) -> Outputs:
        outputs = make_outputs(targets, dtype=dtype, **changes)
        torch.manual_seed(5)

        def edged(layers: Prediction) -> Edged:
            edges = (spread * torch.randn(*layers.boxes.shape, 33)).cumsum(0).to(dtype).requires_grad_()
            reference = (torch.rand(layers.boxes.shape[1:]) * 0.4 + 0.1).to(dtype).expand_as(layers.boxes)
            return Edged(layers.logits, layers.boxes, edges, reference)

        noisy = outputs.denoising
        noisy = None if noisy is None else noisy._replace(layers=edged(noisy.layers))
        return outputs._replace(layers=edged(outputs.layers), denoising=noisy)

    return make


@pytest.fixture
def criterion(make_criterion) -> SetCriterion:
    return SetCriterion(
        num_classes=5,
        activation="sigmoid",
        matcher=make_criterion().matcher,
        terms=TERMS,
        share_matched_indices=False,
        aux_loss=True,
    )


def union_of(criterion: SetCriterion, outputs: Outputs, targets: Targets) -> list[tuple[int, int, int]]:
    stacked = [Prediction(*outputs.layers[:2]), Prediction(outputs.encoder.logits[None], outputs.encoder.boxes[None])]
    pairs = union_pairs(criterion.matcher(stacked, targets), len(outputs.layers.boxes) - 1)
    return list(zip(*(index[0].tolist() for index in pairs[:3])))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    return box_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)).detach()


def test_the_focal_loss_is_that_of_the_paper(criterion, make_targets, make_edged) -> None:
    targets = make_targets(3, 2)
    outputs = make_edged(targets, torch.float64)
    places, pairs = edge_positions(**BINS).tolist(), union_of(criterion, outputs, targets)
    expected = torch.zeros(3, dtype=torch.float64)
    for layer in range(3):
        for image, query, target in pairs:
            likelihood = outputs.layers.edges[layer, image, query].log_softmax(-1)
            x, y, width, height = outputs.layers.reference[layer, image, query]
            x0, y0, x1, y1 = cxcywh_to_xyxy(targets.boxes[target].double())
            sides = (x - x0) / width, (y - y0) / height, (x1 - x) / width, (y1 - y) / height
            entropy = 0.0
            for side, share in enumerate(sides):
                wanted = min(max(float(share * 4 - 2), -4), 4)
                low = max(i for i in range(32) if places[i] <= wanted)
                right = (wanted - places[low]) / (places[low + 1] - places[low])
                entropy -= (1 - right) * likelihood[side, low] + right * likelihood[side, low + 1]
            expected[layer] += entropy * overlap(
                outputs.layers.boxes[layer, image, query], targets.boxes[target].double()
            )
    found = criterion(outputs, targets, num_boxes=5.0)
    ours = torch.stack([found[f"loss_fgl{suffix}"] for suffix in ("_aux_0", "_aux_1", "")])
    torch.testing.assert_close(ours, 0.15 * expected / len(pairs), rtol=1e-6, atol=1e-9)


def test_the_distillation_is_that_of_the_paper(criterion, make_targets, make_edged) -> None:
    targets = make_targets(3, 2)
    outputs = make_edged(targets, torch.float64, denoising_groups=2)
    object_of = {(image, query): target for image, query, target in union_of(criterion, outputs, targets)}
    noisy = outputs.denoising
    noise = dict(zip(zip(noisy.image.tolist(), noisy.query.tolist()), noisy.target.tolist()))
    roots = math.sqrt(len(object_of)), math.sqrt(2 * 12 - len(object_of))
    found = criterion(outputs, targets, num_boxes=5.0)
    for layers, owned, suffixes in (
        (outputs.layers, object_of, ("_aux_0", "_aux_1", "")),
        (noisy.layers, noise, ("_dn_0", "_dn_1", "_dn_2")),
    ):
        for layer in range(2):
            parts: tuple[list[Tensor], list[Tensor]] = ([], [])
            for image in range(2):
                for query in range(layers.boxes.shape[2]):
                    teacher = (layers.edges[-1, image, query] / 5).softmax(-1)
                    student = (layers.edges[layer, image, query] / 5).softmax(-1)
                    weight = layers.logits[-1, image, query].sigmoid().max()
                    if (image, query) in owned:
                        own = targets.boxes[owned[image, query]].double()
                        weight = overlap(layers.boxes[layer, image, query], own)
                    divergence = (teacher * (teacher.log() - student.log())).sum(-1)
                    parts[(image, query) not in owned].append(25 * weight * divergence)
            means = [torch.cat(part).mean() for part in parts]
            expected = 1.5 * (roots[0] * means[0] + roots[1] * means[1]) / sum(roots)
            torch.testing.assert_close(found[f"loss_ddf{suffixes[layer]}"], expected, rtol=1e-6, atol=0)
        assert found[f"loss_ddf{suffixes[2]}"] == 0


def test_the_last_layer_teaches_and_learns_nothing_from_it(criterion, make_targets, make_edged) -> None:
    targets = make_targets(3, 2)
    outputs = make_edged(targets)
    found = criterion(outputs, targets, num_boxes=5.0)
    inputs = [outputs.layers.edges, outputs.layers.logits, outputs.layers.boxes]
    taught, *others = torch.autograd.grad(found["loss_ddf_aux_0"], inputs, allow_unused=True)
    assert taught[0].abs().sum() > 0
    assert taught[1:].abs().sum() == 0
    assert others == [None, None]
    same = make_edged(targets, spread=0.0)
    assert all(value.abs() < 1e-6 for name, value in criterion(same, targets, num_boxes=5.0).items() if "ddf" in name)


def test_objects_beyond_all_bins_and_batches_without_objects_are_finite(criterion, make_targets, make_edged) -> None:
    targets = make_targets(2, 1)
    targets.boxes[0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    outputs = make_edged(targets)
    small = torch.tensor([0.01, 0.01, 1e-4, 1e-4]).expand_as(outputs.layers.boxes)
    outputs = outputs._replace(layers=outputs.layers._replace(reference=small))
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0, 0))
    outputs.layers.boxes.data[:, :, ::2, 2:] *= -1  # as far as distributions can shift edges
    for wanted in (targets, empty):
        found = criterion(outputs, wanted, num_boxes=float(len(wanted)))
        gradients = torch.autograd.grad(found["total"], [*outputs.layers[:3]], allow_unused=True)
        assert all(value.isfinite() for value in found.values())
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert found["loss_fgl"] == 0
    assert found["loss_ddf_aux_0"] > 0, "queries without an object learn from the last layer"


def test_the_entropy_is_logged_and_no_loss(criterion, make_targets, make_edged) -> None:
    targets = make_targets(3, 2)
    found = {
        spread: criterion(make_edged(targets, spread=spread), targets, num_boxes=5.0) for spread in (0.0, 1.0, 50.0)
    }
    values = [found[spread]["edge_entropy"].item() for spread in (0.0, 1.0, 50.0)]
    assert values[0] == pytest.approx(1.0, abs=1e-5)
    assert values[0] > values[1] > values[2] > 0
    losses = [value for name, value in found[1.0].items() if name.startswith("loss_")]
    torch.testing.assert_close(torch.stack(losses).sum(), found[1.0]["total"])
    assert not found[1.0]["edge_entropy"].requires_grad


def halves(outputs: Outputs, targets: Targets) -> list[tuple[Outputs, Targets]]:
    """Two batches of one image each."""
    first = targets.counts[0]
    found = []
    for image, own in enumerate((slice(0, first), slice(first, None))):
        layers = mapped(outputs.layers, lambda tensor: tensor[:, image : image + 1])  # noqa: B023
        encoder = mapped(outputs.encoder, lambda tensor: tensor[image : image + 1])  # noqa: B023
        part = Targets(targets.labels[own], targets.boxes[own], (targets.counts[image],))
        found.append((Outputs(layers, encoder), part))
    return found


@pytest.mark.parametrize("counts", [(4, 2), (3, 0), (1, 0)])
def test_two_ranks_make_the_loss_of_one_process(counts, criterion, make_targets, make_edged) -> None:
    """The union is counted over both; they exchange one tensor."""
    targets = make_targets(*counts)
    outputs = make_edged(targets)
    whole = criterion(outputs, targets, num_boxes=float(sum(counts)))
    per_rank = dict(num_boxes=sum(counts) / 2, num_images=1.0)
    sent: list[Tensor] = []
    for part in halves(outputs, targets):
        criterion(*part, **per_rank, over_ranks=lambda tensor: sent.append(tensor.clone()) or tensor)
    assert len(sent) == 2
    parts = [criterion(*part, **per_rank, over_ranks=lambda _: sum(sent) / 2) for part in halves(outputs, targets)]
    for name, value in whole.items():
        expected = (parts[0][name] + parts[1][name]) / 2
        if sum(counts) > 1 or "ddf" in name:  # a single object on two ranks counts as one on each
            torch.testing.assert_close(expected, value, rtol=1e-5, atol=1e-7)


def test_micro_batches_differ_from_a_large_one_by_their_pairs_per_object(criterion, make_targets, make_edged) -> None:
    targets = make_targets(4, 2)
    outputs = make_edged(targets)
    parts = halves(outputs, targets)
    share = [len(union_of(criterion, *one)) / len(one[1]) for one in [*parts, (outputs, targets)]]
    low, high = share[2] / max(share[:2]), share[2] / min(share[:2])
    assert low < 1 < high
    whole = criterion(outputs, targets, num_boxes=6.0)
    found = [criterion(*part, num_boxes=6.0, num_images=2) for part in parts]
    for name, value in whole.items():
        if "bbox" in name or "fgl" in name:
            assert low - 1e-5 <= (found[0][name] + found[1][name]) / value <= high + 1e-5


def test_a_network_without_edges_is_refused_in_words(command, capsys) -> None:
    assert command(train.main, "loss=dfine") == 2
    said = capsys.readouterr().err
    assert "is model.num_bins, which the chosen model does not have" in said
    assert "model=..., or another loss, loss=..." in said
