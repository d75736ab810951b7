"""A file made by other code, with random weights, goes by its name over a network into ours: the same numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from backbone_peer import hgnet_name
from omegaconf import OmegaConf
from rfdetr_peer import alike, peer, peer_input
from rtdetr_peer import SMALL
from safetensors.torch import save
from torch import nn

from detr_exp import build, start
from detr_exp.config.compose import compose
from detr_exp.model.backbone.dinov2_windowed import WindowedDinov2
from detr_exp.model.backbone.hgnetv2 import HGNetv2, to_official_names
from detr_exp.model.backbone.presnet import PResNet
from detr_exp.model.pretrained_rtdetr import from_huggingface, huggingface_config, to_official

Served = Callable[..., None]


@torch.no_grad()
def shaken(network: Any) -> Any:
    """With no zeros and ones that would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("points_scale"):  # which is a constant
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.05)
    return network.eval()


RFDETR = {
    "with args": ("rfdetr_nano_coco", "Nano", "", {"resolution": 64}, ("logits", "boxes")),
    "masks": ("rfdetr_seg_nano_coco", "SegNano", "Segmentation", {"resolution": 48}, ("logits", "boxes", "masks")),
    "keypoints": (
        *("rfdetr_keypoint_coco", "KeypointPreview", "Keypoint"),
        {"resolution": 48, "num_keypoints_per_class": [5, 0, 3]},
        ("logits", "boxes", "keypoints"),
    ),
}


@pytest.mark.parametrize("kind", RFDETR)
def test_rfdetr(kind: str, served: Served, host: Any) -> None:
    name, theirs_kind, train_kind, changes, parts = RFDETR[kind]
    small = {"num_classes": 2, "group_detr": 2, "num_queries": 8, "num_select": 8}
    theirs, config, _ = peer(theirs_kind, train_kind, **small, **changes)
    served(name, {"model": theirs.state_dict(), "args": argparse.Namespace(num_classes=2, resolution=64)})
    ours = alike(config).eval()
    found = start.find(name)
    assert found is not None
    share = start.load(ours, found)
    names = [n for n in ours.state_dict() if not n.endswith("num_batches_tracked")]
    assert share == f"{len(names)} of {len(names)} tensors"
    assert host.transfers() == 1
    images = torch.rand(1, 3, config.resolution, config.resolution)
    with torch.no_grad():
        wanted = theirs.eval()(peer_input(ours, images))
        pred = ours(images).pred
    for part in parts:
        value = pred.masks.dense() if part == "masks" else getattr(pred, part)
        torch.testing.assert_close(value, wanted[f"pred_{part}"], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def small_config() -> Any:
    return compose([*SMALL, "data.num_classes=3"])


def rtdetr_of_transformers(version: int, cfg: Any) -> nn.Module:
    import transformers

    settings = huggingface_config(OmegaConf.to_container(cfg.model, resolve=True), ["cat", "cow", "dog"])
    only_v2 = () if version == 2 else ("decoder_method", "decoder_offset_scale", "decoder_n_levels")
    for key in ("architectures", "model_type", *only_v2):
        settings.pop(key)
    backbone = transformers.RTDetrResNetConfig(**settings.pop("backbone_config") | {"model_type": "rt_detr_resnet"})
    name = "RTDetr" if version == 1 else "RTDetrV2"
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **settings)
    torch.manual_seed(0)
    return shaken(getattr(transformers, f"{name}ForObjectDetection")(config))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "version", "layout"),
    [
        ("rtdetr_r18vd_6x_coco", 1, "Hugging Face"),
        ("rtdetrv2_r18vd_120e_coco", 2, "Hugging Face"),
        ("rtdetr_r34vd_6x_coco", 1, "official"),  # converted from Paddle
        ("rtdetrv2_r34vd_120e_coco", 2, "official"),
    ],
)
def test_rtdetr(
    name: str, version: int, layout: str, served: Served, host: Any, small_config: Any, tmp_path: Path
) -> None:
    theirs = rtdetr_of_transformers(version, small_config)
    if layout == "official":
        shapes = [(12, 16), (6, 8), (3, 4)]
        state = from_huggingface(theirs.state_dict())
        state = to_official(state, num_points=[4, 4, 4], spatial_shapes=shapes, version=version)
        served(name, {"model": {n: torch.zeros_like(t) for n, t in state.items()}, "ema": {"module": state}})
    else:
        theirs.save_pretrained(tmp_path / "saved")
        served(name, (tmp_path / "saved" / "model.safetensors").read_bytes(), on_hub=True)
    cfg = OmegaConf.merge(small_config, {"model": {"weights": name}})
    ours = build.network(cfg).double().eval()
    assert {name for _, name, _ in host.asked} >= set(host.files)
    images = torch.rand(2, 3, 96, 128).double()
    with torch.no_grad():
        wanted, pred = theirs.double()(pixel_values=images), ours(images).pred
    torch.testing.assert_close(pred.logits, wanted.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(pred.boxes, wanted.pred_boxes, atol=1e-6, rtol=0)


OPEN: dict[str, Any] = {"out_strides": [8, 16, 32], "freeze_at": -1, "freeze_norm": False, "pretrained": True}


def resnet_vd() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """ResNet-vd 18 of transformers, and its weights in official names."""
    from transformers import RTDetrResNetBackbone, RTDetrResNetConfig

    stages = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    config = RTDetrResNetConfig(embedding_size=64, **stages, out_features=["stage2", "stage3", "stage4"])
    theirs = shaken(RTDetrResNetBackbone(config))
    state = from_huggingface({f"model.backbone.model.{name}": t for name, t in theirs.state_dict().items()})
    return theirs, {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


def hgnetv2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """HGNetV2 L of timm, and its weights in official names."""
    theirs = shaken(timm.create_model("hgnetv2_b4", features_only=True, out_indices=[1, 2, 3]))
    return theirs, {to_official_names(hgnet_name(name)): tensor for name, tensor in theirs.state_dict().items()}


CONVOLUTIONAL = {
    "resnet18_vd": (resnet_vd, lambda: PResNet(depth=18, widths=[64, 128, 256, 512], blocks=None, **OPEN)),
    "hgnetv2_l_ssld": (hgnetv2, lambda: HGNetv2(size="L", **OPEN)),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_backbones_converted_from_paddle(name: str, served: Served, host: Any) -> None:
    peer_of, make = CONVOLUTIONAL[name]
    theirs, state = peer_of()
    served(name, state | {"fc.weight": torch.zeros(2, 2)})
    ours = make().eval()
    assert host.transfers() == 1
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = theirs(images)
        wanted = maps.feature_maps if name == "resnet18_vd" else maps
        for found, expected in zip(ours(images), wanted):
            scale = expected.abs().max()
            torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("hub")
def test_dinov2(served: Served, host: Any, tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2"
    source = shaken(timm.create_model(name, num_classes=0))
    served("dinov2_small", save(source.state_dict()), on_hub=True)
    settings: dict[str, Any] = {"image_size": [56, 56], "width": 384, "num_heads": 6, "patch_size": 14}
    ours = WindowedDinov2(**settings, num_windows=1, out_blocks=[3, 12], pretrained=True).eval()
    assert host.transfers() == 1
    assert ours.initial is not None
    assert ours.initial.word == "dinov2_small"
    overlay = {"file": str(ours.initial.path)}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=56).eval()
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        wanted = theirs.forward_intermediates(images, indices=[2, 11], norm=True, intermediates_only=True)
        for found, expected in zip(ours(images), wanted):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
