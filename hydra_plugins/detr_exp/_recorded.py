"""A sweep's task: does one run and records its end, in any process that a launcher starts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from omegaconf import DictConfig

from detr_exp.locks import LockedError, lock
from detr_exp.runs.swept import hash_in
from detr_exp.signals import EXIT_STATUS, Interrupt, Interrupted
from detr_exp.tracker.base import FINISHED, RECORD, RunRecord
from detr_exp.trainer.run_status import PrunedError, status_of
from hydra_plugins.detr_exp._ledger import UNFINISHED, Job, Ledger, first_line, judged

JOB_LOCK = ".job.lock"  # held by the process that uses the folder
PATIENCE = 60.0  # seconds in which a run left by a killed sweep saves its state and ends


class JobError(RuntimeError):
    """A run of a sweep ended without a result."""


class LostError(JobError):
    """A run was ended from outside; it resumes from its newest checkpoint."""


class RecordedTask:
    """Calls `task` for a job of the sweep and appends a line to the ledger.

    Args:
        task: config -> result.
        folder: of the sweep.
        fail_fast: start no job after one that has failed.

    Attributes:
        jobs: hash -> job; code that launches jobs adds them.
        environment: environment variables of all jobs.
        environment_of: hash -> further environment variables of one job.
        since: number of ledger lines before this start of the sweep.
    """

    def __init__(self, task: Callable[[DictConfig], Any], folder: Path, fail_fast: bool) -> None:
        self.task, self.folder, self.fail_fast = task, folder, fail_fast
        self.ledger = Ledger(folder)
        self.jobs: dict[str, Job] = {}
        self.environment: dict[str, str] = {}
        self.environment_of: dict[str, dict[str, str]] = {}
        self.since = len(self.ledger.entries())
        self.seen, self.has_failed = self.since, False

    def __call__(self, cfg: DictConfig) -> Any:
        """
        Raises:
            Exception: of the task; the sweep continues.
            SystemExit: the process received a signal to end, and so did the sweep.
        """
        requeue = handler_of_scheduler()
        try:
            with Interrupt(raises=True):  # until the training handles signals itself
                return self._recorded(cfg)
        except (SystemExit, Interrupted) as end:
            status = end.exit_status if isinstance(end, Interrupted) else end.code
            if requeue is not None and status == EXIT_STATUS[signal.SIGUSR2]:
                requeue(signal.SIGUSR2, None)
            raise

    def _recorded(self, cfg: DictConfig) -> Any:
        """The result of the task, recorded as the exceptions of `__call__` are."""
        if self.is_to_stop():
            raise JobError("not started: a run before it has failed (sweep_fail_fast=true)")
        folder = Path(HydraConfig.get().runtime.output_dir)
        job, started = self.jobs[hash_in(folder.name)], time.monotonic()
        try:
            with (
                env_override(self.environment | self.environment_of.get(job.hash, {})),
                lock(folder / JOB_LOCK, timeout=PATIENCE),
            ):
                if (folder / RECORD).exists():  # by whomever it was started before
                    cfg.trainer.resume = "auto"
                value = self.task(cfg)
        except PrunedError as error:
            self.ledger.record(job, started, "pruned", error.best, str(error))
            return error.best
        except SystemExit as end:
            if end.code in EXIT_STATUS.values():
                self.ledger.record(job, started, "killed", reason="it received a signal to end, and saved its state")
                raise
            self.ledger.record(job, started, "failed", reason=f"it called sys.exit({end.code!r})")
            raise JobError(f"it called sys.exit({end.code!r})") from None
        except LockedError:
            reason = f"a process of an earlier start still uses {folder}; end it first"
            self.ledger.record(job, started, "failed", reason=reason)
            raise JobError(reason) from None
        except Exception as error:
            status = status_of(error)
            if status == "failed":
                status = recorded_status(folder) or status  # with several ranks the error does not name the cause
            self.ledger.record(job, started, status, reason=first_line(error))
            raise
        self.ledger.record(job, started, *judged(value))
        return value

    def is_to_stop(self) -> bool:
        """Whether a run has failed and no further one is to be started."""
        if self.fail_fast and not self.has_failed:
            fine, entries = (*FINISHED, *UNFINISHED), self.ledger.entries()
            self.has_failed = any(entry.status not in fine for entry in entries[self.seen :])
            self.seen = len(entries)
        return self.has_failed


def handler_of_scheduler() -> Callable[[int, FrameType | None], Any] | None:
    """The handler with which submitit queues the job again and ends this process; to be called after saving."""
    handler = signal.getsignal(signal.SIGUSR2) if hasattr(signal, "SIGUSR2") else None
    is_ours = isinstance(getattr(handler, "__self__", None), Interrupt)
    return handler if callable(handler) and not is_ours else None


def recorded_status(folder: Path) -> str | None:
    """`nan` or `oom` if that is the status of the run record, else None."""
    try:
        status = RunRecord.load(folder).status
    except ValueError:
        return None
    return status if status in ("nan", "oom") else None
