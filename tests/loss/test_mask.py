import pytest
import torch
import torch.nn.functional as F

from detr_exp.loss import mask
from detr_exp.loss.mask import MaskLosses, matched_logits, point_losses
from detr_exp.loss.matches import Matches, Stack
from detr_exp.matcher import cost, hungarian
from detr_exp.matcher.hungarian import Assignment
from detr_exp.structures import MaskLogits, Outputs, Prediction, Target, Targets

SIZE = 8  # of the mask head's map; target masks are twice as large


@pytest.fixture
def pairs():
    """Two layers, two images with two and one objects of four queries."""
    image, target = torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.tensor([[1, 0, 2], [0, 1, 2]])
    return Assignment(image, torch.tensor([[0, 3, 2], [1, 2, 0]]), target, counts=(2, 1))


@pytest.fixture
def layers():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2, 5, SIZE, SIZE, generator=g).requires_grad_()
    masks = MaskLogits(features, torch.randn(2, 2, 4, 5, generator=g).requires_grad_(), torch.tensor([0.2]))
    return Prediction(torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 4, 4), masks)


def mask_losses(layers: list[Prediction], pairs: Assignment, target_masks: torch.Tensor) -> MaskLosses:
    """Of the layers of one stack."""
    stack = Stack(frozenset(["layers"]), layers[0], pairs, [""] * len(layers[0].boxes), 1, 1.0, 1.0)
    labels = torch.zeros(len(target_masks), dtype=torch.int64)
    targets = Targets(labels, torch.zeros(len(target_masks), 4), pairs.counts, masks=target_masks)
    return point_losses(Matches([stack], targets, num_classes=3, activation="sigmoid"))[0]


def objects() -> torch.Tensor:
    return torch.rand(3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(1)) > 0.5


def test_matched_masks_are_those_of_the_dense_form(layers, pairs):
    for layer in range(2):
        dense = layers.masks.dense()[layer, pairs.image[layer], pairs.query[layer]]
        torch.testing.assert_close(matched_logits(layers.at(layer).masks, pairs, layer), dense)


