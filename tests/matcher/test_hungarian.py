from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou

from detr_exp.matcher import hungarian
from detr_exp.matcher.hungarian import HungarianMatcher, solve
from detr_exp.structures import Prediction, Target, Targets


def matcher(activation: str = "sigmoid") -> HungarianMatcher:
    return HungarianMatcher(activation=activation, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2.0)


def prediction(layers: int, images: int, queries: int, columns: int, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, queries, columns, generator=generator)
    return Prediction(logits, torch.rand(layers, images, queries, 4, generator=generator))


def objects(*counts: int, classes: int = 5, seed: int = 1) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return Targets.pack(
        [
            Target(torch.randint(0, classes, (n,), generator=generator), torch.rand(n, 4, generator=generator))
            for n in counts
        ]
    )


def cheapest(costs: np.ndarray) -> float:
    """Cost of the best assignment of an `[n, Q]` matrix, by trying all of them."""
    if len(costs) > costs.shape[1]:
        costs = costs.T
    rows = range(len(costs))
    return min(
        sum(costs[i, j] for i, j in zip(rows, chosen)) for chosen in permutations(range(costs.shape[1]), len(costs))
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_assignment_is_cheaper(seed):
    random = np.random.default_rng(seed)
    counts = tuple(int(n) for n in random.integers(0, 7, size=3))
    groups, size, layers = 2, 4, 2
    costs = random.normal(size=(layers, sum(counts), groups * size)).astype(np.float32)
    image, query, target = solve(costs, counts, groups)
    assert image.shape == (layers, groups * sum(min(n, size) for n in counts))
    starts = np.cumsum((0, *counts))
    for layer in range(layers):
        for b, n in enumerate(counts):
            for group in range(groups):
                mine = (image[layer] == b) & (query[layer] // size == group)
                q, t = query[layer, mine], target[layer, mine]
                assert len(set(q)) == len(set(t)) == len(q) == min(n, size)
                assert set(t) <= set(range(starts[b], starts[b + 1]))
                if n:
                    block = costs[layer, starts[b] : starts[b + 1], group * size : (group + 1) * size]
                    assert costs[layer, t, q].sum() == pytest.approx(cheapest(block), abs=1e-5)


def test_pairs_are_ordered_by_image_and_query():
    pairs = matcher()([prediction(3, 2, 8, 5)], objects(4, 3), groups=2)
    place = pairs.image * 8 + pairs.query
    assert (place.diff(dim=1) > 0).all()
    assert pairs.counts == (8, 6)


def test_perfect_predictions_find_their_objects():
    targets = objects(3, 2)
    order = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
    logits, boxes = torch.full((1, 2, 5, 5), -4.0), torch.full((1, 2, 5, 4), 0.01)
    for b, (queries, labels, own) in enumerate(zip(order, targets.labels.split([3, 2]), targets.boxes.split([3, 2]))):
        logits[0, b, queries, labels], boxes[0, b, queries] = 4.0, own
    pairs = matcher()([Prediction(logits, boxes)], targets)
    assert pairs.query.tolist() == [[0, 2, 4, 1, 3]]
    assert pairs.target.tolist() == [[1, 2, 0, 3, 4]]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_batch_equals_its_images_and_layers_alone(activation):
    columns = 6 if activation == "softmax" else 5
    layers, encoder = prediction(3, 3, 12, columns), prediction(1, 3, 12, columns, seed=5)
    targets = objects(4, 0, 7)
    pairs = matcher(activation)([layers, encoder], targets)
    stacked = [*(layers.at(i) for i in range(3)), encoder.at(0)]
    starts = (0, 4, 4, 11)
    for s, one in enumerate(stacked):
        for b in range(3):
            own = slice(starts[b], starts[b + 1])
            alone = matcher(activation)(
                [Prediction(one.logits[None, b : b + 1], one.boxes[None, b : b + 1])],
                Targets(targets.labels[own], targets.boxes[own], (starts[b + 1] - starts[b],)),
            )
            mine = pairs.image[s] == b
            assert torch.equal(pairs.query[s, mine], alone.query[0])
            assert torch.equal(pairs.target[s, mine], alone.target[0] + starts[b])


def test_chunks_change_nothing(monkeypatch):
    sets, targets = [prediction(3, 2, 12, 5)], objects(9, 4)
    whole = matcher()(sets, targets)
    monkeypatch.setattr(hungarian, "CPU_CHUNK", 1)
    chunked = matcher()(sets, targets)
    assert chunked.counts == whole.counts
    assert np.array_equal(chunked.host, whole.host)
    assert all(torch.equal(one, other) for one, other in zip(whole[:3], chunked[:3]))


def test_without_objects_there_are_no_pairs_and_no_copy(monkeypatch):
    monkeypatch.setattr(hungarian, "to_host", lambda _: pytest.fail("asked the device for nothing"))
    pairs = matcher()([prediction(3, 2, 8, 5)], objects(0, 0))
    assert pairs.query.shape == (3, 0)
    assert pairs.counts == (0, 0)


def test_more_objects_than_queries_match_every_query():
    pairs = matcher()([prediction(1, 1, 4, 5)], objects(9))
    assert pairs.query.tolist() == [[0, 1, 2, 3]]
    assert len(set(pairs.target[0].tolist())) == 4


def test_costs_that_are_not_finite_are_avoided_and_counted():
    sets = prediction(1, 1, 6, 5)
    sets.boxes[0, 0, 2] = torch.nan
    sets.boxes[0, 0, 4, 0] = torch.inf
    ours = matcher()
    pairs = ours([sets], objects(4))
    assert pairs.query.tolist() == [[0, 1, 3, 5]]
    assert ours.num_non_finite == 8
    assert ours([sets], objects(6)).query.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_class_agnostic_prediction_sees_one_class():
    layers, agnostic, targets = prediction(2, 2, 8, 5), prediction(1, 2, 8, 1, seed=3), objects(3, 4)
    pairs = matcher()([layers, agnostic], targets)
    alone = matcher()([agnostic], Targets(torch.zeros_like(targets.labels), targets.boxes, targets.counts))
    assert torch.equal(pairs.query[2], alone.query[0])
    assert torch.equal(pairs.target[2], alone.target[0])


def test_each_cost_decides():
    """Two queries, one object: each is better in one respect only."""
    logits = torch.tensor([[[[3.0], [-3.0]]]])
    boxes = torch.tensor([[[[0.2, 0.2, 0.1, 0.1], [0.6, 0.6, 0.2, 0.2]]]])
    targets = Targets(torch.tensor([0]), torch.tensor([[0.6, 0.6, 0.2, 0.2]]), (1,))
    for costs, winner in (((1, 0, 0), 0), ((0, 1, 0), 1), ((0, 0, 1), 1)):
        names = zip(("cost_class", "cost_bbox", "cost_giou"), costs)
        one = HungarianMatcher(activation="sigmoid", alpha=0.25, gamma=2.0, **{k: float(v) for k, v in names})
        assert one([Prediction(logits, boxes)], targets).query.item() == winner


def test_useless_settings_are_refused():
    with pytest.raises(ValueError, match=r"matcher\.cost_class=2"):
        HungarianMatcher(activation="sigmoid", cost_class=0, cost_bbox=0, cost_giou=0, alpha=0.25, gamma=2.0)
    with pytest.raises(ValueError, match="'tanh'"):
        matcher("tanh")


@pytest.mark.slow
def test_compiled_costs_give_the_same_pairs():
    eager, compiled = matcher(), matcher()
    compiled.compile()
    for seed, counts in enumerate([(3, 5), (0, 2), (9, 1, 4)]):
        predictions = [prediction(3, len(counts), 40, 5, seed), prediction(1, len(counts), 40, 1, seed + 10)]
        targets = objects(*counts, seed=seed)
        expected, found = eager(predictions, targets), compiled(predictions, targets)
        assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3]))


def test_late_in_a_training_only_score_and_overlap_decide():
    """As libreyolo has it: the probability of the class times the fourth power of the IoU."""
    found, targets = prediction(2, 2, 6, 5), objects(3, 2)
    late = HungarianMatcher(
        activation="sigmoid", cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2.0, late_epoch=3
    )
    early = matcher()([found], targets)
    for epoch, same in ((0, True), (2, True), (3, False), (9, False), (1, True)):
        late.begin_epoch(epoch)
        pairs = late([found], targets)
        assert np.array_equal(pairs.host, early.host) == same
        if not same:
            for layer in range(2):
                for image, (first, count) in enumerate(((0, 3), (3, 2))):
                    mine = slice(first, first + count)
                    probability = found.logits[layer, image][:, targets.labels[mine]].sigmoid()
                    boxes = box_convert(found.boxes[layer, image], "cxcywh", "xyxy")
                    overlap = box_iou(boxes, box_convert(targets.boxes[mine], "cxcywh", "xyxy"))
                    costs = -(probability * overlap**4).numpy()
                    chosen = pairs.host[:, layer, pairs.host[0, layer] == image]
                    assert costs[chosen[1], chosen[2] - first].sum() == pytest.approx(cheapest(costs), abs=1e-6)
