"""Losses against a teacher."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from detr_exp.loss import box, teacher
from detr_exp.loss.criterion import SetCriterion
from detr_exp.loss.teacher import EdgeGrid, Maps, Taught, as_targets, in_our_classes, on_grid, to_match
from detr_exp.loss.term import Term
from detr_exp.model.decoder.dfine import EdgePrediction
from detr_exp.ops.edges import boxes_from_edges, edge_positions
from detr_exp.structures import Outputs, Prediction, Targets, mapped

TERMS = {
    "teacher_class": Term(function=teacher.scores, weight=1.0, at=["layers"], against="teacher"),
    "teacher_bbox": Term(
        function=partial(teacher.by_confidence, loss=box.l1), weight=5.0, at=["layers"], against="teacher"
    ),
    "teacher_maps": Term(function=teacher.cosine, weight=1.0, at=["maps"], divide="images", against="teacher"),
}


def no_objects(num_images: int) -> Targets:
    return Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0,) * num_images)


def taught_by(prediction: Prediction, activation: str = "sigmoid", threshold: float = 0.3) -> Taught:
    nothing, none = torch.zeros(0, dtype=torch.int64), no_objects(len(prediction.boxes))
    return Taught(as_targets(prediction, (nothing, nothing, nothing), none, threshold, activation, None))


@pytest.fixture
def with_terms(make_criterion):
    def make(name: str = "vfl", **changes) -> SetCriterion:
        criterion = make_criterion(name, **changes)
        criterion.terms |= TERMS
        criterion.weights |= {name: term.weight for name, term in TERMS.items()}
        return criterion

    return make


@pytest.mark.parametrize("name", ["vfl", "ce"])
def test_who_says_what_the_teacher_says_loses_nothing(with_terms, make_targets, make_outputs, name):
    activation, columns = ("softmax", 6) if name == "ce" else ("sigmoid", 5)
    targets = make_targets(3, 0, 2)
    outputs = make_outputs(targets, columns=columns)
    taught = taught_by(mapped(outputs.pred, torch.Tensor.detach), activation, 0.25)
    assert min(taught.targets.counts) > 0, "also where there is no object"
    losses = with_terms(name)(outputs, targets, 5.0, taught=taught)
    assert losses["loss_teacher_class"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss_teacher_bbox"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_teacher_class_aux_0"] > 0.01
    losses["total"].backward()


def test_terms_against_a_teacher_are_added_to_the_others(with_terms, make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 1)
    outputs = make_outputs(targets, denoising_groups=2)
    taught = taught_by(make_outputs(targets, seed=3).pred)
    without, ours = make_criterion()(outputs, targets, 4.0), with_terms()
    for taught_or_not in (None, taught):
        found = ours(outputs, targets, 4.0, taught=taught_or_not)
        assert all(torch.equal(found[name], value) for name, value in without.items() if name != "total")
        further = sum(value for name, value in found.items() if name not in without)
        assert found["total"].item() == pytest.approx((without["total"] + further).item())
    assert {name for name in found if "teacher_bbox" in name} == {
        f"loss_teacher_bbox{suffix}" for suffix in ("_aux_0", "_aux_1", "")
    }
    assert set(ours.names(["boxes"])) == {"class", "bbox", "giou"}, "what an evaluation measures"


def test_a_step_does_not_depend_on_its_split_into_batches(with_terms, make_targets, make_outputs):
    targets = make_targets(2, 2)
    outputs = make_outputs(targets)
    taught = taught_by(make_outputs(targets, seed=3).pred)
    whole = with_terms()(outputs, targets, 4.0, taught=taught)
    parts = []
    for image in range(2):
        one = make_targets(2, 2)
        chosen = slice(2 * image, 2 * image + 2)
        one = replace(one, labels=one.labels[chosen], boxes=one.boxes[chosen], counts=(2,))
        cut = partial(mapped, change=lambda part, image=image: part[:, image : image + 1])
        starts = torch.tensor([0, *taught.targets.counts]).cumsum(0)
        mine = slice(int(starts[image]), int(starts[image + 1]))
        said = replace(
            taught.targets,
            labels=taught.targets.labels[mine],
            boxes=taught.targets.boxes[mine],
            counts=(taught.targets.counts[image],),
            extra={name: value[mine] for name, value in taught.targets.extra.items()},
        )
        encoder = mapped(outputs.encoder, lambda part, image=image: part[image : image + 1])
        parts.append(with_terms()(Outputs(cut(outputs.layers), encoder), one, 4.0, 2.0, taught=Taught(said)))
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-5), name


def test_each_group_of_queries_learns_from_all_of_the_teachers(with_terms, make_targets, make_outputs):
    targets = make_targets(2)
    outputs = make_outputs(targets, groups=3)
    taught = taught_by(mapped(make_outputs(targets, groups=1, seed=2).pred, torch.Tensor.detach), threshold=0.6)
    losses = with_terms()(outputs, targets, 2.0, taught=taught)
    (gradient,) = torch.autograd.grad(losses["loss_teacher_bbox"], outputs.layers.boxes)
    reached = (gradient[-1, 0].abs().sum(-1) > 0).view(3, -1).sum(1)
    assert reached.tolist() == [taught.targets.counts[0]] * 3


def test_queries_that_count_are_matched_or_confident_where_there_is_no_object():
    logits = torch.full((2, 5, 2), -5.0)
    logits[:, 1, 1] = logits[:, 2, 0] = 3.0
    boxes = torch.tensor([[0.5, 0.5, 0.2, -0.1], [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2]])[[0, 1, 2, 0, 0]]
    objects = Targets(torch.tensor([1]), torch.tensor([[0.8, 0.8, 0.2, 0.19]]), (0, 1))
    matched = torch.tensor([1]), torch.tensor([3]), torch.tensor([0])
    targets = as_targets(Prediction(logits, boxes.expand(2, 5, 4)), matched, objects, 0.5, "sigmoid", None)
    assert targets.counts == (2, 2), "in the second image a confident one is a duplicate"
    assert targets.labels[:3].tolist() == [1, 0, 1]
    assert targets.extra["object"].tolist() == [-1, -1, -1, 0]
    assert targets.extra["confidence"].tolist() == pytest.approx([0.9526] * 3 + [0.0067], abs=1e-4)
    assert (targets.boxes[:, 2:] > 0).all(), "distributions may give a box a negative size"


def test_the_query_of_an_object_learns_from_the_teachers_query_of_that_object(with_terms, make_targets, make_outputs):
    targets = make_targets(3, 0, 2)
    outputs = make_outputs(targets)
    said = mapped(make_outputs(targets, seed=3).pred, torch.Tensor.detach)
    image, query = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([4, 0, 2, 1, 5])
    taught = Taught(as_targets(said, (image, query, torch.arange(5)), targets, 1.0, "sigmoid", None))
    assert taught.targets.counts == targets.counts, "none is confident without an object"
    assert not torch.equal(taught.targets.boxes, targets.boxes), "another order and other places than the objects'"

    losses = with_terms()(outputs, targets, 5.0, taught=taught)
    gradients = {
        name: torch.autograd.grad(losses[f"loss_{name}_aux_0"], outputs.layers.boxes, retain_graph=True)[0][0]
        for name in ("bbox", "teacher_bbox")
    }
    reached = {name: (gradient.abs().sum(-1) > 0).tolist() for name, gradient in gradients.items()}
    assert reached["teacher_bbox"] == reached["bbox"]
    assert sum(map(sum, reached["bbox"])) == 5


def test_confident_queries_without_an_object_are_matched_beside_the_objects(make_targets):
    objects = make_targets(2)
    boxes = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1], [0.3, 0.3, 0.1, 0.1]])
    labels = torch.tensor([4, 4, 4])
    taught = Targets(labels, boxes, (3,), extra={"object": torch.tensor([1, -1, 0])})
    found = to_match(taught, objects)
    assert found.labels.tolist() == [objects.labels[1], 4, objects.labels[0]]
    assert torch.equal(found.boxes, torch.stack([objects.boxes[1], boxes[1], objects.boxes[0]]))
    none = to_match(replace(taught, extra={"object": torch.full((3,), -1)}), make_targets(0))
    assert torch.equal(none.boxes, boxes)


@pytest.mark.parametrize("ours", ["sigmoid", "softmax"])
@pytest.mark.parametrize("theirs", ["sigmoid", "softmax"])
def test_scores_of_a_class_keep_their_column_and_order(ours, theirs):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 4 + (theirs == "softmax"), generator=g)
    found = in_our_classes(logits, [2, 0, -1], theirs, ours)
    assert found.shape == (2, 7, 3 + (ours == "softmax"))
    scores = found.sigmoid() if ours == "sigmoid" else found.softmax(-1)[..., :3]
    assert (scores[..., 2] < 1e-3).all()
    assert torch.equal(scores[..., 0] > scores[..., 1], logits[..., 2] > logits[..., 0])
    if ours == theirs == "sigmoid":
        torch.testing.assert_close(scores[..., 0], logits[..., 2].sigmoid())


def edge_prediction(num_bins: int, bound: float, scale: float, seed: int) -> tuple[EdgePrediction, EdgeGrid]:
    g = torch.Generator().manual_seed(seed)
    grid = EdgeGrid(edge_positions(num_bins, bound, scale), scale)
    reference = torch.rand(1, 6, 4, generator=g, dtype=torch.float64) * 0.3 + 0.3
    edges = torch.randn(1, 6, 4, num_bins + 1, generator=g, dtype=torch.float64)
    boxes = boxes_from_edges((edges.softmax(-1) * grid.positions).sum(-1), reference, scale)
    logits = torch.randn(1, 6, 3, generator=g, dtype=torch.float64)
    return EdgePrediction(logits, boxes, edges, reference), grid


def test_distributions_keep_their_mean_place_on_another_grid():
    """The box of a distribution is the same whatever it counts from; places beyond the grid are at its end."""
    prediction, grid = edge_prediction(16, 0.25, 4.0, seed=0)
    nothing, none = torch.zeros(0, dtype=torch.int64), no_objects(len(prediction.boxes))
    extra = as_targets(prediction, (nothing, nothing, nothing), none, 0.0, "sigmoid", grid).extra
    reference = prediction.reference[0] + 0.02
    ours = EdgeGrid(edge_positions(32, 0.5, 2.0), 2.0)
    target = on_grid(extra["edge_shares"], extra["edge_places"], reference, ours)
    assert target.sum(-1).allclose(torch.ones(6, 4, dtype=torch.float64))
    boxes = boxes_from_edges((target * ours.positions).sum(-1), reference, ours.scale)
    torch.testing.assert_close(boxes, prediction.boxes[0])
    same = on_grid(extra["edge_shares"], extra["edge_places"], prediction.reference[0], grid)
    torch.testing.assert_close(same, extra["edge_shares"])


def test_maps_are_compared_by_direction_and_resampled(with_terms, make_targets, make_outputs):
    targets = make_targets(1, 1)
    outputs, g = make_outputs(targets), torch.Generator().manual_seed(0)
    ours = torch.randn(2, 6, 4, 4, generator=g)
    coarse = torch.nn.functional.interpolate(ours, (8, 8))  # the same cells, four times
    nobody = taught_by(outputs.pred, threshold=1.0)

    def loss(*levels):
        maps = Maps(*(list(part) for part in zip(*levels)))
        found = with_terms()(outputs, targets, 2.0, taught=nobody._replace(maps=maps))
        return found["loss_teacher_maps"].item()

    assert loss((ours, 3 * ours)) == pytest.approx(0, abs=1e-6)
    assert loss((ours, -ours)) == pytest.approx(2)
    assert loss((ours, ours), (ours, -ours)) == pytest.approx(1)
    assert loss((torch.ones(2, 6, 4, 4), torch.ones(2, 6, 7, 9))) == pytest.approx(0, abs=1e-6)
    assert loss((ours, coarse)) < 0.2


def test_cells_without_content_do_not_outweigh_the_others(with_terms, make_targets, make_outputs):
    targets, g = make_targets(1, 1), torch.Generator().manual_seed(0)
    outputs = make_outputs(targets)
    ours, theirs = torch.randn(2, 2, 64, 4, 4, generator=g)
    ours[:, :, 0] = 0
    theirs[:, :, :, 0] = 0
    nobody = taught_by(outputs.pred, threshold=1.0)
    losses = with_terms()(outputs, targets, 2.0, taught=nobody._replace(maps=Maps([ours.requires_grad_()], [theirs])))
    losses["loss_teacher_maps"].backward()
    lengths = ours.grad.norm(dim=1)
    assert lengths[:, 0].max() < 1e3 * lengths[:, 1:, 1:].max()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"against": "pupil"}, "objects, teacher"),
        ({"against": "teacher", "at": ["layers"], "divide": "pairs"}, "objects, images"),
        ({"against": "teacher"}, "layers, initial, encoder, maps"),
        ({"at": ["maps"]}, "layers, initial, encoder, denoising"),
    ],
)
def test_mistakes_in_terms_against_a_teacher_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        Term(function=box.l1, weight=1.0, **wrong)
