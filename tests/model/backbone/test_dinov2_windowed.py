import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from detr_exp.model.backbone.dinov2_windowed import WindowedDinov2, from_timm
from detr_exp.model.layer.vit_block import fold_scales


def small_vit(**changes):
    settings = dict(image_size=[64, 64], width=32, num_heads=2, patch_size=8, num_windows=2, out_blocks=[1, 3, 5])
    return WindowedDinov2(**settings | changes)


def images(height=64, width=64, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_without_windows_it_is_timms_dinov2():
    source = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=64, patch_size=8, depth=5
    )
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.2, 0.8)
    backbone = small_vit(width=384, num_heads=6, num_windows=1)
    backbone.load_state_dict(from_timm(source.state_dict(), backbone))
    expected = source.forward_intermediates(images(), indices=[0, 2, 4], norm=True, intermediates_only=True)
    for ours, theirs in zip(backbone.eval()(images()), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_windows_meet_only_in_global_blocks():
    """Block i is global if a map of number i exists, and map k is the state before block k."""
    backbone = small_vit(out_blocks=[2, 3, 5]).eval()
    plain = images()
    changed = plain.clone()
    changed[..., :32, :32] += 1  # the first of four windows
    differences = [(a - b).abs().amax(dim=(0, 1)) for a, b in zip(backbone(plain), backbone(changed))]
    before, after, later = differences
    assert before[:4, :4].min() > 0
    assert before[4:].max() == 0
    assert before[:4, 4:].max() == 0
    assert after.min() > 0
    assert later.min() > 0


@torch.no_grad()
def test_a_window_sees_its_own_patches_and_a_class_token():
    """Without global blocks every window is an image of its own at its place in the position embedding."""
    windowed = small_vit(out_blocks=[4]).eval()
    alone = small_vit(image_size=[32, 32], num_windows=1, out_blocks=[4]).eval()
    state = dict(windowed.state_dict())
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cut = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        alone.load_state_dict(state | {"embedding.position": state["embedding.position"][cut]})
        cut_pixels = (..., slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32))
        torch.testing.assert_close(windowed(images())[0][cut], alone(images()[cut_pixels])[0], atol=1e-5, rtol=1e-5)


def test_weights_of_another_image_size_are_resampled_once():
    stored = small_vit(image_size=[64, 96])
    other = small_vit(image_size=[96, 64])
    other.load_state_dict(stored.state_dict())
    assert other.embedding.grid == (12, 8)
    torch.testing.assert_close(stored.eval()(images(96, 64)), other.eval()(images(96, 64)))


def test_maps_have_the_promised_channels_and_strides():
    backbone = small_vit(position_grid=5)
    assert backbone.embedding.grid == (5, 5)
    maps = backbone(images(48, 80))
    assert [m.shape for m in maps] == [(2, 32, 6, 10)] * 3
    assert backbone.out_channels == [32] * 3
    assert backbone.out_strides == [8] * 3


def test_every_weight_is_used():
    backbone = small_vit()
    assert len(backbone.blocks) == 5
    sum(m.square().sum() for m in backbone(images())).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        backbone = small_vit(drop_path=0.5)
        backbone.set_gradient_checkpointing(enabled)
        torch.manual_seed(1)
        backbone(images())[-1].square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_drop_path_grows_over_twelve_blocks_and_keeps_the_mean():
    backbone = small_vit(drop_path=0.44, out_blocks=[3, 6, 9, 11])
    assert [block.drop_path for block in backbone.blocks] == pytest.approx([0.04 * i for i in range(11)])
    block = backbone.blocks[10].train()
    torch.manual_seed(0)
    dropped = block._dropped(torch.ones(4000, 2, 3))
    assert {round(v, 5) for v in dropped.unique().tolist()} == {0, round(1 / 0.6, 5)}
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    assert (dropped == dropped[:, :1, :1]).all()
    assert (block.eval()._dropped(torch.ones(4, 2, 3)) == 1).all()


@torch.no_grad()
def test_folded_scales_change_no_map():
    backbone = small_vit().double().eval()
    for name, parameter in backbone.named_parameters():
        if "scale" in name:
            nn.init.normal_(parameter)
    right = backbone(images().double())
    for _ in range(2):  # folding again changes nothing
        fold_scales(backbone)
        for found, expected in zip(backbone(images().double()), right, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not any("scale" in name for name in backbone.state_dict())


def test_freezing_stops_the_gradient():
    assert not any(p.requires_grad for p in small_vit(freeze=True).parameters())


def test_it_says_where_its_weights_come_from(caplog, monkeypatch, tmp_path):
    published = tmp_path / "dinov2_small" / "model.safetensors"
    published.parent.mkdir()
    save_file(timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict(), published)
    monkeypatch.setenv("DETR_EXP_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = dict(image_size=[64, 96], width=384, num_heads=6)
    with caplog.at_level(logging.INFO, "detr_exp.model"):
        found = small_vit(**settings, pretrained=True)
    assert f"DINOv2 weights (vit_small_patch14_dinov2.lvd142m from {published}" in caplog.text
    named = small_vit(**settings, pretrained=str(published))
    for name, tensor in named.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    torch.save({"head": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds no weights of vit_small.*pretrained=false"):
        small_vit(**settings, pretrained=str(tmp_path / "other.pth"))


def test_errors_name_the_override():
    with pytest.raises(
        ValueError, match=r"multiples of 16 .*model\.image_size=\[64,80\] and model\.image_size=\[80,80\]"
    ):
        small_vit(image_size=[72, 80])
    with pytest.raises(ValueError, match="multiples of 16"):
        small_vit()(images(72, 64))
    with pytest.raises(ValueError, match="out_blocks=\\[3,6,9,12\\]"):
        small_vit(out_blocks=[3, 13])
    with pytest.raises(ValueError, match="drop_path"):
        small_vit(drop_path=1.0)
    with pytest.raises(ValueError, match="pretrained=false"):
        small_vit(pretrained=True)
