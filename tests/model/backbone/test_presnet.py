"""ResNet-vd against timm's ResNet-d, and its options."""

import pytest
import timm
import torch
from backbone_peer import timm_name
from torch import nn

from detr_exp.model.backbone.presnet import PResNet
from detr_exp.tensor_files import sha256_of

TINY = {"depth": 18, "out_strides": [8, 16, 32], "widths": [8, 8, 16, 16], "blocks": [1, 1, 1, 1]}
OPEN = {"freeze_at": -1, "freeze_norm": False, "pretrained": False}


def test_depth_50_is_timms_resnet50d():
    ours = PResNet(depth=50, out_strides=[4, 8, 16, 32], widths=[64, 128, 256, 512], blocks=None, **OPEN)
    theirs = timm.create_model("resnet50d", features_only=True, out_indices=[1, 2, 3, 4])
    ours.load_state_dict({name: theirs.state_dict()[timm_name(name)] for name in ours.state_dict()})
    assert set(map(timm_name, ours.state_dict())) == set(theirs.state_dict())
    images = torch.rand(1, 3, 64, 96)
    for a, b in zip(ours.eval()(images), theirs.eval()(images)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strides", [[8, 16, 32], [16], [4, 8]])
def test_maps_are_chosen_by_stride_and_later_stages_are_not_built(strides):
    backbone = PResNet(**TINY | {"out_strides": strides}, **OPEN)
    maps = backbone(torch.rand(1, 3, 64, 128))
    assert backbone.out_strides == strides
    assert [level.shape[1] for level in maps] == backbone.out_channels
    assert [(64 // level.shape[2], 128 // level.shape[3]) for level in maps] == [(stride, stride) for stride in strides]
    sum(level.sum() for level in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_odd_sizes_round_up():
    assert [m.shape[-1] for m in PResNet(**TINY, **OPEN)(torch.rand(2, 3, 64, 255))] == [32, 16, 8]


@pytest.mark.parametrize(
    ("freeze_at", "frozen"), [(-1, []), (0, ["conv1"]), (2, ["conv1", "res_layers.0", "res_layers.1"])]
)
def test_what_is_frozen(freeze_at, frozen):
    backbone = PResNet(**TINY, **OPEN | {"freeze_at": freeze_at})
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(frozen)), name
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.train()(torch.rand(2, 3, 64, 64))
    moved = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved
    assert not [name for name in moved if frozen and name.startswith(tuple(frozen))]


def test_frozen_norms_are_no_parameters():
    backbone = PResNet(**TINY, **OPEN | {"freeze_norm": True})
    assert not [name for name, _ in backbone.named_parameters() if "norm" in name]
    assert not [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def test_pretrained_weights_from_a_file(tmp_path, randomise):
    torch.manual_seed(0)
    source = randomise(PResNet(**TINY, **OPEN))
    state = source.state_dict()
    torch.save(state | {"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    loaded = PResNet(**TINY, **OPEN | {"pretrained": str(tmp_path / "weights.pth"), "freeze_norm": True})
    images = torch.rand(1, 3, 64, 64)
    for a, b in zip(loaded(images), source.eval()(images)):
        torch.testing.assert_close(a, b)
    assert loaded.initial.sha256 == sha256_of(tmp_path / "weights.pth")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "nested.pth")
    nested = PResNet(**TINY, **OPEN | {"pretrained": str(tmp_path / "nested.pth")})
    assert all(torch.equal(nested.state_dict()[name], tensor) for name, tensor in state.items())


def test_pretrained_weights_that_do_not_fit_or_exist(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"pretrained names /no/where.*pretrained=false"):
        PResNet(**TINY, **OPEN | {"pretrained": "/no/where"})
    deeper = PResNet(**TINY, **OPEN).state_dict() | {"res_layers.2.blocks.9.branch2a.conv.weight": torch.zeros(1)}
    torch.save(deeper, tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match=r"is for a deeper backbone: it also has res_layers\.2\.blocks\.9"):
        PResNet(**TINY, **OPEN | {"pretrained": str(tmp_path / "deeper.pth")})
    assert PResNet(**TINY | OPEN | {"pretrained": str(tmp_path / "deeper.pth"), "out_strides": [8]})
    torch.save({"conv1.conv1_1.conv.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"lacks .* and 50 more|lacks .*more and has another shape for conv1\.conv1_1"):
        PResNet(**TINY, **OPEN | {"pretrained": str(tmp_path / "weights.pth")})
    monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"pretrained is true but .*ResNet18_vd.*put it at {tmp_path}.*=false"):
        PResNet(**TINY, **OPEN | {"pretrained": True})
    with pytest.raises(ValueError, match=r"are weights of a detector; use model\.weights=rfdetr_nano_coco"):
        PResNet(**TINY, **OPEN | {"pretrained": "rfdetr_nano_coco"})
    monkeypatch.setenv("DETR_EXP_WEIGHTS", str(tmp_path))
    torch.save(PResNet(**TINY, **OPEN).state_dict(), tmp_path / "resnet18_vd.pth")
    assert PResNet(**TINY, **OPEN | {"pretrained": True})


@pytest.mark.parametrize(
    ("change", "message"), [({"depth": 19}, "depth is 19; .*18, 34"), ({"out_strides": [8, 64]}, r"\[8, 64\].*\[4, 8")]
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        PResNet(**TINY | change, **OPEN)
