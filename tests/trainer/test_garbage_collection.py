"""When garbage is collected: not while the first training of a process starts, always during a training."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from detr_exp.config.compose import compose
from detr_exp.trainer.garbage_collection import off_until_training, on_for_training
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

SPIED = """
import gc, sys
from detr_exp import train
seen = []

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "detr_exp.trainer.trainer"):
            seen.append((name, gc.isenabled()))

sys.meta_path.insert(0, Spy())
status = 0
try:
    train.main()
except SystemExit as end:
    status = end.code
print("seen", dict(seen), status, gc.isenabled(), gc.get_freeze_count())
"""


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not loaded torch."""
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        yield
    gc.enable()


def test_off_until_a_training_begins(first: None) -> None:
    with off_until_training():
        assert not gc.isenabled()
        with on_for_training():
            assert gc.isenabled()
            assert gc.get_freeze_count()
        assert gc.isenabled()
        assert not gc.get_freeze_count()
    assert gc.isenabled()


def test_on_after_an_error(first: None) -> None:
    with pytest.raises(KeyError), off_until_training():
        raise KeyError
    assert gc.isenabled()
    with pytest.raises(KeyError), off_until_training(), on_for_training():
        raise KeyError
    assert gc.isenabled()
    assert not gc.get_freeze_count()


def test_somebody_elses_choice_is_left_alone(first: None) -> None:
    gc.disable()
    with off_until_training():
        pass
    assert not gc.isenabled()


def test_a_later_run_of_a_sweep_starts_as_usual() -> None:
    with off_until_training():
        assert gc.isenabled()


def test_on_while_the_trainer_trains(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    step = Trainer.train_step

    def spied(self: Trainer, *given: Any) -> Any:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return step(self, *given)

    monkeypatch.setattr(Trainer, "train_step", spied)
    train_in(tmp_path, compose(tiny_run))
    assert seen
    assert set(seen) == {(True, True)}
    assert not gc.get_freeze_count()


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.epochs=1"],
        pytest.param(["data=coco", "data.root=/absent"], marks=pytest.mark.slow),
        pytest.param(["--multirun", "seed=1,2"], marks=pytest.mark.slow),
    ],
)
def test_a_command_imports_without_it_and_ends_with_it(tiny_run: list[str], tmp_path: Path, words: list[str]) -> None:
    given = tiny_run if "data=coco" not in words else ["tracker=none"]
    done = subprocess.run(
        [sys.executable, "-c", SPIED, *words, *given], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    last = done.stdout.splitlines()[-1]
    assert "'torch': False" in last
    assert "'detr_exp.trainer.trainer': False" in last
    assert f" {2 if 'data=coco' in words else 0} True " in last
    assert "leaked" not in done.stderr
