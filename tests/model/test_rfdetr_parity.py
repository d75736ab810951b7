"""The three RF-DETR networks equal those of the `rfdetr` package, number by number.

Weights are random, and images of another size than the networks are made for. Padded images are not compared: the
package never makes any, its backbone would attend to their padding, and its boxes would be relative to what a mask on
cells leaves of an image.
"""

from typing import NamedTuple

import pytest
import torch
from rfdetr_peer import criterion_for, peer, peer_input, twin, two_images

from detr_exp.ops import products
from detr_exp.structures import Targets

CLOSE = dict(atol=1e-5, rtol=0)
CLOSE_MASKS = dict(atol=1e-4, rtol=0)  # sums of 256 products
SMALL = dict(group_detr=3, num_queries=20, num_select=20)
COUNTS = [5, 0, 3]
LABELS = [0, 2, 1, 0, 2, 2]
BOXES_PER_IMAGE = (4, 2)


class Family(NamedTuple):
    """A pair of networks, ours and theirs."""

    ours: torch.nn.Module
    theirs: torch.nn.Module
    configs: tuple
    size: tuple[int, int]
    parts: tuple[str, ...]  # of a prediction
    losses: dict[str, str]  # their names -> ours


BOX_LOSSES = {"loss_ce": "loss_class", "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}
MASK_LOSSES = {f"loss_mask_{kind}": f"loss_mask_{kind}" for kind in ("ce", "dice")}
KEYPOINT_LOSSES = {f"loss_keypoints_{kind}": f"loss_keypoint_{kind}" for kind in ("l1", "findable", "visible", "nll")}


@pytest.fixture(scope="module", params=["detection", "masks", "keypoints"])
def family(request):
    kind, train_kind, size, changes, parts, losses = {
        "detection": ("Nano", "", (224, 256), dict(resolution=192), ("logits", "boxes"), {}),
        "masks": ("SegNano", "Segmentation", (168, 132), dict(resolution=144), ("logits", "boxes"), MASK_LOSSES),
        "keypoints": (
            *("KeypointPreview", "Keypoint", (168, 192)),
            dict(resolution=144, num_keypoints_per_class=COUNTS),
            ("logits", "boxes", "keypoints"),
            KEYPOINT_LOSSES,
        ),
    }[request.param]
    theirs, *configs = peer(kind, train_kind, num_classes=2, **SMALL, **changes)
    ours = twin(theirs, configs[0])
    products.use(ours.modules(), products.fastest())
    assert ours.image_size == (changes["resolution"],) * 2
    return Family(ours, theirs, tuple(configs), size, parts, BOX_LOSSES | losses)


def targets(family):
    generator = torch.Generator().manual_seed(3)
    count = len(LABELS)
    keypoints = torch.rand(count, max(COUNTS), 3, generator=generator)
    keypoints[..., 2] = torch.randint(0, 3, (count, max(COUNTS)), generator=generator)
    keypoints[keypoints[..., 2] == 0] = 0
    with_masks, with_keypoints = "loss_mask_ce" in family.losses, "keypoints" in family.parts
    return Targets(
        labels=torch.tensor(LABELS),
        boxes=torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
        counts=BOXES_PER_IMAGE,
        masks=torch.rand(count, *family.size, generator=generator) > 0.5 if with_masks else None,
        keypoints=keypoints if with_keypoints else None,
    )


def as_theirs(packed):
    names = [name for name in ("labels", "boxes", "masks", "keypoints") if getattr(packed, name) is not None]
    split = [getattr(packed, name).split(packed.counts) for name in names]
    return [dict(zip(names, parts)) for parts in zip(*split)]


@torch.no_grad()
def test_evaluation(family):
    images = two_images(*family.size)
    outputs = family.ours.eval()(images)
    expected = family.theirs.eval()(peer_input(family.ours, images))
    assert outputs.layers.logits.shape == (1, 2, 20, 3)
    assert outputs.encoder is None
    for part in family.parts:
        torch.testing.assert_close(getattr(outputs.pred, part), expected[f"pred_{part}"], **CLOSE)
    if "pred_masks" in expected:
        torch.testing.assert_close(outputs.pred.masks.dense(), expected["pred_masks"], **CLOSE_MASKS)


@torch.no_grad()
def test_training_with_groups(family):
    images = two_images(*family.size)
    outputs = family.ours.train()(images)
    expected = family.theirs.train()(peer_input(family.ours, images))
    assert outputs.groups == 3
    layers = [*expected["aux_outputs"], expected]
    for part in family.parts:
        stacked = torch.stack([layer[f"pred_{part}"] for layer in layers])
        torch.testing.assert_close(getattr(outputs.layers, part), stacked, **CLOSE)
        torch.testing.assert_close(getattr(outputs.encoder, part), expected["enc_outputs"][f"pred_{part}"], **CLOSE)
    if "pred_masks" in expected:
        masks = outputs.layers.masks
        pairs = [(masks.features[i], masks.queries[i], layers[i]) for i in range(len(layers))]
        pairs.append((outputs.encoder.masks.features, outputs.encoder.masks.queries, expected["enc_outputs"]))
        for features, queries, right in pairs:
            torch.testing.assert_close(features, right["pred_masks"]["spatial_features"], **CLOSE)
            torch.testing.assert_close(queries, right["pred_masks"]["query_features"], **CLOSE)
            torch.testing.assert_close(masks.bias, right["pred_masks"]["bias"])


@pytest.mark.parametrize("training", [False, True])
def test_losses_and_gradients(family, training):
    """The criterion on both networks' outputs: every weighted term, and what reaches the weights."""
    from rfdetr.models.lwdetr import build_criterion_from_config

    ours, theirs = family.ours, family.theirs
    images = two_images(*family.size)
    criterion = build_criterion_from_config(*family.configs)[0].train(training)
    theirs.train(training).zero_grad()
    torch.manual_seed(12)  # points on masks are sampled
    losses = criterion(theirs(peer_input(ours, images)), as_theirs(targets(family)))
    expected = {name: losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses}

    weights = dict(weight_class=2.0, keypoint_counts=COUNTS) if "keypoints" in family.parts else {}
    ours.train(training).zero_grad()
    outputs = ours(images)
    torch.manual_seed(12)
    actual = criterion_for(num_classes=3, **weights)(outputs, targets(family), num_boxes=6)
    last = len(ours.layers) - 1
    suffixes = {"": ""} | ({f"_{i}": f"_aux_{i}" for i in range(last)} | {"_enc": "_enc"} if training else {})
    assert len(actual) == 1 + len(family.losses) * len(suffixes)
    assert len(actual) == 1 + len(expected) or not training
    if not training and "loss_mask_ce" in actual:
        return  # their evaluation draws points for more layers
    for theirs_name, our_name in family.losses.items():
        for theirs_suffix, our_suffix in suffixes.items():
            right = expected[theirs_name + theirs_suffix].item()
            assert actual[our_name + our_suffix].item() == pytest.approx(right, rel=1e-4), our_name + our_suffix
    if not training:
        return
    sum(expected.values()).backward()
    actual["total"].backward()
    vit = theirs.backbone[0].encoder.encoder
    decoder = theirs.transformer.decoder.layers[0]
    prefix = "layers.0.query_layer" if "keypoints" in family.parts else "layers.0"
    pairs = {
        "head.classes.weight": theirs.class_embed.weight.grad,
        "head.box.layers.0.weight": theirs.bbox_embed.layers[0].weight.grad,
        f"{prefix}.cross_attn.sampling_offsets.weight": decoder.cross_attn.sampling_offsets.weight.grad,
        "backbone.blocks.0.out.weight": vit.encoder.layer[0].attention.output.dense.weight.grad,
        "queries.project.weight": torch.stack([one.weight.grad for one in theirs.transformer.enc_output]),
    }
    for name, right in pairs.items():
        scale = right.abs().max().item()
        torch.testing.assert_close(ours.get_parameter(name).grad, right, rtol=1e-3, atol=1e-3 * scale, msg=name)
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_postprocessing(family):
    from rfdetr.models.lwdetr import build_criterion_from_config

    ours, theirs = family.ours, family.theirs
    images = two_images(*family.size)
    sizes = torch.tensor([[480, 640], [100, 30]])
    expected = build_criterion_from_config(*family.configs)[1](theirs.eval()(peer_input(ours, images)), sizes)
    for actual, right in zip(ours.postprocess(ours.eval()(images), sizes), expected):
        order = right["scores"].argsort(descending=True)  # theirs are not sorted by the scores they end with
        assert len(actual) == 20
        torch.testing.assert_close(actual.scores, right["scores"][order], **CLOSE)
        assert actual.labels.tolist() == right["labels"][order].tolist()
        torch.testing.assert_close(actual.boxes, right["boxes"][order], atol=1e-3, rtol=0)
        if "masks" in right:
            assert (actual.masks != right["masks"][:, 0]).float().mean() < 1e-4
        if "keypoints" in right:
            torch.testing.assert_close(actual.keypoints, right["keypoints"][order], atol=1e-3, rtol=0)
