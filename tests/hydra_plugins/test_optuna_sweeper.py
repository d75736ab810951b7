"""Searches: a total of trials whatever happens, reasons for failures, and trials that are given up."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp.config.mistakes import ConfigError
from detr_exp.trainer.run_status import PrunedError
from detr_exp.trainer.study import STUDY, repair_journal, storage
from detr_exp.trainer.trial import TRIAL_VARIABLE, pruning_check

optuna = pytest.importorskip("optuna")
Sweep = Callable[..., Any]
SEARCH = ["hydra/sweeper=optuna", "optim.lr=tag(log,interval(1e-4,1e-2))", "loss=focal,vfl"]
EPOCHS = 9


def study() -> Any:
    return optuna.load_study(study_name=STUDY, storage=storage(Path("s"), None))


def states() -> list[str]:
    return [trial.state.name for trial in study().trials]


def goodness(cfg: DictConfig) -> float:
    return 1 - abs(cfg.optim.lr - 1e-3)


@pytest.mark.slow
def test_the_total_is_reached_over_several_starts_and_no_draw_is_repeated(sweep: Sweep) -> None:
    requested: list[tuple[int, float]] = []

    def killed_once(cfg: DictConfig) -> float:
        requested.append((HydraConfig.get().job.num, cfg.optim.lr))
        if len(requested) == 3:
            sys.exit(143)
        return goodness(cfg)

    overrides = [*SEARCH, "hydra.sweeper.n_trials=5", "hydra.sweeper.startup_trials=2"]
    assert sweep(killed_once, *overrides).status == 143
    assert states() == ["COMPLETE", "COMPLETE", "RUNNING"]
    done = sweep(killed_once, *overrides)
    assert done.status == 0
    assert requested[2] == requested[3], "the trial that was stopped is gone on with"
    assert [number for number, _ in requested] == [0, 1, 2, 2, 3, 4]
    assert len({lr for _, lr in requested}) == 5
    assert states() == ["COMPLETE"] * 5
    best = max(study().trials, key=lambda trial: trial.value)
    assert f"best: optim.lr={best.params['optim.lr']:.6g} loss={best.params['loss']}" in done.out
    assert len(sweep(killed_once, *overrides).lines) == 6, "nothing is left to do"

    other = sweep(killed_once, *overrides, "matcher.cost_class=1,2")
    assert other.status == 2
    assert "another study" in other.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=interval(1,0)", "is no range"),
        ("optim.lr=interval(1,1)", "is no range"),
        ("optim.lr=tag(log,interval(0,1))", "above 0"),
        ("optim.lr=tag(lgo,interval(1e-4,1e-3))", "has the tag lgo"),
        ("optim.lr=tag(log,choice(1e-4,1e-3))", "has the tag log"),
        ("optim.lr=range(1,1)", "gives no value"),
        ("seed=0,1,2", "would find the luckiest one"),
        ("loss=choice(focal,'focal')", "more than once"),
        ("trainer.eval_interval=interval(1,3)", "must be a whole number"),
    ],
)
def test_what_cannot_be_searched_is_refused(sweep: Sweep, override: str, message: str) -> None:
    done = sweep(goodness, "hydra/sweeper=optuna", override)
    assert (done.status, done.lines) == (2, [])
    assert message in done.err


@pytest.mark.slow
def test_another_folder_joins_a_study_in_a_storage(sweep: Sweep, tmp_path: Path) -> None:
    words = [*SEARCH, f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", "hydra.sweeper.study=one"]
    assert sweep(goodness, *words, "hydra.sweeper.n_trials=2").status == 0
    requested: list[int] = []

    def joined(cfg: DictConfig) -> float:
        requested.append(HydraConfig.get().job.num)
        return goodness(cfg)

    done = sweep(joined, *words, "hydra.sweeper.n_trials=4", "hydra.sweep.dir=t")
    assert done.status == 0, done.err
    assert requested == [2, 3]
    assert "4 runs, best first" in done.out
    assert done.out.count(str(tmp_path / "s")) == 2, "where the others were trained"
    refused = sweep(joined, *words, "optim.weight_decay=0.5", "hydra.sweep.dir=u")
    assert refused.status == 2
    assert "holds another study: fixed was" in refused.err
    refused = sweep(goodness, *SEARCH)
    assert refused.status == 2
    assert "was searched with hydra.sweeper.storage=sqlite" in refused.err


@pytest.mark.slow
def test_trials_of_a_folder_that_is_gone_are_replaced_on_request(sweep: Sweep, tmp_path: Path) -> None:
    words = [*SEARCH, f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", "hydra.sweeper.study=one"]
    words.append("hydra.sweeper.n_trials=2")

    def killed(cfg: DictConfig) -> float:
        sys.exit(143)

    assert sweep(killed, *words).status == 143
    done = sweep(goodness, *words, "hydra.sweep.dir=t")
    assert done.status == 0, done.err
    assert "running" in done.out, "it may be alive"
    done = sweep(goodness, *words, "hydra.sweep.dir=t", "sweep_retry=failed")
    assert done.status == 0, done.err
    made = optuna.load_study(study_name="one", storage=storage(Path("t"), f"sqlite:///{tmp_path}/study.db"))
    assert [trial.state.name for trial in made.trials] == ["RUNNING", "COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_failures_are_failed_trials_with_their_reason(sweep: Sweep) -> None:
    def broken(cfg: DictConfig) -> float | None:
        number = HydraConfig.get().job.num
        if number == 0:
            raise MemoryError("no room")
        return {1: float("nan"), 2: None}.get(number, goodness(cfg))

    overrides = [*SEARCH, "hydra.sweeper.n_trials=4"]
    done = sweep(broken, *overrides)
    assert done.status == 1
    assert states() == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    reasons = [trial.user_attrs["reason"] for trial in study().trials[:3]]
    assert reasons[0] == "oom: MemoryError: no room"
    assert reasons[1] == "nan: its result is nan"
    assert "it has no monitor" in reasons[2]
    sweep(goodness, *overrides, "sweep_retry=failed")
    assert states() == ["FAIL"] * 3 + ["COMPLETE"] * 4, "replaced, under new numbers"


def test_trials_that_fall_behind_are_given_up(sweep: Sweep) -> None:
    epochs: dict[int, int] = {}

    def climbing(cfg: DictConfig) -> float:
        is_behind = pruning_check()
        assert is_behind is not None
        for epoch in range(1, EPOCHS + 1):
            epochs[HydraConfig.get().job.num] = epoch
            value = goodness(cfg) * epoch / EPOCHS
            if is_behind(epoch, value):
                raise PrunedError(value, epoch)
        return value

    done = sweep(climbing, *SEARCH, "hydra.sweeper.n_trials=8", f"trainer.epochs={EPOCHS}")
    assert done.status == 0, "giving up is no failure"
    assert TRIAL_VARIABLE not in os.environ
    pruned = [trial.number for trial in study().trials if trial.state.name == "PRUNED"]
    assert pruned
    assert [line["number"] for line in done.lines if line["status"] == "pruned"] == pruned
    assert all(epochs[number] < EPOCHS for number in pruned)
    assert all(epochs[number] == EPOCHS for number in epochs if number not in pruned)


@pytest.mark.parametrize("pruner", ["halving", "median", "hyperband"])
def test_every_pruner_gives_up_the_last_of_many(pruner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = optuna.create_study(study_name=STUDY, storage=storage(tmp_path, None), direction="maximize")
    message = {
        "folder": str(tmp_path),
        "study": STUDY,
        "is_shared": False,
        "pruner": pruner,
        "min_epochs": 1,
        "reduction_factor": 3,
    }
    message |= {"startup_trials": 2, "max_epochs": EPOCHS}
    ended = {}
    for number, height in enumerate((9.0, 8.0, 7.0, 6.0, 5.0, 1.0)):
        made.ask()
        monkeypatch.setenv(TRIAL_VARIABLE, json.dumps({**message, "number": number}))
        is_behind = pruning_check()
        assert is_behind is not None
        ended[number] = next((epoch for epoch in range(1, EPOCHS + 1) if is_behind(epoch, height * epoch)), EPOCHS + 1)
        made.tell(number, state=optuna.trial.TrialState.PRUNED) if ended[number] <= EPOCHS else made.tell(
            number, height
        )
    assert ended[0] == EPOCHS + 1
    assert ended[5] <= EPOCHS


def test_a_run_of_its_own_knows_of_no_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    assert pruning_check() is None


def test_several_objectives_give_a_front(sweep: Sweep) -> None:
    def two_sided(cfg: DictConfig) -> float:
        assert pruning_check() is None, "no trial is given up"
        folder = Path(HydraConfig.get().runtime.output_dir)
        size = {1: 10.0, 2: 30.0, 3: 20.0}[cfg.model.num_layers]
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "time/val_network_ms": size}) + "\n")
        return 0.1 * cfg.model.num_layers

    done = sweep(two_sided, "sweep=accuracy_speed", "hydra/launcher=basic", "hydra.sweeper.n_trials=6")
    assert done.status == 0, done.err
    front = {trial.params["model.num_layers"] for trial in study().best_trials}
    assert "2" not in front, "three layers are better and quicker here"
    assert "not beaten in everything" in done.out
    assert "time/val_network_ms" in done.out.split("best first")[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.sweeper.storage=5"], "hydra.sweeper.storage is 5; use a text, or null"),
        (["hydra.sweeper.storage=postgres://me:hunter2@h/x"], "storage=postgres://***@h/x cannot be used"),
        (["hydra.sweeper.pruner=asha"], "halving, median, hyperband, null"),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials is 0; it must be a whole number >= 1"),
        (["optim.weight_decay=interval(-0.1,0)"], "optim.weight_decay is -0.1; it must be"),
        (["trainer.ema_decay=interval(0.5,1.5)"], "trainer.ema_decay is 1.5; it must be"),
        (["loss=ce", "loss.focal_gamma=interval(1,2)"], "loss=ce has no key focal_gamma"),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_it_starts(
    sweep: Sweep, overrides: list[str], message: str
) -> None:
    refused = sweep(goodness, *SEARCH, *overrides)
    assert refused.status == 2
    assert message in refused.err
    assert not refused.lines


def test_a_point_at_which_a_training_diverged_is_not_tried_again(sweep: Sweep) -> None:
    def diverging(cfg: DictConfig) -> float:
        return math.nan if cfg.matcher.cost_class != 2 else 1.0

    overrides = ["hydra/sweeper=optuna", "matcher.cost_class=1,2,3,4"]
    done = sweep(diverging, *overrides, "hydra.sweeper.n_trials=12")
    tried = [trial.params["matcher.cost_class"] for trial in study().trials if trial.state.name == "FAIL"]
    assert len(tried) == len(set(tried)) <= 3
    assert states().count("COMPLETE") == 12 - len(tried)
    assert done.status == 1

    done = sweep(diverging, "hydra/sweeper=optuna", "matcher.cost_class=5,6", "hydra.sweep.dir=t")
    assert "no point that has not diverged" in done.out


def test_a_journal_loses_its_torn_line_and_is_refused_with_another(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    repair_journal(journal)
    assert journal.read_bytes() == b'{"a": 1}\n{"a": 2}\n'
    journal.write_bytes(damaged := b'{"a": 1}\n\0\0\0\n{"a": 2}\n')
    with pytest.raises(ConfigError, match=r"journal is damaged at line 2 of 3 .*hydra\.sweep\.dir="):
        repair_journal(journal)
    assert journal.read_bytes() == damaged
