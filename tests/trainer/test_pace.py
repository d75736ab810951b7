"""Loss, speed and time left, as they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from detr_exp.trainer import pace as module
from detr_exp.trainer.pace import Pace


def state(**values: object) -> SimpleNamespace:
    known = dict(step=0, batch=0, moved=0, total_steps=10, log_sums=None, log_count=0, epoch_sums=None, epoch_count=0)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-4}, {"lr": 1e-5}])
    made = SimpleNamespace(**known, term_names=["class", "total", "grad_norm"], optimizer=optimizer)
    made.precision = SimpleNamespace(device=torch.device("cpu"))
    vars(made).update(values)
    made.position = made.step
    return made


@dataclass
class Clock:
    now: float = 100.0
    asked: list[float] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_the_loss_is_the_mean_of_the_epoch_so_far(clock: Clock) -> None:
    of = state()
    pace = Pace(of)
    pace.begin_epoch()
    for step, loss in enumerate([4.0, 2.0, 3.0], 1):
        clock.now += 2
        of.step = of.position = step
        pace.add(torch.tensor([1.0, loss, 9.0]), images=8)
    assert pace.status()[:2] == ["loss 3.000", "14.0 s left"]
    assert pace.means() == {"loss": 3.0, "class": 1.0, "grad_norm": 9.0}
    assert pace.rate == 4
    clock.now += 60  # an evaluation costs time, but no speed
    assert pace.rate == 4
    assert pace.seconds_left == pytest.approx(66 / 3 * 7)


class Slow:
    """A copy that arrives when the test says so."""

    arrived = False

    def __init__(self, value: torch.Tensor) -> None:
        self.host = value.clone()

    def is_here(self) -> bool:
        return Slow.arrived


def test_what_is_not_there_yet_is_not_waited_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Late", Slow)
    of = state()
    pace = Pace(of)
    pace.begin_epoch()
    pace.add(torch.tensor([0.0, 5.0, 0.0]), images=8)
    assert not [text for text in pace.status() if text.startswith("loss")]
    pace.add(torch.tensor([0.0, 1.0, 0.0]), images=8)
    monkeypatch.setattr(Slow, "arrived", True)
    assert pace.status()[0] == "loss 5.000", "of the step at which the copy began"
    assert pace.status()[0] == "loss 3.000"


def test_an_epoch_that_was_begun_before_goes_on(clock: Clock) -> None:
    of = state(batch=2, epoch_sums=torch.tensor([0.0, 6.0, 0.0]), epoch_count=2)
    pace = Pace(of)
    pace.begin_epoch()
    pace.add(torch.tensor([0.0, 3.0, 0.0]), images=8)
    assert pace.means()["loss"] == 3.0
    of.batch = 0
    pace.begin_epoch()
    assert (of.epoch_sums, of.epoch_count) == (None, 0)


def test_the_last_step_has_no_time_left(clock: Clock) -> None:
    assert Pace(state(step=10)).left() == []
