"""ECPose against libreyolo: random weights, float64, square images; equal inputs, outputs, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from deimv2_peer import in_float64
from ec_peer import libre_pose_criterion, libre_pose_of, official_of, trained_as_evaluated
from edges_peer import CLOSE, compare_gradients, gradients_of, images, normal
from torch import Tensor

from detr_exp.build import compose, criterion
from detr_exp.data.classes import KnownLabels
from detr_exp.data.keypoints import COCO_SIGMAS, KeypointSchema
from detr_exp.structures import Prediction, Target, Targets, mapped

# Parameters of network and decoder; published totals count two constants, which are buffers here.
TOTALS = {
    "s": (9_989_871, 3_027_799),
    "m": (19_981_532, 6_247_100),
    "l": (34_566_764, 7_297_724),
    "x": (51_542_636, 9_398_972),
}
LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in ("m", "l", "x")]
POSE = ["loss=pose", "matcher=pose", "model.keypoint_counts=[0,17]", "model.num_queries=20", "model.num_denoising=4"]
PERSON = KnownLabels(
    2, keypoints=KeypointSchema([[], list("abcdefghijklmnopq")], [[], []], [[], []], COCO_SIGMAS, True)
)
TERMS = {"loss_vfl": "loss_class", "loss_keypoints": "loss_keypoint_distance", "loss_oks": "loss_keypoint_oks"}


def people() -> Targets:
    """Three images with two, no and one person, some of whose points are not labelled or hidden."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for count in (2, 0, 1):
        boxes = torch.rand(count, 4, generator=generator).double() * 0.3 + 0.3
        points = (
            boxes[:, None, :2] + (torch.rand(count, 17, 2, generator=generator).double() - 0.5) * boxes[:, None, 2:]
        )
        visibility = torch.randint(0, 3, (count, 17, 1), generator=generator).double()
        keypoints = torch.cat([points * (visibility > 0), visibility], dim=-1)
        made.append(Target(torch.ones(count, dtype=torch.int64), boxes, keypoints=keypoints))
    return Targets.pack(made)


def given(targets: Targets) -> list[dict[str, Tensor]]:
    """Objects as the peer wants them."""
    objects = []
    first = 0
    for count in targets.counts:
        boxes, keypoints = targets.boxes[first : first + count], targets.keypoints[first : first + count]
        half = boxes[:, 2:] / 2
        objects.append(
            {
                "labels": targets.labels[first : first + count],
                "boxes": torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], dim=1),
                "keypoints": torch.cat([keypoints[..., :2].flatten(1), (keypoints[..., 2] > 0).double()], dim=1),
                "area": boxes[:, 2:].prod(1),
            }
        )
        first += count
    return objects


def assert_equal(found: Prediction, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found.logits, expected["pred_logits"], **CLOSE)
    torch.testing.assert_close(found.keypoints.flatten(-2), expected["pred_keypoints"], **CLOSE)


@pytest.mark.parametrize("size", ["s", *LARGE])
def test_parameters_of_published_networks(size, make):
    with torch.device("meta"):
        network = make(f"model=ecpose_{size}", *POSE, "model.num_queries=60", num_classes=2)
    counts = [sum(parameter.numel() for parameter in part.parameters()) + 2 for part in (network, network.decoder)]
    assert tuple(counts) == TOTALS[size]


@pytest.mark.parametrize("size", ["s", *LARGE])
def test_poses_of_published_networks(size, make, randomise):
    """What is predicted, and the best detections in pixels."""
    pytest.importorskip("libreyolo")
    ours = randomise(make(f"model=ecpose_{size}", *POSE, num_classes=2).double()).eval()
    theirs = libre_pose_of(ours, size, 128).eval()
    with torch.no_grad(), in_float64():
        expected, outputs = theirs(normal(ours, images(128))), ours(images(128))
    assert_equal(outputs.pred, expected)
    (found,) = ours.postprocess(outputs, torch.tensor([[200, 300]]))
    scores, best = expected["pred_logits"][0].sigmoid().flatten().topk(20)
    points = expected["pred_keypoints"][0, best // 2].unflatten(-1, (17, 2)) * torch.tensor([300.0, 200.0])
    torch.testing.assert_close(found.scores, scores, **CLOSE)
    assert torch.equal(found.labels, best % 2)
    person = found.labels == 1
    torch.testing.assert_close(found.keypoints[person, :, :2], points[person], rtol=0, atol=1e-4)
    assert (found.keypoints[person, :, 2] == 1).all()
    assert (found.keypoints[~person] == 0).all()
    extent = torch.cat([points.amin(1), points.amax(1)], dim=1)
    torch.testing.assert_close(found.boxes, extent, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", ["s", pytest.param("l", marks=pytest.mark.slow)])
def test_training_of_libreyolo(size, make, randomise):
    """With denoising: all that is predicted, all terms of the loss, and all gradients."""
    pytest.importorskip("libreyolo")
    words = [f"model=ecpose_{size}", *POSE]
    ours, targets = randomise(make(*words, num_classes=2).double()).train(), people()
    theirs = libre_pose_of(ours, size, 96).train()
    with trained_as_evaluated(theirs), in_float64():
        outputs = ours(images(96, 3), targets)
        expected = theirs(normal(ours, images(96, 3)), given(targets))
        wanted = libre_pose_criterion()(expected, given(targets))
    for index, other in enumerate([*expected["aux_outputs"], expected]):
        assert_equal(mapped(outputs.layers, lambda tensor, index=index: tensor[index]), other)
    for index, other in enumerate(expected["dn_aux_outputs"]):
        assert_equal(mapped(outputs.denoising.layers, lambda tensor, index=index: tensor[index]), other)
    assert_equal(outputs.initial, expected["aux_pre_outputs"])
    assert_equal(outputs.denoising.initial, expected["dn_aux_pre_outputs"])
    assert_equal(outputs.encoder, expected["aux_interm_outputs"][0])
    terms = criterion(compose([*words, "data.num_classes=2"]), PERSON)(outputs, targets, 3.0)
    found = {name: term for name, term in terms.items() if name.startswith("loss_")}
    for name, term in wanted.items():
        kind = next(theirs for theirs in TERMS if name.startswith(theirs))
        own = found.pop(TERMS[kind] + name.removeprefix(kind).replace("_enc_0", "_enc"))
        torch.testing.assert_close(own, term, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert not found
    assert len(wanted) == 3 * (2 * ours.decoder.num_layers + 3)
    terms["total"].backward()
    sum(wanted.values()).backward()
    # sines of positions are float32 in both, computed in another order
    compare_gradients(official_of(ours, gradients_of(ours)), theirs, share=3e-6)
