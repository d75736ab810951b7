"""ECPose's smaller parts: what is trained and deployed, which weights it takes, and half precision."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from ec_peer import SMALL

from detr_exp.build import compose, criterion
from detr_exp.data.classes import KnownLabels
from detr_exp.data.keypoints import KeypointSchema
from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_ec import from_official, to_official
from detr_exp.structures import Target, Targets, leaves

COUNTS = [3, 0]
POSES = ["model=ecpose_s", *SMALL[1:], "loss=pose", "matcher=pose", "model.keypoint_counts=[3,0]"]
NAMES = [["a", "b", "c"], []]
LABELS = KnownLabels(2, keypoints=KeypointSchema(NAMES, [[], []], [[], []], [0.05] * 3, False))
IMAGES = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def losses(outputs, targets, *words):
    return criterion(compose([*POSES, "data.num_classes=2", *words]), LABELS)(outputs, targets, float(len(targets)))


@pytest.fixture
def objects() -> Targets:
    """One object with two labelled points of three, one without, and an image without objects."""
    points = torch.tensor([[[0.2, 0.3, 2.0], [0.4, 0.5, 1.0], [0.0, 0.0, 0.0]]])
    boxes = torch.tensor([[0.3, 0.4, 0.3, 0.4]])
    one = Target(torch.tensor([0]), boxes, keypoints=points)
    empty = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), keypoints=torch.zeros(0, 3, 3))
    return Targets.pack([one, empty, replace(one, keypoints=torch.zeros(1, 3, 3))])


def test_every_parameter_is_trained_also_without_objects(make, no_objects, objects) -> None:
    for targets in (replace(no_objects, keypoints=torch.zeros(0, 3, 3)), objects):
        network = make(*POSES, num_classes=2).train()
        terms = losses(network(IMAGES, targets), targets)
        assert all(term.isfinite() for term in terms.values())
        terms["total"].backward()
        assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_an_object_without_labelled_points_is_no_negative(make, objects) -> None:
    """Its query has no target, and loses nothing where others lose as background."""
    outputs = make(*POSES, num_classes=2).train()(IMAGES, objects)._replace(denoising=None)
    found = []
    for count in (1, 0):
        some = slice(1, 1 + count)
        targets = Targets(objects.labels[some], objects.boxes[some], (0, 0, count), keypoints=objects.keypoints[some])
        found.append(losses(outputs, targets, "loss.weight_keypoint_oks=0")["loss_class"].item())
    assert 0 < found[0] < found[1]


@pytest.mark.parametrize("words", [["model.eval_idx=0"], ["data.num_classes=2"]])
def test_deployment_changes_nothing(words, make, randomise) -> None:
    network = randomise(make(*POSES, *words, num_classes=2).double()).eval()
    with torch.no_grad():
        expected = list(leaves(network(IMAGES.double()).pred))
        found = list(leaves(network.deploy()(IMAGES.double()).pred))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert not [name for name, _ in network.named_parameters() if "noise" in name]


def test_half_precision_changes_little(make, randomise, objects) -> None:
    network = randomise(make(*POSES, num_classes=2)).train()
    torch.manual_seed(0)
    expected = network(IMAGES, objects)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(IMAGES, objects)
    assert outputs.layers.keypoints.dtype == outputs.layers.logits.dtype == torch.float32
    denoised = outputs.denoising.layers.keypoints  # of the same queries; others may be selected
    torch.testing.assert_close(denoised, expected.denoising.layers.keypoints, rtol=0, atol=0.03)
    losses(outputs, objects)["total"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_boxes_are_around_the_points_that_a_class_has(make) -> None:
    network = make(*POSES, num_classes=2).eval()
    outputs = network(IMAGES[:1])
    points = torch.tensor([[0.25, 0.5], [0.5, 0.25], [0.75, 1.0]]).expand_as(outputs.layers.keypoints)
    outputs = outputs._replace(layers=outputs.layers._replace(keypoints=points))
    (found,) = network.postprocess(outputs, torch.tensor([[100, 200]]))
    has_points = found.labels == 0
    assert 0 < has_points.sum() < len(found)
    assert found.boxes[has_points].unique(dim=0).tolist() == [[50, 25, 150, 100]]
    assert found.keypoints[has_points].unique(dim=0).tolist() == [[[50, 50, 1], [100, 25, 1], [150, 100, 1]]]
    assert not found.keypoints[~has_points].any()
    assert len(found.boxes[~has_points].unique(dim=0)) > 1, "those of the network"


def test_files_of_the_authors_are_read(make, randomise, tmp_path, caplog) -> None:
    network, other = randomise(make(*POSES, num_classes=2)), make(*POSES, num_classes=2)
    state = network.state_dict()
    official = to_official(state, num_points=[4, 4, 4], spatial_shapes=network.spatial_shapes())
    back = from_official(official)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    torch.save({"ema": {"module": official}}, tmp_path / "ecpose_s.pth")
    counted = len([name for name in state if "num_batches" not in name])
    assert load_weights(other, tmp_path / "ecpose_s.pth").startswith(f"{counted} of {counted} ")
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert read_weights(tmp_path / "ecpose_s.pth").origin == "official EdgeCrafter"
    # of their two logits the second is of people
    people = make(*POSES[:-1], "model.keypoint_counts=[3]", "model.num_denoising=0", num_classes=1)
    load_weights(people, tmp_path / "ecpose_s.pth", ["person"])
    assert torch.equal(people.decoder.enc_score_head.weight, state["decoder.enc_score_head.weight"][1:])
    hands = make(*POSES[:-1], "model.keypoint_counts=[5]", num_classes=1)
    own = hands.decoder.enc_score_head.weight.clone()
    with caplog.at_level(logging.INFO):
        assert "6 keypoint tensors" in load_weights(hands, tmp_path / "ecpose_s.pth", ["hand"])
    assert "keypoints: initialised anew" in caplog.text
    assert torch.equal(hands.decoder.enc_score_head.weight, own)
    assert torch.equal(hands.decoder.tgt_embed.weight, state["decoder.tgt_embed.weight"])


def test_losses_of_other_networks_say_which_to_use(make, objects) -> None:
    outputs = make(*POSES, num_classes=2).train()(IMAGES, objects)
    with pytest.raises(ValueError, match=r"where keypoints are, but not how certain.*loss=pose matcher=pose"):
        criterion(compose([*POSES[:-3], "loss=vfl", "data.num_classes=2"]), LABELS)(outputs, objects, 2.0)
    boxes = make("model=ecdet_s", *SMALL[1:], num_classes=2).train()(IMAGES, objects)
    with pytest.raises(ValueError, match=r"the loss compares keypoints, but the network predicts none.*loss=vfl"):
        losses(boxes, objects)
