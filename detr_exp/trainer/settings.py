"""What values the settings of a training may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_exp.trainer.trainer import Trainer

AT_LEAST = {
    "epochs": 1,
    "grad_accum_steps": 1,
    "auto_batch_target_effective": 1,
    "auto_batch_max_targets_per_image": 1,
    "ema_update_interval": 1,
    "eval_interval": 1,
    "checkpoint_interval": 1,
    "keep_checkpoints": 0,
    "skip_best_epochs": 0,
    "log_every_steps": 1,
    "early_stopping_patience": 1,
    "nonfinite_limit": 1,
    "num_pictures": 0,
}
AT_LEAST_ONE_OR_NULL = ("overfit_batches", "max_steps", "eval_batch_size", "checkpoint_every_steps")
NOT_NEGATIVE = ("ema_tau", "early_stopping_min_delta", "clip_max_norm")


def refuse_wrong_settings(trainer: Trainer) -> None:
    """Refuse values out of their range.

    Raises:
        ValueError: with the value, its range and a word that mends it.
    """
    for name, least in AT_LEAST.items():
        value = getattr(trainer, name)
        _refuse_unless(_is_whole(value, least), name, value, f"a whole number >= {least}", max(least, 1))
    for name in AT_LEAST_ONE_OR_NULL:
        value = getattr(trainer, name)
        _refuse_unless(value is None or _is_whole(value, 1), name, value, "a whole number >= 1, or null", "null")
    for name in NOT_NEGATIVE:
        value = getattr(trainer, name)
        _refuse_unless(value is None or value >= 0, name, value, ">= 0", 0)
    batch_size, accumulated = trainer.batch_size, trainer.grad_accum_steps
    is_right = batch_size == "auto" or _is_whole(batch_size, 1)
    _refuse_unless(is_right, "batch_size", batch_size, "a whole number >= 1, or auto", 1)
    if batch_size == "auto" and accumulated > 1:
        raise ValueError(
            f"trainer.batch_size=auto decides how many batches are accumulated, but trainer.grad_accum_steps is "
            f"{accumulated}; leave it out, and set what both give: trainer.auto_batch_target_effective=16"
        )
    headroom, smooth, threshold = trainer.auto_batch_ema_headroom, trainer.smooth_alpha, trainer.picture_threshold
    _refuse_unless(0 < headroom <= 1, "auto_batch_ema_headroom", headroom, "in (0, 1]", 0.7)
    _refuse_unless(0 <= smooth < 1, "smooth_alpha", smooth, "in [0, 1)", 0)
    _refuse_unless(0 <= threshold <= 1, "picture_threshold", threshold, "in [0, 1]", 0.3)
    _refuse_unless(0 <= trainer.ema_decay < 1, "ema_decay", trainer.ema_decay, "in [0, 1)", 0.999)
    ranks = trainer.resume_world_size
    _refuse_unless(ranks in ("same", "any"), "resume_world_size", ranks, "same or any", "same")
    which, loss = trainer.evaluate_weights, trainer.compute_val_loss
    _refuse_unless(which in ("ema", "raw", "both"), "evaluate_weights", which, "ema, raw or both", "ema")
    _refuse_unless(loss in (True, False, "auto"), "compute_val_loss", loss, "true, false or auto", "auto")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _refuse_unless(is_right: bool, name: str, value: Any, needed: str, mended: Any) -> None:
    if not is_right:
        found = "null" if value is None else value
        raise ValueError(f"trainer.{name} is {found}; it must be {needed}: trainer.{name}={mended}")
