"""HGNetV2 against timm's."""

import pytest
import timm
import torch
from backbone_peer import hgnet_name

from detr_exp.model.backbone.hgnetv2 import HGNetv2, to_official_names, to_our_names

OPEN = {"out_strides": [8, 16, 32], "freeze_at": -1, "freeze_norm": False, "pretrained": False}


@pytest.mark.parametrize(
    ("size", "peer"),
    [
        ("L", "hgnetv2_b4"),
        pytest.param("X", "hgnetv2_b5", marks=pytest.mark.slow),
        pytest.param("H", "hgnetv2_b6", marks=pytest.mark.slow),
    ],
)
def test_is_timms_network_of_another_name(size, peer):
    theirs = timm.create_model(peer, features_only=True, out_indices=[1, 2, 3]).eval()
    ours = HGNetv2(size=size, **OPEN).eval()
    ours.load_state_dict({hgnet_name(name): tensor for name, tensor in theirs.state_dict().items()})
    images = torch.rand(1, 3, 64, 96)
    for a, b in zip(ours(images), theirs(images)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_strides_channels_and_frozen_parts():
    backbone = HGNetv2(size="L", **OPEN | {"freeze_at": 1, "freeze_norm": True})
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert [64 // level.shape[2] for level in maps] == backbone.out_strides == [8, 16, 32]
    assert [level.shape[1] for level in maps] == backbone.out_channels == [512, 1024, 2048]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(("stem.", "stages.0.")), name
        assert "norm" not in name


def test_names_can_be_turned_back():
    with torch.device("meta"):
        names = list(HGNetv2(size="L", **OPEN).state_dict())
    official = [to_official_names(name) for name in names]
    assert [to_our_names(name) for name in official] == names
    assert "stem.stem2a.conv.1.weight" in official
    assert "stages.0.blocks.0.aggregation_squeeze_conv.bn.weight" in official


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'S'.*L, X, H"):
        HGNetv2(size="S", **OPEN)
