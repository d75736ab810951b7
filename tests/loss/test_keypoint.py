import pytest
import torch

from detr_exp.loss import keypoint
from detr_exp.loss.matches import Matches, Stack
from detr_exp.matcher.hungarian import Assignment
from detr_exp.ops.keypoints import existing_keypoints, keypoint_errors
from detr_exp.structures import Outputs, Prediction, Target, Targets

COUNTS = [2, 0, 3]


def keypoint_losses(
    layers: list[Prediction], pairs: Assignment, targets: Targets, counts: list[int]
) -> tuple[torch.Tensor, ...]:
    """Of each layer of one stack, summed over its pairs."""
    stack = Stack(frozenset(["layers"]), layers[0], pairs, [""] * len(layers[0].boxes), 1, 1.0, 1.0)
    matches = Matches([stack], targets, num_classes=3, activation="sigmoid", keypoint_counts=tuple(counts))
    terms = (keypoint.l1, keypoint.findable, keypoint.visible, keypoint.nll)
    return tuple(term(matches)[0].sum(1) for term in terms)


@pytest.fixture
def targets():
    g = torch.Generator().manual_seed(1)
    points = torch.rand(3, 3, 3, generator=g)
    points[..., 2] = torch.tensor([[2, 1, 0], [0, 0, 0], [0, 2, 1]])
    boxes = torch.rand(3, 4, generator=g) * 0.3 + 0.2
    labels = torch.tensor([0, 1, 2])
    return Targets.pack(
        [Target(labels[:2], boxes[:2], keypoints=points[:2]), Target(labels[2:], boxes[2:], keypoints=points[2:])]
    )


@pytest.fixture
def layers():
    g = torch.Generator().manual_seed(0)
    keypoints = torch.randn(2, 2, 4, 9, 8, generator=g).requires_grad_()
    return Prediction(torch.zeros(2, 2, 4, 3), torch.rand(2, 2, 4, 4, generator=g), keypoints=keypoints)


def test_each_pair_is_read_in_the_slot_of_its_class(layers, targets):
    index = torch.tensor([[0, 3, 2], [1, 2, 0]])
    pairs = Assignment(torch.tensor([[0, 0, 1]] * 2), index, torch.tensor([[1, 0, 2], [0, 1, 2]]), counts=(2, 1))
    losses = keypoint_losses([layers], pairs, targets, COUNTS)
    exists = existing_keypoints(COUNTS, torch.device("cpu"))
    for layer in range(2):
        sums = torch.zeros(4)
        for image, query, target in zip(*(part[layer].tolist() for part in pairs[:3])):
            label = int(targets.labels[target])
            predicted = layers.keypoints[layer, image, query, 3 * label : 3 * label + 3]
            area = targets.boxes[target, 2] * targets.boxes[target, 3]
            sums += torch.stack(keypoint_errors(predicted, targets.keypoints[target], area, exists[label]))
        torch.testing.assert_close(torch.stack(losses)[:, layer], sums)


def test_only_the_slots_own_points_learn(layers, targets):
    index = torch.tensor([[0, 3, 2], [1, 2, 0]])
    pairs = Assignment(torch.tensor([[0, 0, 1]] * 2), index, torch.tensor([[1, 0, 2], [0, 1, 2]]), counts=(2, 1))
    sum(keypoint_losses([layers], pairs, targets, COUNTS)).sum().backward()
    learns = layers.keypoints.grad.abs().sum(-1) > 0
    assert learns[0, 0, 3].tolist() == [True, True, False, *[False] * 6]
    assert learns[0, 1, 2].tolist() == [*[False] * 6, True, True, True]
    assert learns.sum() == 2 * (2 + 3)


def test_without_pairs_losses_are_zero_in_the_graph(layers, make_criterion):
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), keypoints=torch.zeros(0, 3, 3))
    terms = make_criterion(num_classes=3, keypoint_counts=COUNTS)(
        Outputs(layers), Targets.pack([nothing, nothing]), num_boxes=0.0
    )
    names = {f"loss_keypoint_{part}{s}" for part in ("l1", "findable", "visible", "nll") for s in ("", "_aux_0")}
    assert names < set(terms)
    assert all(terms[name] == 0 for name in names)
    sum(terms[name] for name in names).backward()
    assert torch.equal(layers.keypoints.grad, torch.zeros_like(layers.keypoints))


def test_weights_scale_their_terms_and_act_in_the_matching(layers, targets, make_criterion):
    def terms(weight: float) -> dict[str, torch.Tensor]:
        weights = {f"weight_keypoint_{part}": weight for part in ("findable", "visible", "nll")}
        criterion = make_criterion(num_classes=3, keypoint_counts=COUNTS, weight_keypoint_l1=weight, **weights)
        return criterion(Outputs(layers), targets, num_boxes=3.0)

    zero, light, heavy = terms(0.0), terms(0.001), terms(1000.0)
    parts = [name for name in zero if "keypoint" in name]
    assert all(zero[name] == 0 for name in parts)
    assert sum(heavy[name] for name in parts) / 1000 < sum(light[name] for name in parts) / 0.001


def test_keypoints_need_keypoints(layers, targets, make_criterion):
    with pytest.raises(ValueError, match="model=rfdetr"):
        make_criterion(num_classes=3)(Outputs(layers), targets, num_boxes=3.0)
    boxes_only = Targets(targets.labels, targets.boxes, targets.counts)
    with pytest.raises(ValueError, match="model=rfdetr"):
        make_criterion(num_classes=3, keypoint_counts=COUNTS)(Outputs(layers), boxes_only, num_boxes=3.0)


@pytest.mark.parametrize("of_classes", [True, False])
def test_places_are_compared_as_coco_does(layers, targets, of_classes):
    """Also of predictions that say more about a point."""
    index = torch.tensor([[0, 3, 2], [1, 2, 0]])
    pairs = Assignment(torch.tensor([[0, 0, 1]] * 2), index, torch.tensor([[1, 0, 2], [0, 1, 2]]), counts=(2, 1))
    if not of_classes:
        layers = layers._replace(keypoints=layers.keypoints[..., :3, :2])
    stack = Stack(frozenset(["layers"]), layers, pairs, ["", ""], 1, 1.0, 1.0)
    sigmas = torch.tensor([0.2, 0.3, 0.4])
    matches = Matches([stack], targets, 3, "sigmoid", keypoint_counts=(*COUNTS,), keypoint_sigmas=sigmas)
    found = torch.stack([keypoint.distance(matches)[0], keypoint.oks(matches)[0]], dim=-1)
    for layer in range(2):
        for place, (image, query, target) in enumerate(zip(*(part[layer].tolist() for part in pairs[:3]))):
            label = int(targets.labels[target])
            first = 3 * label if of_classes else 0
            points = layers.keypoints[layer, image, query, first : first + COUNTS[label], :2]
            known = targets.keypoints[target, : COUNTS[label]]
            apart, labelled = points - known[:, :2], known[:, 2] > 0
            scale = 2 * targets.boxes[target, 2:].prod() * (2 * sigmas[: COUNTS[label]]) ** 2
            alike = (-apart.square().sum(-1) / scale).exp()[labelled].sum() / (labelled.sum() + 1e-6)
            wanted = torch.stack([apart.abs().sum(-1)[labelled].sum(), 1 - alike.clamp(min=1e-6)])
            torch.testing.assert_close(found[layer, place], wanted)
