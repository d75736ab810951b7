"""Weights between names: round trips, whose file it is, what does not fit, and classes carried over by name."""

from __future__ import annotations

import json
import logging
import re
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from detr_exp.model.layer.position import fit_positions
from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_rtdetr import (
    from_huggingface,
    from_official,
    is_huggingface,
    is_official,
    to_huggingface,
    to_official,
    without_layers_beyond,
)

POINTS = {"num_points": [4, 4, 4]}
OFFICIAL = {**POINTS, "spatial_shapes": [(12, 16), (6, 8), (3, 4)]}
NAMES = ["ape", "bee", "cat", "dog", "eel", "fox", "gnu"]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def network(small, randomise):
    return randomise(small())


@pytest.mark.parametrize("overrides", [[], ["model.learn_query_content=true"], ["model.backbone.freeze_norm=true"]])
def test_renaming_can_be_undone(overrides, small, randomise):
    state = randomise(small(*overrides)).state_dict()
    assert same(from_official(to_official(state, **OFFICIAL)), state)
    assert same(from_official(to_official(state, **OFFICIAL, version=1)), state)
    assert same(from_huggingface(to_huggingface(state, **POINTS)), state)


@pytest.mark.parametrize("backbone", ["r50vd", "hgnetv2_l"])
def test_official_names_of_large_networks_can_be_undone(backbone, make):
    with torch.device("meta"):
        state = make("model=rtdetrv2", f"model/backbone={backbone}", num_classes=80).state_dict()
    assert from_official(to_official(state, **OFFICIAL)).keys() == state.keys()


def test_official_names(network):
    """Names as they stand in published files."""
    state = to_official(network.state_dict(), **OFFICIAL)
    for name, shape in {
        "backbone.conv1.conv1_2.norm.running_var": (4,),
        "backbone.res_layers.0.blocks.0.short.conv.weight": (8, 8, 1, 1),
        "backbone.res_layers.1.blocks.0.short.conv.norm.bias": (12,),
        "encoder.input_proj.2.norm.weight": (32,),
        "encoder.encoder.0.layers.0.self_attn.in_proj_weight": (96, 32),
        "encoder.fpn_blocks.1.bottlenecks.2.conv1.conv.weight": (16, 16, 3, 3),
        "decoder.anchors": (1, 252, 4),
        "decoder.valid_mask": (1, 252, 1),
        "decoder.decoder.layers.2.cross_attn.num_points_scale": (12,),
        "decoder.decoder.layers.0.norm3.weight": (32,),
        "decoder.denoising_class_embed.weight": (8, 32),
        "decoder.query_pos_head.layers.1.weight": (32, 64),
        "decoder.enc_output.proj.weight": (32, 32),
        "decoder.dec_bbox_head.2.layers.2.bias": (4,),
    }.items():
        assert tuple(state[name].shape) == shape, name
    first = to_official(network.state_dict(), **OFFICIAL, version=1)
    assert {"encoder.input_proj.2.1.weight", "decoder.enc_output.0.weight"} < first.keys()
    assert not [name for name in first if "num_points_scale" in name or "anchors" in name]


def version_4(state):
    """The spelling of files that transformers 4 has written, without the second names of the heads."""
    old = {}
    for name, tensor in state.items():
        name = name.replace("encoder.aifi.", "encoder.encoder.").replace(".mlp.fc", ".fc")
        name = name.replace("self_attn.o_proj", "self_attn.out_proj")
        old[re.sub(r"^model\.decoder\.(class_embed|bbox_embed)", r"\1", name)] = tensor
    return old


def test_both_spellings_of_hugging_face(network):
    state = to_huggingface(network.state_dict(), **POINTS)
    assert same(from_huggingface(version_4(state)), network.state_dict())
    assert same(from_huggingface(state | version_4(state)), network.state_dict())


def test_whose_names_they_are(network):
    own = network.state_dict()
    assert [is_official(own), is_huggingface(own)] == [False, False]
    assert is_official(to_official(own, **OFFICIAL, version=1))
    assert is_huggingface(version_4(to_huggingface(own, **POINTS)))


def files(network, folder):
    """The same weights as every kind of file that is understood."""
    own = network.state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    official = to_official(own, **OFFICIAL)
    average = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
    torch.save({"model": to_official(other, **OFFICIAL), "ema": {"module": official}}, folder / "official.pth")
    torch.save({"model": to_official(own, **OFFICIAL, version=1)}, folder / "first.pth")
    torch.save({"format": 1, "model": own}, folder / "slim.pth")
    torch.save({"format": 1, "model": other, "ema": {"average": average}}, folder / "training.pth")
    save_file(to_huggingface(own, **POINTS), folder / "model.safetensors")
    torch.save(version_4(to_huggingface(own, **POINTS)), folder / "pytorch_model.bin")
    return ["official.pth", "first.pth", "slim.pth", "training.pth", "model.safetensors", "pytorch_model.bin", "."]


def test_every_kind_of_file_is_recognised_by_its_keys(network, small, tmp_path):
    expected = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    for name in files(network, tmp_path):
        fresh = small()
        load_weights(fresh, tmp_path / name)
        actual = {n: fresh.state_dict()[n] for n in expected}
        assert same(actual, expected), name


def test_frozen_norms_take_the_weights_of_trained_ones(network, small, tmp_path):
    torch.save({"model": to_official(network.state_dict(), **OFFICIAL)}, tmp_path / "file.pth")
    frozen = small("model.backbone.freeze_norm=true")
    load_weights(frozen, tmp_path / "file.pth")
    name = "backbone.res_layers.2.blocks.0.branch2a.norm.running_var"
    assert torch.equal(frozen.state_dict()[name], network.state_dict()[name])