def test_losses_at_the_pixel_centres_are_the_dense_losses(layers, pairs, monkeypatch):
    rows, columns = torch.meshgrid(*[(torch.arange(SIZE) + 0.5) / SIZE] * 2, indexing="ij")
    centres = torch.stack((columns, rows), -1).view(1, -1, 2)
    monkeypatch.setattr(mask, "uncertain_points", lambda logits, _: centres.expand(len(logits), -1, -1))
    small = objects()[:, ::2, ::2]
    losses = mask_losses([layers], pairs, small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    for layer in range(2):
        dense = layers.masks.dense()[layer, pairs.image[layer], pairs.query[layer]].flatten(1)
        label = small[pairs.target[layer]].flatten(1).float()
        score = dense.sigmoid()
        dice = 1 - (2 * (score * label).sum(1) + 1) / (score.sum(1) + label.sum(1) + 1)
        ce = F.binary_cross_entropy_with_logits(dense, label, reduction="none")
        torch.testing.assert_close(losses.ce[layer], ce.mean(1).sum())
        torch.testing.assert_close(losses.dice[layer], dice.sum())


def test_a_perfect_mask_costs_little_and_its_opposite_much(pairs):
    """Logits +-50 in the right places; some points fall between pixels."""
    small = torch.zeros(3, SIZE, SIZE, dtype=torch.bool)
    small[0, :, : SIZE // 2], small[1, SIZE // 2 :], small[2, :, SIZE // 2 :] = True, True, True
    features = torch.zeros(1, 2, 4, SIZE, SIZE)
    for image, query, target in zip(*(index[0].tolist() for index in pairs[:3])):
        features[0, image, query] = torch.where(small[target], 50.0, -50.0)
    queries = torch.eye(4).expand(1, 2, 4, 4)
    layers = Prediction(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 4), MaskLogits(features, queries, torch.zeros(1)))
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.manual_seed(0)
    perfect, wrong = mask_losses([layers], pairs, large), mask_losses([layers], pairs, ~large)
    assert perfect.ce[0] < wrong.ce[0] / 20
    assert perfect.dice[0] < wrong.dice[0] / 3


def test_without_pairs_losses_are_zero_in_the_graph(layers):
    none = torch.zeros(2, 0, dtype=torch.int64)
    losses = mask_losses([layers], Assignment(none, none, none, counts=(0, 0)), objects()[:0])
    total = losses.ce.sum() + losses.dice.sum()
    assert total.item() == 0
    total.backward()
    assert torch.equal(layers.masks.features.grad, torch.zeros_like(layers.masks.features))
    assert torch.equal(layers.masks.queries.grad, torch.zeros_like(layers.masks.queries))


def test_a_seed_decides_the_points(layers, pairs):
    def losses(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack(mask_losses([layers], pairs, objects())).detach()

    assert torch.equal(losses(0), losses(0))
    assert not torch.equal(losses(0), losses(1))


@pytest.fixture
def scene(layers):
    torch.manual_seed(0)
    masks = objects()
    targets = Targets.pack(
        [
            Target(torch.tensor([0, 2]), torch.rand(2, 4) * 0.3 + 0.2, masks[:2]),
            Target(torch.tensor([1]), torch.rand(1, 4) * 0.3 + 0.2, masks[2:]),
        ]
    )
    encoder = layers.at(0)
    return Outputs(layers, encoder), targets


def test_terms_follow_the_prediction(scene, make_criterion, monkeypatch):
    outputs, targets = scene
    copies = []
    to_host = hungarian.to_host
    monkeypatch.setattr(hungarian, "to_host", lambda costs: copies.append(costs) or to_host(costs))
    terms = make_criterion(num_classes=3)(outputs, targets, num_boxes=3.0)
    assert len(copies) == 1
    assert {f"loss_mask_{part}{suffix}" for part in ("ce", "dice") for suffix in ("", "_aux_0", "_enc")} < set(terms)
    plain = outputs._replace(layers=outputs.layers._replace(masks=None), encoder=outputs.encoder._replace(masks=None))
    assert not any("mask" in name for name in make_criterion(num_classes=3)(plain, targets, num_boxes=3.0))


def test_weights_act_in_loss_and_matching(scene, make_criterion, monkeypatch):
    """Objects shaped like the masks of known queries are matched with them, if masks count."""
    monkeypatch.setattr(cost, "PIXELS_PER_POINT", 1)
    outputs, targets = scene
    dense = outputs.layers.masks.dense()[-1].detach() > 0
    shapes = torch.stack((dense[0, 3], dense[0, 1], dense[1, 2])).repeat_interleave(2, 1).repeat_interleave(2, 2)
    targets = Targets(targets.labels, targets.boxes, targets.counts, shapes)

    def matched(weight: float):
        criterion = make_criterion(num_classes=3, weight_mask_ce=weight, weight_mask_dice=weight)
        pairs = criterion.matcher([outputs.layers], targets, 1, criterion.weights)
        return pairs.query[-1].tolist(), pairs.target[-1].tolist()

    torch.manual_seed(0)
    assert matched(10.0) == ([1, 3, 2], [1, 0, 2])
    assert matched(0.0) != matched(10.0)
    without = make_criterion(num_classes=3, weight_mask_ce=0.0, weight_mask_dice=0.0)(outputs, targets, num_boxes=3.0)
    assert without["loss_mask_ce"] == without["loss_mask_dice"] == 0


def test_masks_need_masks(scene, make_criterion):
    outputs, targets = scene
    boxes_only = Targets(targets.labels, targets.boxes, targets.counts)
    with pytest.raises(ValueError, match="model=rfdetr"):
        make_criterion(num_classes=3)(outputs, boxes_only, num_boxes=3.0)
