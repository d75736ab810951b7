"""A run that is a trial of an Optuna study: it reports its values, and learns whether it is pruned.

The sweeper sets `DETR_EXP_TRIAL` for each of its jobs; other runs do not use studies.
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
    """(epoch from 1, monitored value) -> whether to prune; None if the run is not a trial that can be pruned."""
    if TRIAL_VARIABLE not in os.environ:
        return None
    settings = json.loads(os.environ[TRIAL_VARIABLE])
    import optuna

    study = optuna.load_study(study_name=STUDY, storage=storage(Path(settings["folder"])), pruner=pruner(settings))
    trial = optuna.Trial(study, study.trials[settings["number"]]._trial_id)

    def should_prune(epoch: int, value: float) -> bool:
        if not math.isfinite(value):  # cannot be compared, and some storages refuse it
            return False
        trial.report(value, epoch)
        return trial.should_prune()

    return should_prune


def storage(folder: Path) -> optuna.storages.JournalStorage:
    """The study's journal in a sweep folder: a file that several processes append to, on network disks as well."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = str(folder / JOURNAL)
    return JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))


def pruner(settings: Values) -> optuna.pruners.BasePruner:
    """The pruner of a sweep.

    Args:
        settings: `pruner`, `min_epochs`, `reduction_factor`, `startup_trials` as in `conf/hydra/sweeper/optuna.yaml`;
            `max_epochs` of a trial.
    """
    from optuna import pruners

    first, factor = settings["min_epochs"], settings["reduction_factor"]
    if settings["pruner"] == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
    if settings["pruner"] == "hyperband":
        return pruners.HyperbandPruner(
            min_resource=first, max_resource=max(first, settings["max_epochs"]), reduction_factor=factor
        )
    return pruners.MedianPruner(n_startup_trials=settings["startup_trials"], n_warmup_steps=first)


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
