"""A run that is a trial of an Optuna study: it reports its values, and learns whether it is pruned.

The sweeper sets `DETR_EXP_TRIAL` for each of its jobs; other runs do not use studies.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from detr_exp.tracker.secrets import masked
from detr_exp.trainer.study import ADDRESS_VARIABLE, StorageError, is_outage, storage
from detr_exp.values import Values

if TYPE_CHECKING:
    import optuna

TRIAL_VARIABLE = "DETR_EXP_TRIAL"
PruningCheck = Callable[[int, float], bool]

logger = logging.getLogger(__name__)


def pruning_check() -> PruningCheck | None:
    """(epoch from 1, monitored value) -> whether to prune; None if the run is not a trial that can be pruned.

    A study that does not answer, or in which the trial has ended, prunes nothing: training goes on.
    """
    if TRIAL_VARIABLE not in os.environ:
        return None
    settings = json.loads(os.environ[TRIAL_VARIABLE])
    import optuna

    @cache
    def trial() -> optuna.Trial:
        address = os.environ[ADDRESS_VARIABLE] if settings["is_shared"] else None
        place = storage(Path(settings["folder"]), address)
        study = optuna.load_study(study_name=settings["study"], storage=place, pruner=pruner(settings))
        return optuna.Trial(study, study.trials[settings["number"]]._trial_id)

    def should_prune(epoch: int, value: float) -> bool:
        if not math.isfinite(value):  # cannot be compared, and some storages refuse it
            return False
        try:
            trial().report(value, epoch)
            return trial().should_prune()
        except optuna.exceptions.UpdateFinishedTrialError:  # by a user, or by another process that thinks it is dead
            logger.warning("somebody else has ended this trial in its study; the run goes on, and is not pruned")
            return False
        except Exception as error:
            if not isinstance(error, StorageError) and not is_outage(error):
                raise
            logger.warning("the study does not answer, so this run is not pruned now (%s)", masked(str(error)))
            return False

    return should_prune


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
