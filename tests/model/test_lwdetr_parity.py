"""LW-DETR against transformers: random weights, float64; equal inputs, equal outputs, pairs, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from lwdetr_peer import FEW, peer_of, theirs_of
from transformers import DeformableDetrImageProcessor
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

from detr_exp.build import compose, criterion
from detr_exp.structures import Prediction

# Parameters with 91 logits: all, of the backbone, of the neck; in evaluation.
TOTALS = {
    "tiny": (12_052_002, 2_855_808, 1_199_104, 9_072_366),
    "small": (14_557_378, 4_636_032, 1_248_256, 10_953_742),
    "medium": (28_237_378, 18_119_424, 1_444_864, 24_633_742),
    "large": (46_823_650, 18_119_424, 12_104_448, 39_656_494),
    "xlarge": (118_033_378, 71_628_288, 29_805_312, 110_866_222),
}
CLOSE = {"rtol": 0, "atol": 5e-8}
SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in ("large", "xlarge")]


def images(side: int) -> torch.Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2)).double()


def normal(network, pixels):
    return (pixels - network.pixel_mean) / network.pixel_std


@pytest.mark.parametrize("size", TOTALS)
def test_parameters_of_published_networks(size, make):
    with torch.device("meta"):
        network = make(f"model=lwdetr_{size}", num_classes=91)
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
        network.queries.keep_groups(1)
    used = sum(parameter.numel() for parameter in network.parameters())
    assert (sum(counts.values()), counts["backbone"], counts["neck"], used) == TOTALS[size]


@pytest.mark.parametrize("size", ["tiny", *SLOW])
def test_outputs_and_detections(size, make, randomise):
    words = [f"model=lwdetr_{size}", *FEW, "model.image_size=[256,256]"]
    ours = randomise(make(*words).double()).eval()
    theirs = peer_of(ours, *words).eval()
    with torch.no_grad():
        outputs, expected = ours(images(256)), theirs(pixel_values=normal(ours, images(256)))
    torch.testing.assert_close(outputs.pred.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected.pred_boxes, **CLOSE)
    sizes = torch.tensor([[480, 640], [100, 30], [64, 64]])
    wanted = DeformableDetrImageProcessor().post_process_object_detection(expected, 0.0, sizes, top_k=20)
    for found, right, size_px in zip(ours.postprocess(outputs, sizes), wanted, sizes, strict=True):
        torch.testing.assert_close(found.scores, right["scores"], **CLOSE)
        assert found.labels.tolist() == right["labels"].tolist()
        cut = right["boxes"].clamp(min=0).minimum(size_px.flip(0).repeat(2).double())
        torch.testing.assert_close(found.boxes, cut, rtol=0, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("size", ["tiny", *SLOW])
def test_training(size, make, randomise, targets):
    """With groups: every layer, the encoder's boxes, the pairs, all terms of the loss and all gradients."""
    words = [f"model=lwdetr_{size}", *FEW, "model.image_size=[128,128]"]
    ours = randomise(make(*words).double()).train()
    theirs = peer_of(ours, *words).train()
    labels = [
        {"class_labels": one, "boxes": boxes.double()}
        for one, boxes in zip(targets.labels.split(targets.counts), targets.boxes.split(targets.counts))
    ]
    outputs = ours(images(128))
    expected = theirs(pixel_values=normal(ours, images(128)), labels=labels)
    layers = [*expected.auxiliary_outputs, {"logits": expected.logits, "pred_boxes": expected.pred_boxes}]
    torch.testing.assert_close(outputs.layers.logits, torch.stack([one["logits"] for one in layers]), **CLOSE)
    torch.testing.assert_close(outputs.layers.boxes, torch.stack([one["pred_boxes"] for one in layers]), **CLOSE)
    torch.testing.assert_close(outputs.encoder.logits, expected.enc_outputs_class, **CLOSE)
    torch.testing.assert_close(outputs.encoder.boxes, expected.enc_outputs_coord_logits, **CLOSE)

    losses = criterion(compose([*words, "data.num_classes=7"]))
    matcher = LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    pairs = losses.matcher([Prediction(*outputs.layers[:2])], targets, 3)
    first = torch.tensor([0, *targets.counts[:-1]]).cumsum(0)
    for layer, other in enumerate(layers):
        found = set(zip(*(side[layer].tolist() for side in (pairs.image, pairs.query, pairs.target))))
        right = matcher(other, labels, 3)
        assert found == {
            (image, query, int(first[image]) + target)
            for image, (queries, objects) in enumerate(right)
            for query, target in zip(queries.tolist(), objects.tolist())
        }

    terms = losses(outputs, targets, float(sum(targets.counts)))
    weights = {"loss_ce": ("loss_class", 1), "loss_bbox": ("loss_bbox", 5), "loss_giou": ("loss_giou", 2)}
    suffixes = {"": "", "_enc": "_enc"} | {f"_{index}": f"_aux_{index}" for index in range(len(layers) - 1)}
    assert len(terms) == 1 + len(weights) * len(suffixes)
    for their_name, (our_name, weight) in weights.items():
        for their_suffix, our_suffix in suffixes.items():
            right = expected.loss_dict[their_name + their_suffix] * weight
            torch.testing.assert_close(terms[our_name + our_suffix], right, rtol=1e-6, atol=0, check_dtype=False)
    terms["total"].backward()
    expected.loss.backward()
    copy = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradients = theirs_of(ours, {name: copy.get(name, tensor) for name, tensor in ours.state_dict().items()})
    for name, parameter in theirs.named_parameters():
        close = {"rtol": 1e-5, "atol": 1e-9 + 1e-6 * parameter.grad.abs().max().item()}
        torch.testing.assert_close(gradients[name], parameter.grad, **close, msg=lambda text, n=name: f"{n}: {text}")
