"""The settings of a training, and which of them fit together; ranges of numbers are in `config/ranges.py`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from detr_exp.trainer.elastic import ElasticTraining
from detr_exp.trainer.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values of `conf/trainer/`, which documents their meaning and cost.

    Raises:
        ValueError: for a value out of its range.
    """

    hardware: Hardware
    elastic: ElasticTraining | None = None
    # length
    epochs: float
    restart_epoch: int | None = None
    max_steps: int | None
    overfit_batches: int | None
    early_stopping: bool
    early_stopping_patience: int
    early_stopping_min_delta: float
    early_stopping_use_ema: bool
    # batch and step
    batch_size: int | str
    auto_batch_target_effective: int
    auto_batch_max_targets_per_image: int
    auto_batch_ema_headroom: float
    grad_accum_steps: int
    clip_max_norm: float | None
    nonfinite_limit: int
    deterministic: bool
    # averaging
    use_ema: bool
    ema_decay: float
    ema_tau: float
    ema_update_interval: int
    ema_copy_first: bool
    # evaluation
    eval_interval: int
    eval_every_steps: int | None = None
    eval_batch_size: int | None
    evaluate_weights: str
    monitor: str | None
    compute_val_loss: bool | str
    run_test: bool
    compute_test_loss: bool
    skip_best_epochs: int
    smooth_alpha: float
    # checkpoints
    checkpoint_interval: int
    checkpoint_every_steps: int | None
    checkpoint_in_background: bool = False
    keep_checkpoints: int
    resume: str | None
    resume_world_size: str
    # output
    log_every_steps: int
    log_per_class_metrics: bool
    progress_bar: str | bool | None
    num_pictures: int
    picture_threshold: float

    def __post_init__(self) -> None:
        _refuse_wrong(self)

    def last_step(self, steps_per_epoch: int) -> int | None:
        """The step at which a run ends, wherever in an epoch that is; None: it ends with its last epoch."""
        ends = [] if self.max_steps is None else [self.max_steps]
        if self.epochs % 1:
            ends.append(max(1, round(self.epochs * steps_per_epoch)))
        return min(ends, default=None)


def _refuse_wrong(settings: Settings) -> None:
    """Refuse unknown values, and settings that do not fit together.

    Raises:
        ValueError: with the value, the allowed values, and an override that fixes it.
    """
    batch_size, accumulated = settings.batch_size, settings.grad_accum_steps
    if batch_size == "auto" and accumulated > 1:
        raise ValueError(
            f"trainer.batch_size=auto decides how many batches are accumulated, but trainer.grad_accum_steps is "
            f"{accumulated}; leave it out, and set the effective batch size: trainer.auto_batch_target_effective=16"
        )
    if settings.restart_epoch is not None and settings.restart_epoch >= settings.epochs:
        warnings.warn(
            f"trainer.restart_epoch is {settings.restart_epoch}, but the run ends after {settings.epochs} epochs, so "
            f"there is no second stage: trainer.restart_epoch={max(1, math.ceil(settings.epochs) - 1)}",
            stacklevel=2,
        )
    if settings.restart_epoch is not None and settings.eval_every_steps is not None:
        raise ValueError(
            f"trainer.eval_every_steps is {settings.eval_every_steps}, but trainer.restart_epoch goes back to the end "
            "of the best epoch, so evaluations have to be there: trainer.eval_every_steps=null trainer.eval_interval=1"
        )
    ranks = settings.resume_world_size
    _refuse_unless(ranks in ("same", "any"), "resume_world_size", ranks, "same or any", "same")
    which, loss = settings.evaluate_weights, settings.compute_val_loss
    _refuse_unless(which in ("ema", "raw", "both"), "evaluate_weights", which, "ema, raw or both", "ema")
    _refuse_unless(loss in (True, False, "auto"), "compute_val_loss", loss, "true, false or auto", "auto")


def _refuse_unless(is_right: bool, name: str, value: object, needed: str, valid: object) -> None:
    if not is_right:
        found = "null" if value is None else value
        raise ValueError(f"trainer.{name} is {found}; it must be {needed}: trainer.{name}={valid}")
