"""What is due at a step: an evaluation, or the end of the run."""

from __future__ import annotations

from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import State


def is_exhausted(settings: Settings, state: State) -> bool:
    """Whether the last step is reached, of `max_steps` or of a part of an epoch."""
    last = settings.last_step(state.steps_per_epoch)
    return last is not None and state.step >= last


def has_ended(settings: Settings, state: State) -> bool:
    """Whether nothing is left to train."""
    stopped = state.is_pruned or (state.early_stopping is not None and state.early_stopping.is_reached)
    return stopped or state.epoch >= settings.epochs or is_exhausted(settings, state)


def is_within_epoch(settings: Settings, state: State) -> bool:
    """Whether neither an epoch nor the run ends at this step."""
    return state.batch > 0 and not is_exhausted(settings, state)


def is_evaluated(settings: Settings, state: State) -> bool:
    """Whether the weights of this step are evaluated, if it is one at which something ends or is due."""
    every = settings.eval_every_steps
    if every is not None and state.step % every == 0:
        return True
    return has_ended(settings, state) or (state.batch == 0 and state.epoch % settings.eval_interval == 0)


def is_pending(settings: Settings, state: State) -> bool:
    """Whether an evaluation or a checkpoint at the end of an epoch, of the run, or within an epoch is not done yet."""
    if state.step <= state.closed:
        return False
    return not is_within_epoch(settings, state) or is_evaluated(settings, state)
