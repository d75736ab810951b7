"""D-FINE: what it predicts at the start, where gradients go, what deployment keeps, and which weights it takes."""

from __future__ import annotations

import logging

import pytest
import torch
from dfine_peer import SILU, SMALL, official_of

from detr_exp.build import compose, criterion
from detr_exp.model.layer.conv import ConvNorm, ScaledReLU
from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_dfine import (
    from_huggingface,
    from_official,
    to_huggingface,
    to_huggingface_file,
)
from detr_exp.ops.edges import boxes_from_edges, edge_positions
from detr_exp.structures import leaves

IMAGES = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))


def test_all_boxes_are_the_first_ones_before_training(make, targets):
    outputs = make(*SMALL).train()(IMAGES, targets)
    for queries in (outputs, outputs.denoising):
        assert not queries.layers.edges.any()
        assert not queries.layers.reference.requires_grad
        for boxes in (*queries.layers.boxes, *queries.layers.reference):
            torch.testing.assert_close(boxes, queries.initial.boxes, rtol=0, atol=1e-6)
    assert len(outputs.layers.boxes) == 3
    assert outputs.layers.edges.shape == (3, 3, 20, 4, 33)


def test_boxes_are_the_means_of_their_distributions(make, randomise, targets):
    layers = randomise(make(*SMALL, "model.edge_scale=8.0").double()).train()(IMAGES.double(), targets).layers
    means = (layers.edges.softmax(-1) * edge_positions(32, 0.5, 8.0)).sum(-1)
    torch.testing.assert_close(layers.boxes, boxes_from_edges(means, layers.reference, 8.0), rtol=0, atol=1e-6)


def test_each_box_trains_the_heads_up_to_its_layer(make, randomise):
    """Distributions add up with their gradients; what the next layer adds to its input has none."""
    network = randomise(make(*SMALL)).train()
    for index, boxes in enumerate(network(IMAGES).layers.boxes):
        reached = {
            name
            for name, gradient in zip(
                [name for name, _ in network.decoder.named_parameters()],
                torch.autograd.grad(
                    boxes.sum(), list(network.decoder.parameters()), allow_unused=True, retain_graph=True
                ),
            )
            if gradient is not None and gradient.any()
        }
        heads = {int(name.split(".")[1]) for name in reached if name.startswith("dec_bbox_head.")}
        assert heads == set(range(index + 1))
        assert not [name for name in reached if name.startswith(("pre_bbox_head.", "enc_bbox_head.", "lqe_layers."))]


@pytest.mark.parametrize("loss", ["vfl", "dfine"])
def test_every_parameter_is_trained_also_without_objects(loss, make, no_objects):
    network = make(*SMALL).train()
    terms = criterion(compose([*SMALL, "data.num_classes=7", f"loss={loss}"]))(
        network(IMAGES, no_objects), no_objects, 0.0
    )
    assert all(term.isfinite() for term in terms.values())
    terms["total"].backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_the_first_layer_is_in_full_precision_under_autocast(make):
    with torch.autocast("cpu", torch.bfloat16):
        layers = make(*SMALL).train()(IMAGES).layers
    assert {tensor.dtype for tensor in leaves(layers)} == {torch.float32}


@pytest.mark.parametrize("eval_idx", [-1, 1])
def test_deployment_changes_nothing(eval_idx, make, randomise):
    network = randomise(make(*SMALL, f"model.eval_idx={eval_idx}").double()).eval()
    with torch.no_grad():
        network.backbone.stem.stem1.act.scale.fill_(-0.7)  # a scale below zero limits values from above
        expected = network(IMAGES.double()).pred
        before = sum(parameter.numel() for parameter in network.parameters())
        found = network.deploy()(IMAGES.double()).pred
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-9)
    assert sum(parameter.numel() for parameter in network.parameters()) < before
    assert not [module for module in network.modules() if isinstance(module, (torch.nn.BatchNorm2d, ScaledReLU))]
    assert len(network.decoder.layers) == eval_idx % 3 + 1


@pytest.mark.parametrize("scale", [0.6, 0.0, -1.2])
def test_a_scaled_relu_folds_into_its_convolution(scale):
    torch.manual_seed(0)
    layer = ConvNorm(3, 5, 3, act=ScaledReLU()).double().eval()
    maps = torch.randn(2, 3, 6, 6).double()
    with torch.no_grad():
        layer.act.scale.fill_(scale)
        layer.act.bias.fill_(0.3)
        layer.norm.bias.uniform_(-1, 1)
        expected = layer(maps)
        layer.fold()
        torch.testing.assert_close(layer(maps), expected, rtol=0, atol=1e-12)


