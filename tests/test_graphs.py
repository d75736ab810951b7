"""What comes before and after the matching is one graph each, for all batches of a size.

Both are traced by `torch.compile` with `fullgraph=True` and no code generation: what has a break, depends on a value of
the host, or needs another graph for another number of objects, is found.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.structures import Targets
from detr_exp.trainer.batch_size import loss_of
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in
from tests.test_waits import LABELS, LOSSES, SMALL, TINY, fits

COUNTS = [(3, 2), (5, 4), (2, 7), (6, 0), (1, 1), (0, 9), (8, 8), (4, 1), (7, 3), (2, 2)]
MOST = [pytest.param(model, marks=[pytest.mark.slow] * (model != "rtdetrv2_tiny")) for model in TINY]


class Graphs:
    """A backend of `torch.compile` that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        self.count += 1
        return graph.forward


def parts_of(*words: str) -> tuple[nn.Module, nn.Module]:
    """A small network in training and its criterion."""
    cfg = compose(["data=shapes", "trainer/hardware=cpu", *words, "model.image_size=[96,96]"])
    for part in (cfg.model, cfg.model.neck):
        part.update({key: value for key, value in (SMALL | {"num_denoising": 10}).items() if part.get(key)})
    torch.manual_seed(0)
    return build.network(cfg, LABELS).train(), build.criterion(cfg, LABELS)


def batch_of(network: nn.Module, counts: tuple[int, ...]) -> tuple[torch.Tensor, Targets]:
    g, total, (height, width) = torch.Generator().manual_seed(sum(counts)), sum(counts), network.image_size
    targets = Targets(
        labels=torch.randint(0, 2, (total,), generator=g),
        boxes=torch.rand(total, 4, generator=g) * 0.3 + 0.2,
        counts=counts,
        masks=torch.rand(total, height, width, generator=g) > 0.5 if "masks" in network.tasks else None,
        keypoints=torch.rand(total, 2, 3, generator=g) if "keypoints" in network.tasks else None,
    )
    return torch.rand(len(counts), 3, height, width, generator=g), targets


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
def test_a_network_is_one_graph_for_all_batches_of_a_size(model: str) -> None:
    network, _ = parts_of(f"model={model}")
    plain, graphs = deepcopy(network), Graphs()
    network.compile(backend=graphs, fullgraph=True)
    if hasattr(plain, "fixed_denoising_size"):
        plain.fixed_denoising_size = True
    for counts in COUNTS:
        images, targets = batch_of(network, counts)
        torch.manual_seed(1)
        found = network(images, targets).pred
        torch.manual_seed(1)
        expected = plain(images, targets).pred
        torch.testing.assert_close((found.logits, found.boxes), (expected.logits, expected.boxes))
    assert graphs.count == 1


def assert_one_graph(*words: str) -> None:
    """The losses of ten batches are those without compilation, by one graph."""
    network, plain = parts_of(*words)
    criterion, graphs = deepcopy(plain), Graphs()
    criterion.compile(backend=graphs)
    for counts in COUNTS:
        images, targets = batch_of(network, counts)
        outputs = network(images, targets)
        torch.manual_seed(1)
        found = criterion(outputs, targets, num_boxes=len(targets), num_images=2)
        torch.manual_seed(1)
        expected = plain(outputs, targets, num_boxes=len(targets), num_images=2)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(list(found.values()), [expected[name] for name in found])
    assert graphs.count == 1


@pytest.mark.parametrize("model", MOST)
def test_losses_after_matching_are_one_graph_for_all_batches(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_exp.matcher.hungarian.HungarianMatcher.compile", lambda self: None)
    assert_one_graph(f"model={model}")


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_one_graph(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = next(one for one in ("rtdetrv2_tiny", *TINY) if fits(one, loss))
    monkeypatch.setattr("detr_exp.matcher.hungarian.HungarianMatcher.compile", lambda self: None)
    assert_one_graph(f"model={model}", f"loss={loss}")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "loss"), [("rtdetrv2_tiny", "vfl"), ("dfine_tiny", "dfine")])
def test_gradients_pass_compiled_losses(model: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_exp.matcher.hungarian.HungarianMatcher.compile", lambda self: None)
    network, plain = parts_of(f"model={model}", f"loss={loss}")
    criterion = deepcopy(plain)
    criterion.compile(backend=Graphs())
    images, targets = batch_of(network, COUNTS[0])
    gradients = []
    for one in (plain, criterion):
        torch.manual_seed(1)
        network.zero_grad()
        one(network(images, targets), targets, num_boxes=5)["total"].backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_trial_of_memory_compiles_nothing(tmp_path: Path, tiny_run: list[str]) -> None:
    cfg, graphs = compose(tiny_run), Graphs()
    run, settings = build.run(cfg, tmp_path), build.trainer(cfg).settings
    run.network.compile(backend=graphs)
    assert loss_of(settings, run, run.network, 1).isfinite()
    assert graphs.count == 0


@pytest.mark.slow
def test_a_training_compiles_network_and_losses(tmp_path: Path, tiny_run: list[str], monkeypatch) -> None:
    compiled, graphs, seen = torch.compile, Graphs(), []

    def traced(function: Callable, **settings: object) -> Callable:
        seen.append(function.__name__)
        return compiled(function, backend=graphs, **settings) if function.__name__ == "losses" else function

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr("detr_exp.matcher.hungarian.HungarianMatcher.compile", lambda self: None)
    words = [*tiny_run, "trainer.monitor=val/loss"]
    plain = train_in(tmp_path / "plain", compose(words))
    found = train_in(tmp_path / "compiled", compose([*words, "trainer.hardware.compile=true"]))
    assert found == pytest.approx(plain, rel=1e-4)
    assert set(seen) == {"body", "losses"}
    assert graphs.count


@pytest.mark.slow
def test_tensors_do_not_become_more_with_the_epochs(tmp_path: Path, tiny_run: list[str], monkeypatch) -> None:
    counted, epoch = [], Trainer.train_one_epoch

    def count(self: Trainer, *arguments: object) -> None:
        epoch(self, *arguments)
        gc.collect()
        counted.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))

    monkeypatch.setattr(Trainer, "train_one_epoch", count)
    train_in(tmp_path, compose([*tiny_run, "trainer.max_steps=null", "trainer.epochs=5", "trainer.log_every_steps=1"]))
    assert counted[-1] <= counted[1]
