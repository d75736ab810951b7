"""Learning-rate schedules: pure functions of the step.

A shape is called with the optimiser step (from 0) and the size of the run, and returns the factor that every group's
base rate is multiplied by. A warm-up is one more factor. There is no state between steps, so a resumed run has the
same rates as an uninterrupted one, and a run with more epochs simply continues its schedule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

WARMUP_SHAPES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, length: (step + 1) / length,  # RT-DETR: the first step already moves
    "from_zero": lambda step, length: step / length,  # RF-DETR: the first step has a rate of 0
    "quadratic": lambda step, length: (step / length) ** 2,  # DEIM
}
LONGEST_WARMUP = 0.3
EPOCHS = ("milestones", "drop_epoch", "flat_epochs")  # settings that name epochs at which a rate begins to fall


def constant(step: int, *, steps_per_epoch: int, total_steps: int, warmup_steps: int) -> float:
    """The base rates throughout."""
    return 1.0


def step(
    step: int, *, steps_per_epoch: int, total_steps: int, warmup_steps: int, drop_epoch: float, factor: float
) -> float:
    """One drop to `factor` at the beginning of epoch `drop_epoch` (counted from 0)."""
    return factor if step >= drop_epoch * steps_per_epoch else 1.0


def multistep(
    step: int, *, steps_per_epoch: int, total_steps: int, warmup_steps: int, milestones: Sequence[float], gamma: float
) -> float:
    """A further factor `gamma` at the beginning of every epoch of `milestones` (counted from 0)."""
    return gamma ** sum(step >= epoch * steps_per_epoch for epoch in milestones)


def cosine(step: int, *, steps_per_epoch: int, total_steps: int, warmup_steps: int, min_factor: float) -> float:
    """Half a cosine from 1 after the warm-up to `min_factor` at the end."""
    return _half_cosine(step, warmup_steps, total_steps, min_factor)


def flat_cosine(
    step: int,
    *,
    steps_per_epoch: int,
    total_steps: int,
    warmup_steps: int,
    flat_epochs: float | None,
    final_epochs: float,
    min_factor: float,
) -> float:
    """Flat, then half a cosine, then flat at `min_factor` (DEIM, https://arxiv.org/abs/2412.04234).

    Args:
        step: optimiser step from 0.
        steps_per_epoch: optimiser steps of one epoch.
        total_steps: of the run.
        warmup_steps: part of the first flat stretch.
        flat_epochs: epochs at the base rates; None: half of the run.
        final_epochs: epochs at `min_factor`, meant for the last ones without strong augmentation.
        min_factor: where the cosine ends.
    """
    start = total_steps / 2 if flat_epochs is None else flat_epochs * steps_per_epoch
    return _half_cosine(step, max(start, warmup_steps), total_steps - final_epochs * steps_per_epoch, min_factor)


def build_schedule(
    shape: Callable[..., float],
    *,
    steps_per_epoch: int,
    total_steps: int,
    warmup: float,
    warmup_unit: str,
    warmup_shape: str,
) -> Callable[[int], float]:
    """The schedule of a run: step -> factor of every base learning rate.

    Args:
        shape: one of the functions above, or another with the same arguments.
        steps_per_epoch: optimiser steps of one epoch.
        total_steps: optimiser steps of the run.
        warmup: length of the warm-up in `warmup_unit`; 0: none.
        warmup_unit: `steps`, `epochs` or `fraction` (of the run).
        warmup_shape: `linear` ((k + 1) / W), `from_zero` (k / W) or `quadratic` ((k / W)^2).

    Raises:
        ValueError: for an unknown unit or shape.
    """
    length = warmup_steps(warmup, warmup_unit, steps_per_epoch, total_steps)
    if warmup_shape not in WARMUP_SHAPES:
        raise ValueError(
            f"optim.warmup_shape is {warmup_shape!r}; use {', '.join(WARMUP_SHAPES)}: optim.warmup_shape=linear"
        )
    rising = WARMUP_SHAPES[warmup_shape]
    _point_out_epochs_after_the_end(shape, total_steps / steps_per_epoch)
    shape = partial(shape, steps_per_epoch=steps_per_epoch, total_steps=total_steps, warmup_steps=length)

    def schedule(step: int) -> float:
        return shape(step) * (rising(step, length) if step < length else 1.0)

    return schedule


def warmup_steps(warmup: float, unit: str, steps_per_epoch: int, total_steps: int) -> int:
    """Length of the warm-up in optimiser steps; warns when it is a large part of the run.

    Raises:
        ValueError: for an unknown unit.
    """
    scale = {"steps": 1, "epochs": steps_per_epoch, "fraction": total_steps}
    if unit not in scale:
        raise ValueError(f"optim.warmup_unit is {unit!r}; use steps, epochs or fraction: optim.warmup_unit=steps")
    length = int(warmup * scale[unit])
    if length > LONGEST_WARMUP * total_steps:
        warnings.warn(
            f"optim.warmup takes {length} of {total_steps} steps; most of this run trains below its learning rate. "
            "Shorter: optim.warmup=0.05 optim.warmup_unit=fraction",
            stacklevel=2,
        )
    return length


def _point_out_epochs_after_the_end(shape: Callable[..., float], epochs: float) -> None:
    """Warn where a schedule has an epoch beyond the end of the run, so that its rate never falls there."""
    settings = getattr(shape, "keywords", {})
    for name in EPOCHS:
        given = settings.get(name)
        late = [epoch for epoch in (given if isinstance(given, Sequence) else [given]) if (epoch or 0) >= epochs]
        if late:
            warnings.warn(
                f"optim.scheduler.{name} is {given}, but the run has {epochs:g} epochs: it never reaches "
                f"{', '.join(map(str, late))}, and the learning rate does not fall there",
                stacklevel=3,
            )


def _half_cosine(step: int, start: float, end: float, min_factor: float) -> float:
    """1 until `start`, then half a cosine, `min_factor` from `end` on."""
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * progress))
