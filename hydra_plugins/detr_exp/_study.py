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
            if is_running and trial.user_attrs.get(OWNER, self.owner)["place"] not in busy:
                self.study._storage.set_trial_user_attr(trial._trial_id, OWNER, self.owner)
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

    def is_here(self, trial: FrozenTrial) -> bool:
        """Whether a trial has its run in this folder."""
        return bool(trial.user_attrs.get(OWNER, self.owner)["folder"] == self.owner["folder"])

    def owner_of(self, trial: FrozenTrial) -> str | None:
        """Where the process is that a trial belongs to; None: it is this one."""
        owner = trial.user_attrs.get(OWNER, self.owner)
        return None if owner == self.owner else f"at {owner['host']}:{owner['path']}"

    def claimed(self, most: int, replaced: Container[int], started: Container[int]) -> FrozenTrial | None:
        """A trial that no other process has; None if the study has all of its trials.

        A trial is first added as waiting. A storage lets only one process set it running, and does not withdraw it:
        whoever finds enough trials before it leaves it to a later search.

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
            for trial in trials:  # running although the storage's answer was lost
                if trial.state.name == "RUNNING" and self.owner_of(trial) is None and trial.number not in started:
                    return trial
            waiting = next((trial for trial in trials if trial.state.name == "WAITING"), None)
            number = len(trials) if waiting is None else waiting.number
            if sum(trial.number < number and trial.number not in replaced for trial in trials) >= most:
                return None
            if waiting is None:
                self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={OWNER: self.owner}))
            elif self.study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                self.study._storage.set_trial_user_attr(waiting._trial_id, OWNER, self.owner)
                return self.study.trials[number]

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
