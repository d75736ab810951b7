"""A study that several processes search at the same time, in one sweep folder or in those of several machines.

A trial belongs to a place in a folder, which its attribute `owner` names: only the process at this place starts it.
After the death of the process, whoever comes to the folder next goes on with the trial.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from detr_exp.config.mistakes import ConfigError
from detr_exp.tracker.secrets import masked
from detr_exp.trainer.study import JOURNAL, STUDY, patiently, reached, repair_journal, storage
from detr_exp.values import Values
from detr_exp.writing import write
from hydra_plugins.detr_exp._sweep import Sweep

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, TrialState

LINK = "study.json"  # in the sweep folder: its identity, and the study that it is part of
OWNER = "owner"  # attribute of a trial
NOBODY: Values = {"folder": "", "place": -1, "host": "", "path": ""}  # of a trial that waits, or is just being taken
T = TypeVar("T")


class SharedStudy:
    """The study of a sweep folder, or the one that it is part of. No other process may come to the folder meanwhile.

    Args:
        sweep: of the folder.
        place: of this process in it.
        address: of the storage; None: a journal in the folder.
        name: of the study in a storage; None: that of the folder.
        directions: of the objectives, `maximize` or `minimize`.
        asked: what all processes of the study must have in common.

    Attributes:
        study: Optuna's.
        unfinished: trials that this process goes on with: those of its place and of places that nobody has now.

    Raises:
        ConfigError: the study has other ranges, objectives or another pruner; or the folder is part of another study.
        StorageError: the storage cannot be reached.
    """

    def __init__(
        self, sweep: Sweep, place: int, address: str | None, name: str | None, directions: Sequence[str], asked: Values
    ) -> None:
        import optuna

        self.folder, self.address, busy = sweep.folder, address, sweep.others(place)
        name = STUDY if address is None else name or self.folder.name
        link = self._link(name)
        self.owner = {"folder": link["folder"], "place": place, "host": socket.gethostname(), "path": str(self.folder)}
        if address is None and not busy:
            repair_journal(self.folder / JOURNAL)
        with reached(address):
            self.study = optuna.create_study(
                study_name=name,
                storage=storage(self.folder, address),
                directions=cast(Any, list(directions)),
                load_if_exists=True,
            )
        self._refuse_another(asked)
        self.study.set_user_attr("asked", asked)
        write(self.folder / LINK, json.dumps(link) + "\n")
        self.unfinished: list[FrozenTrial] = []
        for trial in self.study.trials:
            is_running = trial.state.name == "RUNNING" and self.is_here(trial)
            if is_running and self._owner(trial)["place"] not in busy:
                self._set_owner(trial, self.owner)
                self.unfinished.append(trial)

    def _link(self, name: str) -> Values:
        """The identity of the folder, and the study that it is part of.

        Raises:
            ConfigError: the folder is part of another study.
        """
        link = {"storage": masked(self.address), "study": name}
        from detr_exp.runs.past import mapping  # takes time

        known = mapping(self.folder / LINK, json.loads)
        if not known and (self.folder / JOURNAL).exists():
            known = {"storage": None, "study": STUDY}  # an older folder
        differing = [key for key in link if known and known.get(key) != link[key]]
        if differing:
            was = ", ".join(f"hydra.sweeper.{key}={known[key] or 'null'}" for key in differing)
            raise ConfigError(
                f"{self.folder} was searched with {was}; set it back, or use another folder: hydra.sweep.dir=..."
            )
        return {"folder": known.get("folder") or uuid.uuid4().hex, **link}

    def _refuse_another(self, asked: Values) -> None:
        known = self.study.user_attrs.get("asked")
        if known is None or known == asked:
            return
        differing = ", ".join(
            f"{key} was {known.get(key)} and is {asked[key]}" for key in asked if known.get(key) != asked[key]
        )
        another = "" if self.address is None else " and another name: hydra.sweeper.study=..."
        raise ConfigError(
            f"{self.folder} holds another study: {differing}; use another folder: hydra.sweep.dir=...{another}"
        )

    def patiently(self, call: Callable[[], T]) -> T:
        """The result of a call to the study, repeated while its storage is away."""
        return patiently(call, self.address)

    def trials(self) -> list[FrozenTrial]:
        return self.patiently(lambda: self.study.trials)

    def _owner(self, trial: FrozenTrial) -> Values:
        """Journals of an earlier version name none: theirs are this folder's. Else a user has added it."""
        return cast(Values, trial.user_attrs.get(OWNER, self.owner if self.address is None else NOBODY))

    def is_here(self, trial: FrozenTrial) -> bool:
        """Whether a trial has its run in this folder."""
        return bool(self._owner(trial)["folder"] == self.owner["folder"])

    def owner_of(self, trial: FrozenTrial) -> str | None:
        """Where the process is that a trial belongs to; None: it is this one."""
        owner = self._owner(trial)
        return None if owner == self.owner else f"at {owner['host']}:{owner['path']}"

    def claimed(self, most: int, replaced: Container[int], started: Container[int]) -> FrozenTrial | None:
        """A trial that no other process has; None if the study has all of its trials.

        A new trial is this process's from the moment it is in the storage, in one transaction; so one whose storage's
        answer was lost is found again. Whoever finds enough trials before its own leaves it waiting for a later search.

        Args:
            most: the number of trials of the study.
            replaced: numbers of trials that do not count.
            started: numbers of the trials that this process has started.
        """
        return self.patiently(lambda: self._claimed(most, replaced, started))

    def _claimed(self, most: int, replaced: Container[int], started: Container[int]) -> FrozenTrial | None:
        from optuna.trial import TrialState, create_trial

        while True:
            trials = self.study.get_trials(deepcopy=False)
            running = [t for t in trials if t.state.name == "RUNNING" and t.user_attrs.get(OWNER) == self.owner]
            mine = next((trial for trial in running if trial.number not in started), None)
            waiting = next((trial for trial in trials if trial.state.name == "WAITING"), None)
            next_one = mine or waiting
            number = len(trials) if next_one is None else next_one.number
            if sum(trial.number < number and trial.number not in replaced for trial in trials) >= most:
                if mine is None:
                    return None
                self._leave(mine)
            elif mine is not None:
                return self.study.trials[number]
            elif waiting is None:
                self.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={OWNER: self.owner}))
            elif self.study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):  # for one process
                self.patiently(partial(self._set_owner, waiting, self.owner))

    def leave(self, trial: FrozenTrial) -> None:
        """Let a running trial of this process wait for a later search."""
        self.patiently(lambda: self._leave(trial))

    def _leave(self, trial: FrozenTrial) -> None:
        from optuna.trial import TrialState

        if self.study.trials[trial.number].state.name == "RUNNING":  # else an answer was lost
            self._set_owner(trial, NOBODY)  # first: from when it waits, another process may write that it is the owner
            self.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _set_owner(self, trial: FrozenTrial, owner: Values) -> None:
        self.study._storage.set_trial_user_attr(trial._trial_id, OWNER, owner)

    def finish(self, number: int, state: TrialState, values: Sequence[float] | None, reason: str | None) -> None:
        """Tell the study how a trial ended; nothing if it knows."""
        self.patiently(lambda: self._finish(number, state, values, reason))

    def _finish(self, number: int, state: TrialState, values: Sequence[float] | None, reason: str | None) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        trial = self.study.trials[number]
        if trial.state.is_finished():
            return
        with suppress(UpdateFinishedTrialError):  # somebody else has ended it meanwhile
            if reason is not None:
                self.study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.study.tell(number, values, state, skip_if_finished=True)
