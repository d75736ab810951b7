"""Which epoch is the best, and when to stop early: decisions on a sequence of metric values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from detr_exp.tensor_files import Stored


@dataclass
class BestMetric:
    """Tracks the best value of one metric. Values that are not finite never win, and do not enter the mean.

    With `smooth_alpha` a values are compared by the bias-corrected running mean
    `s_t = (a s_{t-1} + (1 - a) x_t)`, `s_t / (1 - a^t)`, so that one lucky evaluation does not win.

    Args:
        skip_epochs: evaluations in epochs before this one never win.
        smooth_alpha: in [0, 1); 0 compares the raw values.
    """

    skip_epochs: int = 0
    smooth_alpha: float = 0.0
    best: float | None = None
    best_raw: float | None = None
    best_epoch: int | None = None
    beside: float | None = None  # what was measured with `best_raw` on other images
    mean: float = 0.0
    count: int = 0
    lost: int = 0  # evaluations without a finite value

    def update(self, value: float, epoch: int, beside: float | None = None) -> bool:
        """Add the value of `epoch` (0-based); returns whether it is the best so far."""
        if not math.isfinite(value):
            self.lost += 1
            return False
        self.count += 1
        self.mean = self.smooth_alpha * self.mean + (1 - self.smooth_alpha) * value
        smoothed = self.mean / (1 - self.smooth_alpha**self.count)
        if epoch < self.skip_epochs or (self.best is not None and smoothed <= self.best):
            return False
        self.best, self.best_raw, self.best_epoch, self.beside = smoothed, value, epoch, beside
        return True

    def forget(self) -> None:
        """Make the next value the best, because the checkpoint of the best is lost."""
        self.best = self.best_raw = self.best_epoch = self.beside = None

    def state_dict(self) -> Stored:
        return asdict(self)

    def load_state_dict(self, state: Stored) -> None:
        for name in ("best", "best_raw", "best_epoch", "mean", "count"):
            setattr(self, name, state[name])
        self.lost, self.beside = state.get("lost", 0), state.get("beside")
        if self.best is not None and not math.isfinite(self.best):  # older versions let such a value win
            self.forget()
        if not math.isfinite(self.mean):
            self.mean, self.count = 0.0, 0


@dataclass
class EarlyStopping:
    """Stop when `patience` evaluations in a row do not improve the value by more than `min_delta`; an evaluation
    without a finite value is no improvement.

    Args:
        patience: number of evaluations, not of epochs.
        min_delta: smallest improvement that counts.
        skip_epochs: evaluations in epochs before this one are not counted.
    """

    patience: int
    min_delta: float
    skip_epochs: int = 0
    best: float | None = None
    waited: int = 0

    @property
    def is_reached(self) -> bool:
        return self.waited >= self.patience

    def update(self, value: float, epoch: int) -> bool:
        """Add the value of `epoch` (0-based); returns whether to stop now."""
        if epoch < self.skip_epochs:
            return False
        if math.isfinite(value) and (self.best is None or value > self.best + self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.is_reached

    def state_dict(self) -> Stored:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Stored) -> None:
        self.best, self.waited = state["best"], state["waited"]
        if self.best is not None and not math.isfinite(self.best):
            self.best = None
