"""A pyramid beside a small transformer (its numbers are compared in tests/model/test_deimv2_parity.py)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from detr_exp.model.backbone.rope_vit import RopeViT, rotated, rotations
from detr_exp.model.backbone.spatial_adapter import SpatialAdapter
from detr_exp.model.backbone.timm_vit import TimmViT

SMALL = {"width": 16, "num_heads": 2, "depth": 3}


def adapter() -> SpatialAdapter:
    torch.manual_seed(0)
    body = partial(RopeViT, **SMALL, taps=[0, 1, 2])
    return SpatialAdapter(body=body, details=4, channels=8, pretrained=False)


def test_maps_have_strides_8_16_and_32_and_every_parameter_trains() -> None:
    backbone = adapter()
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(level.shape) for level in maps] == [(2, 8, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]
    sum(level.square().sum() for level in maps).backward()
    assert [name for name, tensor in backbone.named_parameters() if tensor.grad is None] == []


def test_activations_may_be_computed_again() -> None:
    plain, again, images = adapter(), adapter(), torch.rand(2, 3, 32, 32)
    again.set_gradient_checkpointing(True)
    for backbone in (plain, again):
        sum(level.square().sum() for level in backbone(images)).backward()
    for (name, one), other in zip(plain.named_parameters(), again.parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_attention_depends_on_distances_only() -> None:
    """A product of turned vectors is the same for cells that are as far apart."""
    sin, cos = rotations(1, 4, 8, torch.zeros((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    query, key = (F.pad(torch.randn(1, 1, 1, 8, generator=generator).expand(-1, -1, 4, -1), (0, 0, 1, 0)) for _ in "qk")
    turned = [rotated(part.double(), sin, cos)[0, 0, 1:] for part in (query, key)]
    products = turned[0] @ turned[1].T
    for step in range(-3, 4):
        line = products.diagonal(step)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert not torch.allclose(products[0, 1], products[0, 2])


def test_mistakes_name_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"taps is \[2, 5\]; name blocks of 0 to 2"):
        RopeViT(**SMALL, taps=[2, 5], pretrained=False)
    with pytest.raises(ValueError, match=r"18 channels and 2 heads"):
        RopeViT(width=18, num_heads=2, depth=1, taps=[0], pretrained=False)
    with pytest.raises(ValueError, match=r"has no network 'dinov9'.*vit_small_patch16_dinov3_qkvb"):
        TimmViT(name="dinov9", taps=[0], pretrained=False)
