"""A run that is a trial of a study: it tells the study how far it has come, and hears whether to give up.

The sweeper sets `DETR_EXP_TRIAL` for each of its jobs; other runs know nothing of studies.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from detr_exp.config.mistakes import ConfigError
from detr_exp.values import Values

if TYPE_CHECKING:
    import optuna

TRIAL_VARIABLE = "DETR_EXP_TRIAL"
JOURNAL = "study.journal"
STUDY = "sweep"
PruningCheck = Callable[[int, float], bool]


def pruning_check() -> PruningCheck | None:
    """(epoch from 1, monitored value) -> whether to give up; None where the run is no trial that may be pruned."""
    if TRIAL_VARIABLE not in os.environ:
        return None
    told = json.loads(os.environ[TRIAL_VARIABLE])
    import optuna

    study = optuna.load_study(study_name=STUDY, storage=storage(Path(told["folder"])), pruner=pruner(told))
    trial = optuna.Trial(study, study.trials[told["number"]]._trial_id)

    def is_behind(epoch: int, value: float) -> bool:
        if not math.isfinite(value):  # nothing to compare; some storages refuse it
            return False
        trial.report(value, epoch)
        return trial.should_prune()

    return is_behind


def storage(folder: Path) -> optuna.storages.JournalStorage:
    """The study's journal in a sweep folder: a file that several processes append to, on network disks as well."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = str(folder / JOURNAL)
    return JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))


def pruner(told: Values) -> optuna.pruners.BasePruner:
    """The pruner that a sweep asked for.

    Args:
        told: `pruner`, `min_epochs`, `reduction_factor` and `startup_trials` as in `conf/hydra/sweeper/optuna.yaml`;
            `max_epochs` of a trial.
    """
    from optuna import pruners

    first, factor = told["min_epochs"], told["reduction_factor"]
    if told["pruner"] == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
    if told["pruner"] == "hyperband":
        return pruners.HyperbandPruner(
            min_resource=first, max_resource=max(first, told["max_epochs"]), reduction_factor=factor
        )
    return pruners.MedianPruner(n_startup_trials=told["startup_trials"], n_warmup_steps=first)


def repair_journal(journal: Path) -> None:
    """Cut off the line that a process was killed in the middle of.

    Raises:
        ConfigError: another line is damaged, without which the search is not what it was.
    """
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(journal, sum(map(len, lines[:-1])))
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{journal} is damaged at line {number} of {len(lines)} ({error}); restore it from a copy, or search "
                "in another folder: hydra.sweep.dir=..."
            ) from error
    for lock in journal.parent.glob(f"{journal.name}*.lock"):
        lock.unlink()
