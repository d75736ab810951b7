"""RF-DETR equals the `rfdetr` package, number by number."""

import pytest
import torch
from rfdetr_peer import criterion_for, padded_batch, peer, peer_input, twin

from detr_exp.structures import Targets

SIZE = (224, 256)  # not what the networks are made for
CLOSE = dict(atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def networks():
    theirs, config, train_config = peer(
        num_classes=5, group_detr=3, num_queries=20, num_select=20, resolution=192, projector_scale=["P4"]
    )
    return twin(theirs, config), theirs, (config, train_config)


def targets():
    generator = torch.Generator().manual_seed(3)
    counts = (4, 2)
    boxes = torch.rand(6, 4, generator=generator) * 0.4 + 0.2
    return Targets(labels=torch.tensor([0, 1, 2, 3, 4, 1]), boxes=boxes, counts=counts)


def as_theirs(packed):
    parts = zip(packed.labels.split(packed.counts), packed.boxes.split(packed.counts))
    return [dict(labels=labels, boxes=boxes) for labels, boxes in parts]


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_evaluation(networks, padded):
    ours, theirs, _ = networks
    images, mask = padded_batch(*SIZE)
    mask = mask if padded else None
    outputs = ours.eval()(images, padding_mask=mask)
    expected = theirs.eval()(peer_input(ours, images, mask))
    assert outputs.layers.logits.shape == (1, 2, 20, 6)
    assert outputs.encoder is None
    torch.testing.assert_close(outputs.pred.logits, expected["pred_logits"], **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected["pred_boxes"], **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_training_with_groups(networks, padded):
    ours, theirs, _ = networks
    images, mask = padded_batch(*SIZE)
    mask = mask if padded else None
    outputs = ours.train()(images, padding_mask=mask)
    expected = theirs.train()(peer_input(ours, images, mask))
    assert outputs.groups == 3
    layers = [*expected["aux_outputs"], expected]
    for kind in ("logits", "boxes"):
        stacked = torch.stack([layer[f"pred_{kind}"] for layer in layers])
        torch.testing.assert_close(getattr(outputs.layers, kind), stacked, **CLOSE)
        torch.testing.assert_close(getattr(outputs.encoder, kind), expected["enc_outputs"][f"pred_{kind}"], **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_losses_and_gradients(networks, training):
    """The criterion on both networks' outputs: every weighted term, and what reaches the weights."""
    from rfdetr.models.lwdetr import build_criterion_from_config

    ours, theirs, configs = networks
    images, _ = padded_batch(*SIZE)
    criterion = build_criterion_from_config(*configs)[0].train(training)
    theirs.train(training).zero_grad()
    losses = criterion(theirs(peer_input(ours, images)), as_theirs(targets()))
    expected = {name: losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses}

    loss = criterion_for(num_classes=6)
    ours.train(training).zero_grad()
    found = loss(ours(images), targets(), num_boxes=6)
    last = len(ours.layers) - 1
    suffixes = {"": ""} | ({f"_{i}": f"_aux_{i}" for i in range(last)} | {"_enc": "_enc"} if training else {})
    names = {"loss_ce": "loss_class", "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}
    assert len(found) == 1 + len(names) * len(suffixes)
    for theirs_name, our_name in names.items():
        for theirs_suffix, our_suffix in suffixes.items():
            ratio = found[our_name + our_suffix] / expected[theirs_name + theirs_suffix]
            assert ratio.item() == pytest.approx(1, abs=1e-4)
    if not training:
        return
    sum(expected.values()).backward()
    found["total"].backward()
    pairs = {
        "class_head.weight": theirs.class_embed.weight,
        "box_head.layers.0.weight": theirs.bbox_embed.layers[0].weight,
        "layers.0.cross_attn.sampling_offsets.weight": theirs.transformer.decoder.layers[
            0
        ].cross_attn.sampling_offsets.weight,
        "backbone.blocks.0.out.weight": theirs.backbone[0]
        .encoder.encoder.encoder.layer[0]
        .attention.output.dense.weight,
    }
    for name, parameter in pairs.items():
        gradient = ours.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max().item())
    chosen = torch.stack([linear.weight.grad for linear in theirs.transformer.enc_output])
    torch.testing.assert_close(ours.selection.project.weight.grad, chosen, rtol=1e-3, atol=1e-4 * chosen.abs().max())
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_postprocessing(networks):
    from rfdetr.models.lwdetr import build_criterion_from_config

    ours, theirs, configs = networks
    images, _ = padded_batch(*SIZE)
    sizes = torch.tensor([[480, 640], [100, 30]])
    postprocess = build_criterion_from_config(*configs)[1]
    expected = postprocess(theirs.eval()(peer_input(ours, images)), sizes)
    for found, right in zip(ours.postprocess(ours.eval()(images), sizes), expected):
        assert len(found) == 20
        torch.testing.assert_close(found.scores, right["scores"], **CLOSE)
        assert found.labels.tolist() == right["labels"].tolist()
        torch.testing.assert_close(found.boxes, right["boxes"], atol=1e-3, rtol=0)
