"""Which words the settings of a training may have, and which of them fit together; numbers are in `ranges.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_exp.trainer.trainer import Trainer


def refuse_wrong_settings(trainer: Trainer) -> None:
    """Refuse words that mean nothing, and settings that do not go together.

    Raises:
        ValueError: with the value, what it may be, and a word that mends it.
    """
    batch_size, accumulated = trainer.batch_size, trainer.grad_accum_steps
    if batch_size == "auto" and accumulated > 1:
        raise ValueError(
            f"trainer.batch_size=auto decides how many batches are accumulated, but trainer.grad_accum_steps is "
            f"{accumulated}; leave it out, and set what both give: trainer.auto_batch_target_effective=16"
        )
    ranks = trainer.resume_world_size
    _refuse_unless(ranks in ("same", "any"), "resume_world_size", ranks, "same or any", "same")
    which, loss = trainer.evaluate_weights, trainer.compute_val_loss
    _refuse_unless(which in ("ema", "raw", "both"), "evaluate_weights", which, "ema, raw or both", "ema")
    _refuse_unless(loss in (True, False, "auto"), "compute_val_loss", loss, "true, false or auto", "auto")


def _refuse_unless(is_right: bool, name: str, value: Any, needed: str, mended: Any) -> None:
    if not is_right:
        found = "null" if value is None else value
        raise ValueError(f"trainer.{name} is {found}; it must be {needed}: trainer.{name}={mended}")
