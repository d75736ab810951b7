"""One Python file and one YAML file add a backbone, a decoder or a loss; nothing of the package is touched."""

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

from detr_exp.model.decoder.rtdetr import RawOutputs
from detr_exp.structures import Prediction

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


class Rows(nn.Module):
    """Every query reads one cell of the coarsest map, and says what it is."""

    def __init__(
        self, *, num_classes, activation, channels, strides, hidden_dim, num_layers, num_queries, denoising, gain
    ) -> None:
        super().__init__()
        self.strides, self.num_queries, self.gain = strides[-1:], num_queries, gain
        self.project = nn.Linear(channels[-1], hidden_dim)
        self.score = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(num_layers))
        self.box = nn.ModuleList(nn.Linear(hidden_dim, 4) for _ in range(num_layers))

    def forward(self, maps, noisy, padding_mask):
        cells = self.gain * self.project(maps[-1].flatten(2).transpose(1, 2))[:, : self.num_queries]
        count = len(self.score) if self.training else 1
        logits = torch.stack([head(cells) for head in self.score[-count:]])
        boxes = torch.stack([head(cells).sigmoid() for head in self.box[-count:]])
        return RawOutputs(Prediction(logits, boxes), Prediction(logits[0], boxes[0]))

    def class_tensors(self):
        return {name: 0 for name, _ in self.named_parameters() if name.startswith("score.")}

    def drop_training_parts(self):
        pass


def squared(logits, labels, quality, *, num_classes, power):
    target = F.one_hot(labels, num_classes + 1)[:, :num_classes].float()
    return (logits.sigmoid() - target).abs() ** power
'''
BACKBONE = "_target_: my_parts.Pyramid\nwidth: 16\n"
DECODER = """
# @package model
gain: 1.0
decoder:
  _target_: my_parts.Rows
  _partial_: true
  gain: ${model.gain}
""".lstrip()
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
    for group, text in (("model/backbone", BACKBONE), ("model/decoder", DECODER), ("loss", LOSS)):
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


def test_a_decoder_of_ones_own(
    command: Callable[..., int], tiny_run: list[str], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = [word for word in tiny_run if not word.startswith(("model.num_heads", "model.dim_feedforward"))]
    words = ["--config-dir", str(extension), *plain, "model/decoder=mine", "model.num_queries=3"]
    words += ["model.num_layers=2", "model.num_denoising=0", "model.gain=0.5", "allow_targets=[my_parts]"]
    assert command(train.main, *words) == 0
    assert list(Path("outputs").glob("*/*/checkpoint_best_total.pth"))
    assert command(train.main, *words, "model.look_forward_twice=false") == 2
    assert "look_forward_twice" in capfd.readouterr().err, "what only another decoder reads is no key of this one"


def test_a_decoder_that_does_not_take_what_it_is_told(
    command: Callable[..., int], tiny_run: list[str], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (extension / "model/decoder/mine.yaml").write_text("_target_: my_parts.Rows\n_partial_: true\nwidth: 3\n")
    plain = [word for word in tiny_run if not word.startswith(("model.num_heads", "model.dim_feedforward"))]
    words = ["--config-dir", str(extension), *plain, "model/decoder=mine", "allow_targets=[my_parts]"]
    assert command(train.main, *words) == 2
    said = capfd.readouterr().err
    assert "model.decoder" in said
    assert "width" in said


def test_mistakes_name_ones_own_options_too(
    command: Callable[..., int], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(train.main, "--config-dir", str(extension), "loss=mine", "loss.powr=1") == 2
    assert "did you mean loss.power?" in capfd.readouterr().err
