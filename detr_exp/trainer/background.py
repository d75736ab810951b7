"""Checkpoints that a thread writes while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from types import TracebackType
from typing import cast

import torch.distributed as dist

from detr_exp.trainer import distributed


def nothing() -> None:
    """The job of a rank that has nothing to write."""


class Background:
    """Writes files one after another in a thread; all ranks make the same calls, whatever each of them has to write.

    A process that is killed leaves the previous files, because each is renamed only when it is complete.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._jobs: list[Future[None]] = []

    def add(self, job: Callable[[], None]) -> None:
        """Begin a job when those before it are done."""
        self._jobs.append(self._thread.submit(job))

    def wait(self) -> None:
        """Wait until all jobs of all ranks are done; without a job, this costs nothing.

        Raises:
            ValueError: a file could not be written, on any rank.
        """
        jobs, self._jobs = self._jobs, []
        if not jobs:
            return
        own = next((error for job in jobs if (error := job.exception()) is not None), None)
        texts = distributed.gather(None if own is None else str(own))
        if own is not None:
            raise own
        if failed := [text for text in texts if text is not None]:
            raise ValueError(failed[0])

    @cached_property
    def group(self) -> dist.ProcessGroup:
        """Of all ranks, for exchanges of the thread: those of the training have an order of their own."""
        return cast("dist.ProcessGroup", dist.new_group(backend="gloo"))

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # after an error other ranks may be gone, on which the thread could wait
        self._thread.shutdown(wait=kind is None or distributed.world_size() == 1)
        if kind is None:
            self.wait()
