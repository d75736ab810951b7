"""Weights of classes in every class loss: what they multiply, what they leave alone, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from detr_exp import build
from detr_exp.loss.class_weights import class_weights, refuse_smoothing, warn_of_unlearned
from detr_exp.structures import Outputs

LOSSES = ["vfl", "focal", "bce", "mal", "ce", "ia_bce"]
DATA = SimpleNamespace(classes=["car", "no", "traffic light"], num_classes=3, object_counts=lambda: [100, 25, 0])


def gradients(criterion, outputs, targets) -> list[torch.Tensor]:
    """Of the class loss alone, for the logits of the layers and of the denoising queries."""
    logits = [part.logits for part in (outputs.layers, outputs.denoising.layers)]
    terms = criterion(outputs, targets, num_boxes=7.0)
    total = sum(value for name, value in terms.items() if name.startswith("loss_class") and "_enc" not in name)
    return list(torch.autograd.grad(total, logits))


@pytest.mark.parametrize("name", LOSSES)
def test_a_match_counts_as_its_class_says_and_nothing_else_changes(name, make_criterion, make_targets, make_outputs):
    targets = make_targets(4, 3)
    outputs = make_outputs(targets, columns=5 + (name == "ce"), denoising_groups=2)
    weights = [3.0, 1.0, 0.5, 0.0, 2.0]
    plain = gradients(make_criterion(name), outputs, targets)
    weighted = gradients(make_criterion(name, class_weights=weights), outputs, targets)
    denoising, expected = outputs.denoising, plain[1].clone()
    labels = targets.labels[denoising.target]
    for image, query, label in zip(denoising.image, denoising.query, labels):
        own = slice(None) if name == "ce" else label  # a softmax loses as a whole
        expected[:, image, query, own] *= weights[label]
    torch.testing.assert_close(weighted[1], expected)
    changed = (weighted[0] != plain[0]).any(-1).flatten(1).sum(1)
    heavy = sum(weights[label] != 1 for label in targets.labels.tolist())
    assert all(0 < count <= heavy for count in changed.tolist())  # fewer where boxes do not overlap: vfl's target is 0


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_one_change_no_bit(name, make_criterion, make_targets, make_outputs):
    targets = make_targets(4, 0, 3)
    outputs = make_outputs(targets, columns=5 + (name == "ce"), denoising_groups=2)
    torch.manual_seed(0)
    plain = make_criterion(name)(outputs, targets, num_boxes=7.0)
    torch.manual_seed(0)
    ones = make_criterion(name, class_weights=[1.0] * 5)(outputs, targets, num_boxes=7.0)
    assert all(torch.equal(plain[key], ones[key]) for key in plain)


def test_only_the_class_loss_is_weighed(make_criterion, make_targets, make_outputs):
    targets = make_targets(4, 3)
    outputs: Outputs = make_outputs(targets, columns=5, denoising_groups=2)
    plain = make_criterion("vfl")(outputs, targets, num_boxes=7.0)
    weighted = make_criterion("vfl", class_weights=[2.0] * 5)(outputs, targets, num_boxes=7.0)
    same = {name for name in plain if torch.equal(plain[name], weighted[name])}
    assert same == {name for name in plain if "class" not in name and name != "total"}


def test_auto_weighs_by_the_root_of_the_frequency():
    found = class_weights("auto", DATA)
    assert found[1] / found[0] == pytest.approx(2)
    assert (100 * found[0] + 25 * found[1]) / 125 == pytest.approx(1)
    assert found[2] == pytest.approx(10 * found[0])


def test_lists_and_names():
    assert class_weights(None, DATA) is None
    assert class_weights([1, 2, 0.5], DATA) == [1.0, 2.0, 0.5]
    assert class_weights({"traffic light": 4, "no": 0}, DATA) == [1.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cat": 2}, r"loss\.class_weights has 'cat', but the classes are 'car', 'no', 'traffic light'.*\{car: 2\}"),
        ([1, 2], r"loss\.class_weights has 2 numbers, but there are 3 classes; .*loss\.class_weights=\{name: 2\}"),
        ({"no": -1}, r"loss\.class_weights has -1 for class 'no'; .*loss\.class_weights=\{no: 2\}"),
        ([1, float("nan"), 1], r"loss\.class_weights has nan for class 'no'"),
        ([1, "2", 1], r"loss\.class_weights has '2' for class 'no'"),
        ([1, True, 1], r"loss\.class_weights has True for class 'no'"),
        (2.0, r"loss\.class_weights is 2\.0; use a list .*loss\.class_weights=auto"),
        ("inverse", r"loss\.class_weights is 'inverse'"),
    ],
)
def test_other_values_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        class_weights(given, DATA)


@pytest.mark.parametrize("name", LOSSES)
def test_classes_without_annotations_are_no_background(name, make_criterion, make_targets, make_outputs):
    """The second image has annotations of classes 0, 2 and 4 only, but an object of class 3 from another image."""
    targets = make_targets(4, 3)
    targets.labels[4:] = torch.tensor([0, 3, 4])
    outputs = make_outputs(targets, columns=5 + (name == "ce"), denoising_groups=2)
    plain = gradients(make_criterion(name), outputs, targets)
    known = torch.tensor([[True] * 5, [True, False, True, False, True]])
    masked = gradients(make_criterion(name), outputs, replace(targets, annotated=known))
    for before, after in zip(plain, masked):
        torch.testing.assert_close(after[:, 0], before[:, 0])
        assert (after[:, 1, :, 1] == 0).all()
        assert (before[:, 1, :, 1] != 0).all()
        own = after[:, 1, :, 3] != 0  # of the queries with this object
        assert own.any(-1).all() or name in ("vfl", "ia_bce")
        assert own.float().mean() < 0.5
        if name != "ce":
            used = known[1] | (after[:, 1] != 0)
            torch.testing.assert_close(after[:, 1][used], before[:, 1][used])


def test_a_softmax_shares_the_probability_among_the_annotated_classes(make_criterion, make_targets, make_outputs):
    targets = replace(make_targets(3, 2), labels=torch.tensor([0, 2, 0, 2, 0]))
    outputs = make_outputs(targets, columns=6, denoising_groups=2)
    known = torch.tensor([[True, False, True, False, False]] * 2)
    found = make_criterion("ce")(outputs, replace(targets, annotated=known), num_boxes=5.0)
    few = outputs._replace(
        layers=outputs.layers._replace(logits=outputs.layers.logits[..., [0, 2, 5]]),
        denoising=outputs.denoising._replace(
            layers=outputs.denoising.layers._replace(logits=outputs.denoising.layers.logits[..., [0, 2, 5]])
        ),
        encoder=None,
    )
    alone = make_criterion("ce", num_classes=2)(few, replace(targets, labels=targets.labels // 2), num_boxes=5.0)
    torch.testing.assert_close(found["loss_class_dn_0"], alone["loss_class_dn_0"])


def test_smoothing_of_a_softmax_needs_all_annotations():
    def data(annotated):
        return SimpleNamespace(train=SimpleNamespace(objects=lambda index: SimpleNamespace(annotated=annotated)))

    smoothed = {"activation": "softmax", "label_smoothing": 0.1}
    with pytest.raises(ValueError, match=r"loss\.label_smoothing is 0\.1, .*loss\.label_smoothing=0"):
        refuse_smoothing(smoothed, data([1, 2]))
    refuse_smoothing(smoothed, data(None))
    refuse_smoothing({"activation": "sigmoid", "label_smoothing": 0.1}, data([1]))
    refuse_smoothing({"activation": "softmax", "label_smoothing": 0.0}, data([1]))


@pytest.mark.parametrize(
    ("loss", "counts", "warned"), [("pose", [6, 0], True), ("pose", [6, 3], False), ("vfl", [6, 0], False)]
)
def test_classes_that_a_loss_of_keypoints_cannot_learn_are_named(loss, counts, warned, caplog):
    keypoints = SimpleNamespace(counts=counts)
    data = SimpleNamespace(classes=["person", "dog"], keypoints=keypoints, content=SimpleNamespace(origin="mine"))
    cfg = build.compose(["model=rtdetrv2_tiny", "data=shapes", f"loss={loss}"])
    warn_of_unlearned(build._instantiated(cfg, "loss")["terms"], data)
    assert ("mine: 'dog' have no keypoints" in caplog.text) == warned
