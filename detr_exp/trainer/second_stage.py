"""A second stage that starts from the best of the first one, and goes back there whenever it does not improve.

As in D-FINE and DEIM: the stage without strong augmentation is a series of short fine-tunings of the best average, and
the best of them counts. Going back restores what was learnt (weights, averages, moments of the optimiser), not the
progress: epoch, learning rates and random numbers go on.
"""

from __future__ import annotations

import math

from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.checkpoint_content import save_training
from detr_exp.trainer.console import Console
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import Run, State, floating_buffers
from detr_exp.trainer.validation import monitored, weights_to_evaluate


def begin_or_return(
    settings: Settings, console: Console, run: Run, state: State, found: dict[str, dict[str, float]]
) -> None:
    """Keep the best state of the first stage; go back to it where the second begins or does not improve.

    To be called after an epoch and its evaluation, and before its checkpoint: a run that is killed in between repeats
    all of it.

    Args:
        found: metrics of the evaluated weights; empty if this epoch was not evaluated.
    """
    if settings.restart_epoch is None or state.batch:
        return
    which = weights_to_evaluate(settings, state)[-1]
    best = state.best[which]
    if state.epoch <= settings.restart_epoch and found and best.best_epoch == state.epoch_number - 1:
        state.first_stage_epoch = state.epoch
        save_training(run, state, files.FIRST_STAGE)
    if not settings.restart_epoch <= state.epoch < settings.epochs:
        return
    if state.epoch > settings.restart_epoch:
        if not found:
            return
        value = monitored(settings, found[which])
        if math.isfinite(value) and (state.best_since_return is None or value > state.best_since_return):
            state.best_since_return = value
            return
    state.best_since_return = None
    path = run.output_dir / files.FIRST_STAGE
    saved = files.load(path) if path.is_file() else {"epoch": None}
    if saved["epoch"] is None or saved["epoch"] != state.first_stage_epoch:
        console.line(f"{path.name} has not the best of the first stage, so the second one goes on from here")
        return
    state.load_learnt(saved)
    state.good_buffers = [buffer.clone() for buffer in floating_buffers(state.network)]
    run.tracker.log(state.step, {"train/returned_to_epoch": float(saved["epoch"])})
    console.line(
        f"epoch {state.epoch_number}: back to the state after epoch {saved['epoch']}, the best of the first stage"
    )
