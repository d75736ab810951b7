"""The criterion against the one of RT-DETRv2 in transformers: the same outputs in, the same terms and pairs out."""

from types import SimpleNamespace

import pytest
import torch

oracle = pytest.importorskip("transformers.loss.loss_rt_detr")

CLASSES = 7
CONFIG = SimpleNamespace(
    matcher_class_cost=2.0,
    matcher_bbox_cost=5.0,
    matcher_giou_cost=2.0,
    use_focal_loss=True,
    matcher_alpha=0.25,
    matcher_gamma=2.0,
    num_labels=CLASSES,
    weight_loss_vfl=1.0,
    weight_loss_bbox=5.0,
    weight_loss_giou=2.0,
    eos_coefficient=1e-4,
    focal_loss_alpha=0.75,
    focal_loss_gamma=2.0,
)


def per_image(targets):
    counts = list(targets.counts)
    pairs = zip(targets.labels.split(counts), targets.boxes.split(counts))
    return [{"class_labels": labels, "boxes": boxes.double()} for labels, boxes in pairs]


def as_oracle_outputs(outputs):
    """Ours in its dictionary; the encoder is its last auxiliary output."""
    stack = [outputs.layers.at(i) for i in range(len(outputs.layers.boxes))]
    named = [{"logits": one.logits, "pred_boxes": one.boxes} for one in (*stack, outputs.encoder)]
    *auxiliary, last, encoder = named
    converted = {**last, "auxiliary_outputs": [*auxiliary, encoder]}
    denoising = outputs.denoising
    if denoising is not None:
        images = range(denoising.layers.boxes.shape[1])
        converted["dn_auxiliary_outputs"] = [
            {"logits": denoising.layers.logits[i], "pred_boxes": denoising.layers.boxes[i]} for i in range(len(stack))
        ]
        converted["denoising_meta_values"] = {
            "dn_positive_idx": [denoising.query[denoising.image == b] for b in images],
            "dn_num_group": denoising.groups,
        }
    return converted


@pytest.mark.parametrize("counts", [(3, 2), (0, 5, 1), (4, 0)])
def test_all_terms_and_gradients(counts, make_criterion, make_targets, make_outputs):
    targets = make_targets(*counts, num_classes=CLASSES)
    outputs = make_outputs(targets, columns=CLASSES, queries=20, denoising_groups=3, dtype=torch.float64)
    theirs = oracle.RTDetrLoss(CONFIG)(as_oracle_outputs(outputs), per_image(targets))
    leaves = [outputs.layers.logits, outputs.layers.boxes, outputs.denoising.layers.logits, outputs.encoder.boxes]
    expected = torch.autograd.grad(sum(theirs.values()), leaves)

    ours = make_criterion(num_classes=CLASSES)(outputs, targets, num_boxes=float(sum(counts)))
    assert len(ours) == len(theirs) + 1 == 22
    for name, term in theirs.items():
        name = name.replace("loss_vfl", "loss_class").replace("_aux_2", "_enc")
        torch.testing.assert_close(ours[name], term, rtol=0, atol=1e-5)
    for gradient, other in zip(torch.autograd.grad(ours["total"], leaves), expected):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "focal"), [("vfl", True), ("ce", False)])
def test_pairs(name, focal, make_criterion, make_targets, make_outputs):
    targets = make_targets(6, 0, 9, num_classes=CLASSES)
    outputs = make_outputs(targets, columns=CLASSES + (name == "ce"), queries=30)
    pairs = make_criterion(name, num_classes=CLASSES).matcher([outputs.layers], targets)
    theirs = oracle.RTDetrHungarianMatcher(SimpleNamespace(**{**vars(CONFIG), "use_focal_loss": focal}))
    labels = [{**one, "boxes": one["boxes"].float()} for one in per_image(targets)]
    first = (0, 6, 6)
    for layer in range(3):
        indices = theirs({"logits": outputs.layers.logits[layer], "pred_boxes": outputs.layers.boxes[layer]}, labels)
        for b, (query, target) in enumerate(indices):
            mine = pairs.image[layer] == b
            assert torch.equal(pairs.query[layer, mine], query)
            assert torch.equal(pairs.target[layer, mine] - first[b], target)
