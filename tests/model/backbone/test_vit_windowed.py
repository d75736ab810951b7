"""A windowed transformer (its numbers are compared with transformers' in tests/model/test_lwdetr_parity.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detr_exp.model.backbone.vit_windowed import WindowedViT


def small(**changes: Any) -> WindowedViT:
    settings: dict[str, Any] = {"width": 24, "num_heads": 2, "depth": 3, "windowed": [0, 2], "taps": [0, 1, 2]}
    settings |= {"num_windows": 2, "drop_path": 0.0, "freeze": False, "pretrained": False}
    return WindowedViT(**settings | changes)


def images(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_windows_meet_only_in_blocks_without_them() -> None:
    backbone, plain = small().eval(), images(64, 64)
    changed = plain.clone()
    changed[..., :32, :32] += 1  # the first of four windows
    within, across, after = ((a - b).abs().amax((0, 1)) for a, b in zip(backbone(plain), backbone(changed)))
    assert within[:2, :2].min() > 0
    assert within[2:].max() == within[:2, 2:].max() == 0
    assert min(across.min(), after.min()) > 0


@torch.no_grad()
def test_positions_of_one_size_are_resampled_once() -> None:
    backbone = small().eval()
    before = backbone(images())
    assert [tuple(one.shape) for one in before] == [(2, 24, 4, 6)] * 3
    backbone.fit_positions((64, 96))
    assert backbone.position.shape == (1, 1 + 4 * 6, 24)
    torch.testing.assert_close(backbone(images()), before)


def test_published_weights_of_a_deeper_transformer_are_cut(tmp_path: Path) -> None:
    """Files of the authors hold all blocks of the first training, under their names, and parts of that training."""
    source = small(depth=5, windowed=[0])
    names = {"patches": "patch_embed.proj", "position": "pos_embed"}
    parts = {"out": "attn.proj", "scale1": "gamma_1", "scale2": "gamma_2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    parts |= {name: f"attn.{name}" for name in ("qkv", "q_bias", "v_bias")}
    stored = {"encoder.cls_token": torch.zeros(1, 1, 24)}
    for name, tensor in source.state_dict().items():
        words = name.split(".")
        words[0] = names.get(words[0], words[0])
        stored["encoder." + ".".join(parts.get(word, word) for word in words)] = tensor
    torch.save({"model": stored}, tmp_path / "caev2.pth")
    found = small(pretrained=str(tmp_path / "caev2.pth"))
    assert found.initial is not None
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_it_can_be_frozen() -> None:
    assert not any(parameter.requires_grad for parameter in small(freeze=True).parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": [0, 3]}, r"model\.backbone\.taps is \[0, 3\]; name blocks of 0 to 2"),
        ({"taps": []}, r"model\.backbone\.taps is \[\]"),
        ({"windowed": [1, 0]}, r"model\.backbone\.windowed is \[1, 0\].*ascending"),
        ({"num_heads": 5}, r"model\.backbone\.width is 24, which 5 heads cannot share"),
    ],
)
def test_errors_name_the_override(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_images_that_windows_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 32 .*model\.image_size=\[64,96\]"):
        small()(images(80, 96))
