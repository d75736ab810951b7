"""Trials of a study that several processes search: each has one owner, and there are as many as asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detr_exp.config.mistakes import ConfigError
from detr_exp.trainer import study as storages
from hydra_plugins.detr_exp._study import LINK, SharedStudy

optuna = pytest.importorskip("optuna")


class Folder:
    """A sweep folder; `busy` are the places at which other processes are."""

    def __init__(self, folder: Path, busy: set[int]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.busy = folder, busy

    def others(self, place: int) -> set[int]:
        return self.busy - {place}


def opened(folder: Path, place: int = 0, busy: tuple[int, ...] = (), **settings: Any) -> SharedStudy:
    given = {"address": f"sqlite:///{folder.parent}/study.db", "name": "one", "asked": {"ranges": "r"}, **settings}
    return SharedStudy(Folder(folder, set(busy)), place, directions=["maximize"], **given)


def claim(study: SharedStudy, most: int, started: set[int]) -> int | None:
    trial = study.claimed(most, (), started)
    started.add(-1 if trial is None else trial.number)
    return None if trial is None else trial.number


def states(study: SharedStudy) -> list[str]:
    return [trial.state.name for trial in study.trials()]


def test_two_folders_share_the_trials(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    mine: set[int] = set()
    theirs: set[int] = set()
    found = [claim(*turn) for _ in range(3) for turn in ((first, 5, mine), (second, 5, theirs))]
    assert found == [0, 1, 2, 3, 4, None]
    assert [first.owner_of(trial) is None for trial in first.trials()] == [True, False, True, False, True]
    assert str(tmp_path / "a") in str(second.owner_of(second.trials()[0]))
    assert opened(tmp_path / "a", 1, busy=(0,)).unfinished == []
    assert [trial.number for trial in opened(tmp_path / "a", 1).unfinished] == [0, 2, 4], "of a place without process"
    assert opened(tmp_path / "b").unfinished[0].number == 1


def test_a_trial_that_is_one_too_many_waits_for_a_larger_total(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    claim(first, 3, mine := set())
    create = type(second.study).add_trial

    def slow(study: Any, trial: Any) -> None:  # meanwhile the other process takes the last ones
        assert [claim(first, 3, mine), claim(first, 3, mine)] == [1, 2]
        create(study, trial)

    second.study.add_trial = slow.__get__(second.study)
    assert claim(second, 3, theirs := set()) is None
    assert states(first) == ["RUNNING"] * 3 + ["WAITING"]
    assert claim(first, 3, mine) is None
    assert claim(second, 4, theirs) == 3
    assert states(first) == ["RUNNING"] * 4
    assert [second.owner_of(trial) is None for trial in second.trials()] == [False] * 3 + [True]


def test_a_trial_that_a_user_has_added_is_taken(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    first.study.enqueue_trial({"optim.lr": 0.1})
    assert [claim(first, 2, set()), claim(second, 2, set()), claim(second, 2, {1})] == [0, 1, None]
    assert first.trials()[0].system_attrs["fixed_params"] == {"optim.lr": 0.1}


@pytest.mark.parametrize("enqueued", [False, True])
def test_a_trial_is_of_one_process_at_every_moment(tmp_path: Path, enqueued: bool) -> None:
    """Between any two calls of one process to the storage, another one claims a trial, too."""
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    if enqueued:
        for _ in range(3):
            first.study.enqueue_trial({})
    mine, theirs, depth = set[int](), set[int](), [0]
    store = first.study._storage

    def interrupted(name: str) -> Any:
        call = getattr(store, name)

        def instead(*given: Any, **more: Any) -> Any:
            answer = call(*given, **more)
            if not depth[0]:
                depth[0] = 1
                claim(second, 8, theirs)
                depth[0] = 0
            return answer

        return instead

    for name in ("create_new_trial", "set_trial_state_values", "set_trial_user_attr"):
        setattr(store, name, interrupted(name))
    while claim(first, 8, mine) is not None:
        pass
    while claim(second, 8, theirs) is not None:
        pass
    assert mine | theirs == {*range(8), -1}
    assert mine & theirs == {-1}
    assert {*range(8)} & mine
    assert {*range(8)} & theirs


@pytest.mark.parametrize("call", ["create_new_trial", "set_trial_user_attr"])
def test_a_trial_whose_claim_was_not_answered_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The connection was lost after the storage had done what it was asked for."""
    study = opened(tmp_path / "a")
    study.study.enqueue_trial({})
    store = study.study._storage
    ask, lost = getattr(store, call), [type("OperationalError", (Exception,), {})("server closed")]

    def unanswered(*given: Any, **more: Any) -> object:
        answer = ask(*given, **more)
        if lost:
            raise lost.pop()
        return answer

    setattr(store, call, unanswered)
    monkeypatch.setattr(storages, "PAUSE", 0.0)
    started: set[int] = set()
    assert [claim(study, 3, started) for _ in range(4)] == [0, 1, 2, None]
    assert not lost
    assert states(study) == ["RUNNING"] * 3


def test_a_study_is_told_once(tmp_path: Path) -> None:
    study = opened(tmp_path / "a")
    claim(study, 3, set())
    for _ in range(2):
        study.finish(0, optuna.trial.TrialState.FAIL, None, "oom: no room")
    assert states(study) == ["FAIL"]
    assert study.trials()[0].user_attrs["reason"] == "oom: no room"


@pytest.mark.parametrize("reason", [None, "oom: no room"])
def test_a_trial_that_somebody_else_ends_at_the_same_time_ends_no_search(tmp_path: Path, reason: str | None) -> None:
    study = opened(tmp_path / "a")
    claim(study, 3, set())
    before = study.study.trials
    study.study.tell(0, state=optuna.trial.TrialState.FAIL)

    class Late:
        """The study as it was a moment ago."""

        trials, tell, _storage = before, study.study.tell, study.study._storage

    study.study = Late()
    study.finish(0, optuna.trial.TrialState.COMPLETE, [0.5], reason)
    assert [trial.state.name for trial in opened(tmp_path / "a").trials()] == ["FAIL"]


def test_a_folder_is_part_of_one_study(tmp_path: Path) -> None:
    opened(tmp_path / "a")
    assert json.loads((tmp_path / "a" / LINK).read_text())["study"] == "one"
    for settings, message in (
        ({"name": "two"}, r"was searched with hydra\.sweeper\.study=one; set it back"),
        ({"address": None}, r"was searched with hydra\.sweeper\.storage=sqlite"),
        ({"asked": {"ranges": "others"}}, r"ranges was r and is others; .* another name: hydra\.sweeper\.study=\.\.\."),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(tmp_path / "a", **settings)
    with pytest.raises(ConfigError, match="another study: ranges was r"):
        opened(tmp_path / "b", asked={"ranges": "others"})
    assert not (tmp_path / "b" / LINK).exists(), "which may join with other settings"