CLASS_TENSORS = [
    "decoder.enc_score_head.weight",
    "decoder.enc_score_head.bias",
    *(f"decoder.dec_score_head.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")),
    "decoder.denoising_class_embed.weight",
]


def test_another_number_of_classes_starts_only_what_depends_on_it_anew(network, small, tmp_path, caplog):
    torch.save({"model": to_official(network.state_dict(), **OFFICIAL)}, tmp_path / "file.pth")
    fresh = small(num_classes=3)
    initial = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_weights(fresh, tmp_path / "file.pth", ["x", "y", "z"])
    for name, tensor in fresh.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            source = initial if name in CLASS_TENSORS else network.state_dict()
            assert torch.equal(tensor, source[name]), name
    assert all(name in caplog.text for name in CLASS_TENSORS)


@pytest.mark.parametrize("overrides", [[], ["loss=ce"]])
def test_classes_are_carried_over_by_name(overrides, small, randomise, tmp_path, caplog):
    network = randomise(small(*overrides))
    torch.save({"format": 1, "model": network.state_dict(), "classes": NAMES}, tmp_path / "file.pth")
    fresh = small(*overrides, num_classes=3)
    initial = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_weights(fresh, tmp_path / "file.pth", ["Fox", "yak", "ape"])
    assert "yak" in caplog.text
    assert "fox" not in caplog.text
    for name in CLASS_TENSORS:
        actual, theirs = fresh.state_dict()[name], network.state_dict()[name]
        assert torch.equal(actual[0], theirs[5]), name
        assert torch.equal(actual[1], initial[name][1]), name
        assert torch.equal(actual[2], theirs[0]), name
        if len(actual) > 3:  # background, or the row of empty denoising slots
            assert torch.equal(actual[3], theirs[7]), name


def test_class_names_beside_a_hugging_face_file(network, tmp_path):
    save_file(to_huggingface(network.state_dict(), **POINTS), tmp_path / "model.safetensors")
    assert read_weights(tmp_path).classes is None
    labels = {str(index): name for index, name in enumerate(NAMES)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    assert read_weights(tmp_path).classes == NAMES


def test_denoising_may_be_missing_on_either_side(network, small, tmp_path):
    torch.save({"format": 1, "model": network.state_dict()}, tmp_path / "with.pth")
    load_weights(small("model.num_denoising=0"), tmp_path / "with.pth")
    torch.save({"format": 1, "model": small("model.num_denoising=0").state_dict()}, tmp_path / "without.pth")
    load_weights(small(), tmp_path / "without.pth")


def test_weights_of_ours_for_another_image_size_have_their_positions_resampled(make, randomise, tmp_path):
    def of_size(height: int, width: int) -> torch.nn.Module:
        vit = (f"model.backbone.{key}" for key in ("width=32", "num_heads=2", "patch_size=8", "out_blocks=[1,2]"))
        narrow = ("model.hidden_dim=32", "model.dim_feedforward=32", "model.num_cross_heads=4", "model.num_layers=1")
        return make("model=rfdetr", *vit, *narrow, "model.num_groups=1", f"model.image_size=[{height},{width}]")

    trained, larger = randomise(of_size(64, 64)), of_size(96, 128)
    torch.save({"format": 1, "model": trained.state_dict(), "classes": NAMES}, tmp_path / "file.pth")
    share = load_weights(larger, tmp_path / "file.pth", NAMES)
    assert share == f"{len(trained.state_dict())} of {len(trained.state_dict())} tensors"
    fit_positions(trained, (96, 128))
    assert same(larger.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layers=4"], r"28 not in the file: decoder\.dec_bbox_head\.3.*model\.weights=null"),
        (["model.num_layers=2"], r"not in the network: decoder\.dec_bbox_head\.2"),
        (["model.dim_feedforward=64"], r"of another shape: decoder\.layers\.0\.linear1\.bias"),
    ],
)
def test_what_does_not_fit_is_listed(overrides, message, network, small, tmp_path):
    torch.save({"format": 1, "model": network.state_dict()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(small(*overrides), tmp_path / "file.pth")


def test_files_that_cannot_be_used(tmp_path, small):
    network = small()
    diverged = network.state_dict() | {"decoder.enc_output.norm.bias": torch.full((32,), torch.nan)}
    torch.save({"format": 1, "model": diverged}, tmp_path / "diverged.pth")
    with pytest.raises(ValueError, match=r"diverged\.pth has values that are not finite in 1 tensors .*weights=null"):
        load_weights(network, tmp_path / "diverged.pth")
    with pytest.raises(ValueError, match=r"nowhere\.pth is not a file"):
        load_weights(network, tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a folder without"):
        load_weights(network, tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"none of the known kinds.*begins with weight"):
        load_weights(network, tmp_path / "foreign.pth")
    torch.save({"model": OrderedDict, "run": print}, tmp_path / "code.pth")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    for name, log in (("code.pth", "damaged or holds more than tensors"), ("broken.pth", "damaged or no file of ten")):
        with pytest.raises(ValueError, match=log):
            load_weights(network, tmp_path / name)


def test_layers_beyond_the_evaluated_one_can_be_left_out(network):
    kept = without_layers_beyond(network.state_dict(), 1)
    left_out = network.state_dict().keys() - kept.keys()
    assert left_out
    assert all(re.match(r"decoder\.(layers|dec_score_head|dec_bbox_head)\.2\.", name) for name in left_out)
