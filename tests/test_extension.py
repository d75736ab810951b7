"""One Python file and one YAML file add a backbone or a loss; nothing of the package is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp import train

PARTS = '''
import torch
from torch import nn
from torch.nn import functional as F

class Pyramid(nn.Module):
    """Three strided convolutions."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 2, 2) for _ in range(3))
        self.out_channels, self.out_strides = [width] * 3, [8, 16, 32]
        self.pixel_mean, self.pixel_std = [0.5] * 3, [0.5] * 3

    def forward(self, images):
        maps, out = self.stem(images), []
        for stage in self.stages:
            maps = stage(maps).relu()
            out.append(maps)
        return out

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        pass


def squared(logits, labels, quality, *, num_classes, power):
    target = F.one_hot(labels, num_classes + 1)[:, :num_classes].float()
    return (logits.sigmoid() - target).abs() ** power
'''
BACKBONE = "_target_: my_parts.Pyramid\nwidth: 16\n"
LOSS = """
defaults:
  - terms: detr
  - _self_
activation: sigmoid
power: 2.0
class_loss:
  _target_: my_parts.squared
  _partial_: true
  power: ${loss.power}
"""


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_parts.py").write_text(PARTS)
    for group, text in (("model/backbone", BACKBONE), ("loss", LOSS)):
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / "mine.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "my_conf"
    sys.modules.pop("my_parts", None)


def test_a_backbone_and_a_loss_of_ones_own(
    command: Callable[..., int], tiny_run: list[str], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config-dir", str(extension), *tiny_run, "model/backbone=mine", "loss=mine", "loss.power=3.0"]
    assert command(train.main, *words) == 2
    assert "allow_targets=[my_parts]" in capfd.readouterr().err
    assert command(train.main, *words, "allow_targets=[my_parts]") == 0
    assert list(Path("outputs").glob("*/*/checkpoint_best_total.pth"))


def test_mistakes_name_ones_own_options_too(
    command: Callable[..., int], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(train.main, "--config-dir", str(extension), "loss=mine", "loss.powr=1") == 2
    assert "did you mean loss.power?" in capfd.readouterr().err
