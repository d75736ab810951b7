"""A few steps of training beside the `rfdetr` package: what they differ by is rounding, not another assignment."""

import pytest
import torch
from rfdetr_peer import criterion_for, peer, peer_input, twin, two_images

from detr_exp.structures import Targets

COUNTS, STEPS = (4, 2), 3


def trained():
    """Of each step of RF-DETR Seg: both losses, and both sets of (image, query, object) of every layer."""
    from rfdetr.models.lwdetr import build_criterion_from_config

    theirs, *configs = peer(
        *("SegNano", "Segmentation"), num_classes=2, resolution=144, group_detr=3, num_queries=20, num_select=20
    )
    ours = twin(theirs, configs[0]).train()
    theirs.train()
    generator = torch.Generator().manual_seed(3)
    targets = Targets(
        labels=torch.tensor([0, 1, 1, 0, 1, 0]),
        boxes=(torch.rand(6, 4, generator=generator) * 0.4 + 0.2),
        counts=COUNTS,
        masks=torch.rand(6, 144, 144, generator=generator) > 0.5,
    )
    parts = zip(*(getattr(targets, name).split(COUNTS) for name in ("labels", "boxes", "masks")))
    their_targets = [dict(zip(("labels", "boxes", "masks"), part)) for part in parts]
    criteria = build_criterion_from_config(*configs)[0].train(), criterion_for(num_classes=3)
    matched = [], []
    criteria[0].matcher.forward = _noting(criteria[0].matcher.forward, matched[0])
    criteria[1].matcher = _noting(criteria[1].matcher, matched[1])
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-4) for network in (theirs, ours)]
    images = two_images(144, 144)
    for step in range(STEPS):
        torch.manual_seed(step)  # points on masks are sampled
        terms = criteria[0](theirs(peer_input(ours, images)), their_targets)
        expected = sum(terms[name] * weight for name, weight in criteria[0].weight_dict.items() if name in terms)
        torch.manual_seed(step)
        actual = criteria[1](ours(images), targets, num_boxes=6)["total"]
        yield expected.item(), actual.item(), _their_pairs(matched[0]), _our_pairs(matched[1])
        for optimizer, loss, seen in zip(optimizers, (expected, actual), matched):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.clear()


def _noting(match, seen):
    def noted(*arguments, **settings):
        seen.append(match(*arguments, **settings))
        return seen[-1]

    return noted


def _their_pairs(layers):
    firsts = (0, COUNTS[0])
    return {
        frozenset(
            (image, query, firsts[image] + target)
            for image, (queries, objects) in enumerate(layer)
            for query, target in zip(queries.tolist(), objects.tolist())
        )
        for layer in layers
    }


def _our_pairs(calls):
    (pairs,) = calls
    return {
        frozenset(zip(*(part[layer].tolist() for part in (pairs.image, pairs.query, pairs.target))))
        for layer in range(len(pairs.query))
    }


@pytest.mark.slow
def test_segmentation_follows_its_peer_up_to_rounding():
    """Rounding grows from step to step; where the losses have come to differ, every match is still the same."""
    errors = []
    for expected, actual, their_pairs, our_pairs in trained():
        assert our_pairs == their_pairs
        errors.append(abs(actual - expected) / expected)
    assert errors[0] < 1e-6
    assert max(errors) < 1e-3
