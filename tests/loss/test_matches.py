"""The pairs that a term receives, and custom fields of predictions in terms."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_exp.loss import box, classification
from detr_exp.loss.criterion import SetCriterion
from detr_exp.loss.matches import Matches, union_pairs
from detr_exp.loss.term import Term
from detr_exp.matcher.hungarian import Assignment
from detr_exp.structures import Outputs, Prediction, Target, Targets, leaves, mapped


class Cornered(NamedTuple):
    """A prediction with a field of its own."""

    logits: torch.Tensor
    boxes: torch.Tensor
    corners: torch.Tensor
    masks: None = None
    keypoints: None = None


def assignment(rows: list[list[tuple[int, int, int]]], images: int) -> Assignment:
    """From (image, query, target) of each layer."""
    host = np.array(rows, dtype=np.int64).transpose(2, 0, 1)
    counts = tuple(np.bincount(host[0, 0], minlength=images).tolist())
    return Assignment(*torch.from_numpy(host.copy()), counts=counts, host=host)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_union_by_brute_force(seed: int, layers: int) -> None:
    draw = np.random.default_rng(seed)
    counts, queries = (2, 0, 3), 5
    rows = []
    for _ in range(layers):
        row, first = [], 0
        for image, count in enumerate(counts):
            chosen = sorted(draw.choice(queries, count, replace=False).tolist())
            row += [(image, query, first + int(t)) for query, t in zip(chosen, draw.permutation(count))]
            first += count
        rows.append(row)
    last = layers - 1
    found = union_pairs(assignment(rows, len(counts)), last)
    votes = Counter(pair for row in rows for pair in row)
    expected = set()
    for image, query in {(image, query) for image, query, _ in votes}:
        mine = [pair for pair in votes if pair[:2] == (image, query)]
        expected.add(min(mine, key=lambda pair: (-votes[pair], pair not in rows[last], pair[2])))
    for layer in range(layers):
        assert set(zip(*(index[layer].tolist() for index in found[:3]))) == expected
    assert found.counts == tuple(sum(pair[0] == image for pair in expected) for image in range(len(counts)))
    assert found.image[0].tolist() == sorted(found.image[0].tolist())


def test_the_union_of_one_layer_is_its_own_and_of_nothing_is_nothing() -> None:
    row = [(0, 1, 1), (0, 3, 0), (1, 0, 2)]
    assert [index[0].tolist() for index in union_pairs(assignment([row], 2), 0)[:3]] == [
        list(part) for part in zip(*row)
    ]
    empty = Assignment(*torch.zeros(3, 2, 0, dtype=torch.int64), counts=(0,), host=np.zeros((3, 2, 0), dtype=np.int64))
    assert union_pairs(empty, 1).query.shape == (2, 0)


def corners(matches: Matches, *, scale: float) -> list[torch.Tensor]:
    """A loss on a field that only `Cornered` has."""
    predicted = matches.of_pairs(lambda prediction: prediction.corners)
    return matches.by_layer(scale * (predicted - matches.target_boxes).square().sum(-1))


def ignored(matches: Matches) -> list[torch.Tensor]:
    """A field that a custom source gives every object."""
    return matches.by_layer(matches.targets.extra["weight"][matches.target])


@pytest.fixture
def cornered(make_targets, make_outputs):
    targets = make_targets(3, 2)
    outputs = make_outputs(targets)

    def own(prediction: Prediction) -> Cornered:
        return Cornered(prediction.logits, prediction.boxes, (prediction.boxes.detach() + 0.1).requires_grad_())

    return outputs._replace(layers=own(outputs.layers), encoder=own(outputs.encoder)), targets


def criterion(matcher, **terms: Term) -> SetCriterion:
    return SetCriterion(
        num_classes=5, activation="sigmoid", matcher=matcher, terms=terms, share_matched_indices=False, aux_loss=True
    )


def test_a_field_of_a_networks_own_arrives_at_its_term(cornered, make_criterion) -> None:
    outputs, targets = cornered
    targets.extra["weight"] = torch.arange(5.0)
    matcher = make_criterion().matcher
    made = criterion(
        matcher,
        **{"class": Term(function=partial(classification.of_queries, loss=loss, overlap=None), weight=1.0)},
        corners=Term(function=partial(corners, scale=2.0), weight=0.5, at=["layers"], needs=["corners"]),
        ignored=Term(function=ignored, weight=1.0, at=["encoder"], needs_targets=["weight"]),
        absent=Term(function=corners, weight=1.0, needs=["edges"]),
    )
    terms = made(outputs, targets, num_boxes=5.0)
    places = {f"loss_class{s}" for s in ("", "_aux_0", "_aux_1", "_enc")}
    assert set(terms) == places | {f"loss_corners{s}" for s in ("", "_aux_0", "_aux_1")} | {"loss_ignored_enc", "total"}
    assert terms["loss_ignored_enc"] == sum(range(5)) / 5
    pairs = matcher([outputs.layers], targets)
    chosen = outputs.layers.corners[2, pairs.image[2], pairs.query[2]] - targets.boxes[pairs.target[2]]
    torch.testing.assert_close(terms["loss_corners"], chosen.square().sum() / 5)
    terms["total"].backward()
    assert outputs.layers.corners.grad.abs().sum() > 0


def loss(logits, labels, quality, *, num_classes):
    return logits.sigmoid()


def test_terms_use_the_pairs_of_their_rule_and_divide_by_them(make_targets, make_outputs, make_criterion) -> None:
    targets = make_targets(3, 2)
    outputs = make_outputs(targets, denoising_groups=2)
    matcher = make_criterion().matcher
    own = criterion(matcher, bbox=Term(function=box.l1, weight=1.0))(outputs, targets, num_boxes=5.0)
    union = criterion(matcher, bbox=Term(function=box.l1, weight=1.0, pairs="union", divide="pairs"))
    together = union(outputs, targets, num_boxes=5.0)
    encoder = Prediction(outputs.encoder.logits[None], outputs.encoder.boxes[None])
    pairs = union_pairs(matcher([outputs.layers, encoder], targets), 2)
    assert pairs.query.shape[1] > 5
    for layer, suffix in enumerate(("_aux_0", "_aux_1", "")):
        chosen = outputs.layers.boxes[layer, pairs.image[layer], pairs.query[layer]]
        expected = (chosen - targets.boxes[pairs.target[layer]]).abs().sum() / pairs.query.shape[1]
        torch.testing.assert_close(together[f"loss_bbox{suffix}"], expected)
    assert together["loss_bbox_dn_0"] == own["loss_bbox_dn_0"], "noisy queries know their objects"
    last = criterion(matcher, bbox=Term(function=box.l1, weight=1.0, pairs="last"))(outputs, targets, num_boxes=5.0)
    assert last["loss_bbox"] == own["loss_bbox"]
    assert last["loss_bbox_aux_0"] > own["loss_bbox_aux_0"]


def test_what_is_predicted_before_the_first_layer_is_supervised_too(make_targets, make_outputs, make_criterion) -> None:
    targets = make_targets(3, 2)
    outputs = make_outputs(targets, denoising_groups=2)
    noisy = outputs.denoising
    whole = outputs._replace(initial=outputs.layers.at(0), denoising=noisy._replace(initial=noisy.layers.at(0)))
    plain, terms = (make_criterion()(one, targets, num_boxes=5.0) for one in (outputs, whole))
    parts = ("loss_class", "loss_bbox", "loss_giou")
    assert set(terms) - set(plain) == {f"{part}{suffix}" for part in parts for suffix in ("_pre", "_dn_pre")}
    for part in parts:
        assert terms[f"{part}_pre"] == terms[f"{part}_aux_0"]
        assert terms[f"{part}_dn_pre"] == terms[f"{part}_dn_0"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"pairs": "best"}, "own, last, union"),
        ({"divide": "pixels"}, "objects, pairs, queries"),
        ({"at": ["decoder"]}, "layers, initial"),
        ({"divide": "queries"}, "background: 0.1"),
    ],
)
def test_mistakes_in_the_table_are_named(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        Term(function=box.l1, weight=1.0, **wrong)


def test_predictions_that_are_no_named_tuple_are_refused(make_targets, make_outputs, make_criterion) -> None:
    outputs = make_outputs(targets := make_targets(1))
    outputs = outputs._replace(layers=SimpleNamespace(**outputs.layers._asdict()))
    with pytest.raises(ValueError, match="predicts a SimpleNamespace; it has to be a NamedTuple"):
        make_criterion()(outputs, targets, num_boxes=1)


def test_trees_are_mapped_whatever_their_fields() -> None:
    one = Cornered(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 5))
    outputs = Outputs({"a": [one, None, 3]}, initial=one)
    made = mapped(outputs, lambda tensor: tensor[0] * 2)
    assert made.layers["a"][0].corners.tolist() == [2.0] * 5
    assert made.layers["a"][1:] == [None, 3]
    assert len(list(leaves(outputs))) == 6
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,))
    assert mapped(empty, torch.Tensor.double) is empty


def test_what_else_is_known_of_objects_is_packed_and_moved() -> None:
    parts = [
        Target(torch.zeros(n, dtype=torch.int64), torch.zeros(n, 4), extra={"w": torch.ones(n)}) for n in (2, 0, 1)
    ]
    packed = Targets.pack(parts)
    assert packed.extra["w"].tolist() == [1.0] * 3
    assert packed.to(torch.device("meta")).extra["w"].is_meta
