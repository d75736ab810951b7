"""timm networks as backbones: maps are chosen by stride, whatever their place."""

import pytest
import torch
from torch import nn

from detr_exp.model.backbone.timm_backbone import TimmBackbone

PLAIN = {"out_strides": [8, 16, 32], "freeze_norm": False, "pretrained": False, "options": {}}


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "hgnetv2_b0",
        "convnext_atto",
        "efficientnet_b0",
        "test_resnet",
        pytest.param("resnet50d", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),  # maps with channels last
        pytest.param("darknet53", marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_100", marks=pytest.mark.slow),
    ],
)
def test_strides_and_channels_are_those_of_the_maps_and_all_parameters_train(name):
    options = {"strict_img_size": False} if name.startswith("swin") else {}
    backbone = TimmBackbone(name=name, **PLAIN | {"options": options})
    size = 224 if name.startswith("swin") else 64
    maps = backbone(torch.rand(2, 3, size, size))
    assert [level.shape[1] for level in maps] == backbone.out_channels
    assert [size // level.shape[2] for level in maps] == backbone.out_strides == [8, 16, 32]
    sum(level.square().sum() for level in maps).backward()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_normalisation_is_the_networks_own():
    backbone = TimmBackbone(name="resnet18", **PLAIN)
    assert backbone.pixel_mean == pytest.approx([0.485, 0.456, 0.406])
    assert backbone.pixel_std == pytest.approx([0.229, 0.224, 0.225])


def test_frozen_norms_keep_their_activation():
    torch.manual_seed(0)
    plain = TimmBackbone(name="efficientnet_b0", **PLAIN).eval()
    frozen = TimmBackbone(name="efficientnet_b0", **PLAIN | {"freeze_norm": True})
    frozen.load_state_dict({n: t for n, t in plain.state_dict().items() if not n.endswith("num_batches_tracked")})
    assert not [module for module in frozen.modules() if isinstance(module, nn.BatchNorm2d)]
    images = torch.rand(1, 3, 64, 64)
    for a, b in zip(frozen(images), plain(images)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet_18"}, r"no network 'resnet_18'.*e\.g\. .*resnet"),
        ({"name": "vit_tiny_patch16_224"}, r"\[8, 16, 32\] but vit_tiny_patch16_224 has maps of strides \[16\]"),
        ({"out_strides": [64]}, r"out_strides is \[64\].*\[2, 4, 8, 16, 32\]"),
        ({"options": {"colour": 1}}, r"\{'colour': 1\}.*model\.backbone\.options"),
        ({"pretrained": "/no/where.pth"}, r"is not a file.*model\.backbone\.pretrained=false"),
        ({"options": {"checkpoint_path": "w.pth"}}, r"options has checkpoint_path.*model\.backbone\.pretrained="),
        ({"options": {"pretrained": True}}, r"options has pretrained, .*model\.backbone\.pretrained="),
        ({"options": {"pretrained_cfg_overlay": {"url": "http://a.b"}}}, "options has pretrained_cfg_overlay"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**{"name": "resnet18"} | PLAIN | change)
