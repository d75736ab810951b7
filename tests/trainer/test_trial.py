"""A training that is pruned because other trials of its study are better."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from detr_exp.config.compose import compose
from detr_exp.trainer import study, trial
from detr_exp.trainer.run_status import PrunedError
from detr_exp.training import train_in


def test_it_ends_after_that_evaluation_and_keeps_its_files(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, float]] = []

    def judge() -> trial.PruningCheck:
        return lambda epoch, value: heard.append((epoch, value)) or epoch == 2  # type: ignore[func-returns-value]

    monkeypatch.setattr(trial, "pruning_check", judge)
    with pytest.raises(PrunedError) as given_up:
        train_in(tmp_path, compose([*tiny_run, "trainer.epochs=5", "trainer.max_steps=null"]))
    assert [epoch for epoch, _ in heard] == [1, 2]
    assert given_up.value.best == max(value for _, value in heard)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "pruned"
    for name in ("checkpoint.pth", "checkpoint_best_total.pth"):
        assert (tmp_path / name).is_file()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/mAP" in line for line in lines) == 2
    assert "best/mAP" in lines[-1]


def test_its_ending_travels_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(PrunedError(0.5, 3)))
    assert (copy.best, copy.epoch, str(copy)) == (0.5, 3, "pruned after epoch 3: other trials were better")


def test_a_value_that_is_no_number_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    made = optuna.create_study(study_name=study.STUDY, storage=study.storage(tmp_path, None), direction="maximize")
    made.ask()
    told = {
        "folder": str(tmp_path),
        "study": study.STUDY,
        "is_shared": False,
        "number": 0,
        "pruner": "median",
        "min_epochs": 1,
        "reduction_factor": 3,
    }
    monkeypatch.setenv(trial.TRIAL_VARIABLE, json.dumps(told | {"startup_trials": 0, "max_epochs": 3}))
    is_behind = trial.pruning_check()
    assert is_behind is not None
    assert [is_behind(epoch, value) for epoch, value in ((1, 0.5), (2, float("nan")), (3, float("-inf")))] == [
        False
    ] * 3
    assert made.trials[0].intermediate_values == {1: 0.5}
    made.tell(0, state=optuna.trial.TrialState.FAIL)  # by somebody else
    assert not is_behind(4, 0.1)
