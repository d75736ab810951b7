"""An adapter of one's own trains, goes on, is opened and deployed as ours is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from detr_exp import train
from detr_exp.inference.detector import load
from detr_exp.trainer import checkpoint as files

PARTS = '''
from torch import nn
from torch.nn.utils import parametrize

class Factor(nn.Module):
    """A factor for every output channel of a convolution."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.factor = nn.Parameter(weight.new_ones(len(weight), 1, 1, 1))

    def forward(self, weight):
        return weight * self.factor

class Factors:
    def __init__(self, *, where: str) -> None:
        self.where = where

    def adapt(self, network, anew) -> None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in anew)
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Conv2d) and self.where in name:
                parametrize.register_parametrization(module, "weight", Factor(module.weight))

class Nothing:
    pass
'''


@pytest.fixture
def overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: list[str], trained: Path
) -> Iterator[list[str]]:
    (tmp_path / "my_adapters.py").write_text(PARTS)
    folder = tmp_path / "my_conf" / "model" / "adapter"
    folder.mkdir(parents=True)
    (folder / "factors.yaml").write_text("_target_: my_adapters.Factors\nwhere: encoder\n")
    (folder / "nothing.yaml").write_text("_target_: my_adapters.Nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    further = [f"model.weights={trained / files.BEST_TOTAL}", "hydra.run.dir=run", "allow_targets=[my_adapters]"]
    yield ["--config-dir", str(tmp_path / "my_conf"), *tiny_run, *further, "trainer.num_pictures=0", "optim.lr=0.01"]
    sys.modules.pop("my_adapters", None)


def test_it_is_trained_goes_on_and_is_merged(
    command: Callable[..., int], overrides: list[str], trained: Path, tmp_path: Path
) -> None:
    assert command(train.main, *overrides, "model/adapter=factors", "model.adapter.where=pan") == 0
    assert (
        command(train.main, *overrides, "model/adapter=factors", "model.adapter.where=pan", "trainer.resume=auto") == 0
    )
    own, theirs = (files.load(run / files.BEST_TOTAL)["model"] for run in (tmp_path / "run", trained))
    factors = {name: tensor for name, tensor in own.items() if name.endswith(".factor")}
    assert factors
    assert any((tensor != 1).any() for tensor in factors.values())
    network = load(tmp_path / "run", allow_targets=["my_adapters"]).network
    for name, factor in factors.items():
        weight = name.replace("parametrizations.weight.0.factor", "weight")
        assert torch.equal(network.state_dict()[weight], theirs[weight] * factor)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = network(images).pred.logits
        torch.testing.assert_close(network.deploy()(images).pred.logits, before, rtol=0, atol=1e-4)


def test_what_cannot_adapt_is_refused(
    command: Callable[..., int], overrides: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(train.main, *overrides, "model/adapter=nothing") == 2
    assert "model.adapter: my_adapters.Nothing has no adapt" in capfd.readouterr().err
