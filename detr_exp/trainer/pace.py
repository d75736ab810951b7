"""How a training goes, for a person who looks on: loss, learning rate, images per second, memory, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from detr_exp.terminal import duration
from detr_exp.trainer.state import State

GIB = 2**30


class Late:
    """A value on its way from the device to the host; asking for it never waits.

    Args:
        value: `[]` on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self.host = value.to("cpu", non_blocking=True)
        self.event = None if value.device.type == "cpu" else torch.Event(value.device.type)
        if self.event is not None:
            self.event.record()

    def is_here(self) -> bool:
        return self.event is None or self.event.query()


@dataclass
class Pace:
    """Counts the steps of this process.

    The losses of an epoch are summed on the device. What is shown is their mean up to the step whose sum has reached
    the host, so that showing it never waits for the device.

    Attributes:
        state: of the training.
        begun: the first step of this process, and when.
        images: trained on in this epoch by this process.
        since, last: when this epoch began, and when its last step ended.
        earlier: seconds that earlier processes have trained.
        late: the sum that is on its way, and of how many steps.
        loss: the newest mean that is here.
    """

    state: State
    begun: tuple[int, float] | None = None
    images: int = 0
    since: float = 0.0
    last: float = 0.0
    earlier: float = 0.0
    late: tuple[Late, int] | None = None
    loss: float | None = None

    def begin_epoch(self) -> None:
        self.images, self.late, self.loss = 0, None, None
        self.since = self.last = time.perf_counter()
        self.begun = self.begun or (self.state.step, self.since)
        if self.state.batch == 0:
            self.state.epoch_sums, self.state.epoch_count = None, 0

    def add(self, terms: Tensor, images: int) -> None:
        """Count a step.

        Args:
            terms: its loss terms and gradient norm `[N + 1]`.
            images: of all ranks.
        """
        state = self.state
        state.log_sums = terms if state.log_sums is None else state.log_sums + terms
        state.log_count += 1
        state.epoch_sums = terms if state.epoch_sums is None else state.epoch_sums + terms
        state.epoch_count += 1
        self.images += images
        self.last = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block is not that of steps."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    @property
    def rate(self) -> float:
        """Images per second in this epoch, without evaluations."""
        return self.images / max(1e-9, self.last - self.since)

    @property
    def seconds_left(self) -> float:
        """Until the last step, at the mean pace of this process; evaluations count."""
        first, started = self.begun or (self.state.step, time.perf_counter())
        steps = max(1, self.state.step - first)
        return (time.perf_counter() - started) / steps * max(0, self.state.total_steps - self.state.position)

    @property
    def learning_rate(self) -> float:
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    @property
    def memory(self) -> float:
        """GiB: the largest allocation on a GPU so far, else what this process has in RAM."""
        device = self.state.precision.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / GIB
        return psutil.Process().memory_info().rss / GIB

    def means(self) -> dict[str, float]:
        """Mean loss terms of the epoch by name, `loss` for their total; waits for the device."""
        sums = self.state.epoch_sums
        if sums is None:
            return {}
        means = dict(zip(self.state.term_names, (sums / self.state.epoch_count).tolist()))
        return {"loss": means.pop("total"), **means}

    def row(self) -> dict[str, float]:
        """The row of `results.csv` for an epoch or its part up to now, without metrics; waits for the device."""
        state = self.state
        is_part = 0 < state.batch < len(state.loader) and state.position < state.total_steps
        _, started = self.begun or (0, time.perf_counter())
        return {
            "epoch": round(state.position / state.steps_per_epoch, 4) if is_part else state.epoch_number,
            "step": state.step,
            "seconds": round(self.earlier + time.perf_counter() - started, 1),
            **{f"train/{name}": value for name, value in self.means().items()},
            "lr": self.learning_rate,
            "images_per_second": round(self.rate, 2),
            "memory_gib": round(self.memory, 3),
        }

    def status(self) -> list[str]:
        """Words beside a progress bar, the most important first."""
        state = self.state
        if self.late is None and state.epoch_sums is not None:
            self.late = Late(state.epoch_sums[state.term_names.index("total")]), state.epoch_count
        if self.late is not None and self.late[0].is_here():
            self.loss, self.late = self.late[0].host.item() / self.late[1], None
        shown = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        return [*shown, *self.left(), *self.resources()]

    def left(self) -> list[str]:
        return [f"{duration(self.seconds_left)} left"] if self.state.step < self.state.total_steps else []

    def resources(self) -> list[str]:
        return [f"{self.rate:.1f} images/s", f"{self.memory:.1f} GiB", f"lr {self.learning_rate:.2g}"]