def test_weights_in_the_names_of_others_there_and_back(make):
    network = make(*SMALL)
    state, official = network.state_dict(), official_of(network)
    extra = {"encoder.feature_projector.0.weight": torch.zeros(1)}
    assert official["decoder.anchors"].shape == (1, 12 * 16 + 6 * 8 + 3 * 4, 4)
    for name in (
        "decoder.decoder.layers.0.cross_attn.num_points_scale",
        "backbone.stem.stem2a.lab.scale",
        "backbone.stages.3.blocks.0.aggregation.1.bn.weight",
        "encoder.downsample_convs.1.0.cv2.norm.bias",
        "decoder.decoder.reg_scale",
        "decoder.decoder.lqe_layers.2.reg_conf.layers.0.weight",
    ):
        assert name in official
    points = {"num_points": [3, 6, 3]}
    for back in (
        from_official(official | extra),
        from_huggingface(to_huggingface(state, **points)),
        from_huggingface(to_huggingface_file(state, **points)),
    ):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    assert "model.encoder.encoder.0.layers.0.fc1.weight" in to_huggingface_file(state, **points)


def saved(folder, state, name):
    torch.save({"model": {}, "ema": {"module": state}}, folder / name)
    return folder / name


def test_files_of_the_authors_are_read(make, tmp_path):
    state = make(*SMALL).state_dict()
    path = saved(tmp_path, official_of(make(*SMALL)), "dfine_s_coco.pth")
    other = make(*SMALL, num_classes=7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert load_weights(other, path).startswith(f"{len([n for n in state if 'num_batches' not in n])} of ")
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert read_weights(path).origin == "official D-FINE"


def test_weights_of_another_activation_are_refused(make, tmp_path, caplog):
    """Their tensors fit as well, and give nonsense."""
    relu, silu = make(*SMALL), make(*SMALL, *SILU)
    state = official_of(relu)
    with pytest.raises(ValueError, match=r"with silu.*has relu; set model\.ffn_activation=silu model\.head_act"):
        load_weights(relu, saved(tmp_path, state, "deim_dfine_hgnetv2_s_coco_120e.pth"))
    with pytest.raises(ValueError, match=r"with silu"):
        load_weights(relu, saved(tmp_path, state, "RTv4-S-hgnet.pth"))
    with pytest.raises(ValueError, match=r"with relu.*has silu; set model\.ffn_activation=relu"):
        load_weights(silu, saved(tmp_path, state, "dfine_s_obj365.pth"))
    load_weights(silu, saved(tmp_path, state, "deim_dfine_s.pth"))
    with caplog.at_level(logging.WARNING):
        load_weights(silu, saved(tmp_path, state, "best.pth"))
    assert "does not say with which activation it was trained; taken to be silu" in caplog.text


def test_weights_of_another_scale_are_refused(make, tmp_path):
    """They would give plausible boxes, and wrong ones."""
    path = saved(tmp_path, official_of(make(*SMALL, "model.edge_scale=8.0")), "dfine_x.pth")
    with pytest.raises(ValueError, match=r"edge_scale 8, but model\.edge_scale is 4.*model\.edge_scale=8"):
        load_weights(make(*SMALL), path)
    load_weights(make(*SMALL, "model.edge_scale=8.0"), path)
    with pytest.raises(ValueError, match=r"edge_bound 0\.5, but model\.edge_bound is 0\.7"):
        load_weights(make(*SMALL, "model.edge_scale=8.0", "model.edge_bound=0.7"), path)


def test_other_backbones_and_parts_in_it(make, targets):
    for words in (
        ["model=dfine_tiny", "model/backbone=r18vd", "model.image_size=[64,64]", "model.num_queries=20"],
        ["model=rtdetrv2_tiny", "model/decoder=dfine", "model.image_size=[64,64]", "model.num_queries=20"],
        [*SMALL, "model.query_select_method=agnostic", "loss=ce"],
        [*SMALL, "model.num_denoising=0", "model.cross_attn_method=discrete"],
    ):
        outputs = make(*words).train()(IMAGES[:, :, :64, :64], targets)
        assert outputs.layers.edges.shape[-1] == 33
        assert (outputs.denoising is None) == ("model.num_denoising=0" in words)
