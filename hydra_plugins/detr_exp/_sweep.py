"""Parts of every sweep: a folder used by one process at a time, a ledger, a parent run in MLflow, a summary."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import InstantiationException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import Container, DictConfig, OmegaConf

from detr_exp.config.grid import SWEEP_KEYS, number_in
from detr_exp.config.hydra_private import ConfigLoaderImpl, returned
from detr_exp.config.keys import differing, is_free
from detr_exp.config.mistakes import ConfigError
from detr_exp.config.ranges import refuse_out_of_range
from detr_exp.config.stored import as_first_version
from detr_exp.data.splits import HELD_OUT
from detr_exp.locks import LockedError, is_locked, lock
from detr_exp.runs.swept import folder_of
from detr_exp.terminal import python, say
from detr_exp.tracker.base import FINISHED, RECORD
from detr_exp.tracker.secrets import masked
from detr_exp.trainer.run_status import status_of
from detr_exp.values import Values, flat, values_of
from detr_exp.writing import LOCK, remove_left_overs
from hydra_plugins.detr_exp._ledger import UNFINISHED, Entry, Job, by_point, first_line, score
from hydra_plugins.detr_exp._parent import choice_among, honest_runs, parent_run
from hydra_plugins.detr_exp._recorded import JOB_LOCK, RecordedTask


class SweepFailed(RuntimeError):
    """Some runs of a sweep failed; all of them were started."""


class Sweep:
    """The folder of a sweep, and the runs in it.

    Args:
        hydra_context, task_function, config: as Hydra hands them to a sweeper.

    Raises:
        ConfigError: a setting of the sweep has a wrong value.
    """

    def __init__(self, hydra_context: HydraContext, task_function: Callable[..., Any], config: DictConfig) -> None:
        retry = config.get("sweep_retry")
        if retry not in (None, "failed"):
            raise ConfigError(f"sweep_retry is {retry!r}; use sweep_retry=failed, or null")
        fail_fast = config.get("sweep_fail_fast") or False
        if not isinstance(fail_fast, bool):
            raise ConfigError(f"sweep_fail_fast is {fail_fast!r}; use true or false: sweep_fail_fast=true")
        swept_by = {part: values_of(config.hydra[part]) for part in ("sweeper", "launcher")}  # they refer to the rest
        refuse_out_of_range(OmegaConf.create({"hydra": swept_by}))
        if any(override.startswith("hydra.sweep.subdir=") for override in config.hydra.overrides.hydra):
            raise ConfigError(
                "hydra.sweep.subdir cannot be set for a sweep, which finds its runs by their folders: each is named by "
                "its swept overrides; drop it, and choose the folder above them: hydra.sweep.dir=..."
            )
        self.retry_failed = retry == "failed"
        self.loader = cast(ConfigLoaderImpl, hydra_context.config_loader)
        self.config = config
        self.folder = Path(config.hydra.sweep.dir).resolve()
        if not any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra):
            self.folder /= name_of(config)
        config.hydra.sweep.dir = str(self.folder)
        self.task = RecordedTask(task_function, self.folder, fail_fast=fail_fast)
        self.ledger = self.task.ledger
        self.ended, self.seen = dict[str, Entry](), self.task.since
        try:
            self.launcher: Launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=self.task, config=config
            )
        except InstantiationException as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None  # the launcher's own message
            raise

    @contextmanager
    def held(self, several: bool = False) -> Iterator[int]:
        """Have a place in the folder, and group the jobs' runs in MLflow.

        Args:
            several: other processes may be at the same sweep, each at a place of its own.

        Yields:
            the number of the place.

        Raises:
            ConfigError: another sweep is running in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with self.starting():
                place = self._taken(stack, several)
                if not self.others(place):
                    remove_left_overs(self.folder)
                stack.enter_context(parent_run(self.config, self.folder, self.task.environment, self.ledger))
            yield place

    def starting(self) -> AbstractContextManager[None]:
        """In this context, no other process of this folder is in it."""
        return lock(self.folder / f"{LOCK}.start")

    def _taken(self, stack: ExitStack, several: bool) -> int:
        """Lock the first free place until the stack is left."""
        for place in itertools.count() if several else (0,):
            try:
                stack.enter_context(lock(self._lock_of(place), timeout=0))
                return place
            except LockedError:
                continue
        raise ConfigError(
            f"{self.folder} is in use by a sweep that is still running; use another folder: hydra.sweep.dir=..."
        )

    def _lock_of(self, place: int) -> Path:
        return self.folder / (f"{LOCK}.{place}" if place else LOCK)

    def others(self, place: int) -> set[int]:
        """The places of other processes that are at this sweep now."""
        names = {path.name.removeprefix(f"{LOCK}.") for path in self.folder.glob(f"{LOCK}.*")}
        numbers = {0, *map(int, filter(str.isdecimal, names))} - {place}
        return {number for number in numbers if is_locked(self._lock_of(number))}

    def is_finished(self, job: Job, entries: Mapping[str, Entry]) -> bool:
        """Whether a job has ended and is not to be repeated."""
        entry = entries.get(job.hash)
        if entry is None or entry.status in UNFINISHED:
            return False
        return entry.status in FINISHED or not self.retry_failed

    def folder_of(self, job: Job) -> Path:
        return folder_of(self.folder, job.hash, job.swept)

    def launched(self, job: Job) -> list[str]:
        """The overrides that a launcher needs to start a job."""
        self.task.jobs[job.hash] = job
        return [
            *job.overrides,
            "hydra.sweep.dir='{}'".format(str(self.folder).replace("'", r"\'")),
            f"hydra.sweep.subdir='{self.folder_of(job).name}'",  # a string, even if it looks like a number
        ]

    def refuse_another_config(self, jobs: Iterable[Job], composed: Callable[[Job], DictConfig]) -> None:
        """Refuse to mix the runs in the folder with runs of another configuration.

        Raises:
            ConfigError: names the differences.
        """
        alike: dict[tuple[str, ...], list[str]] = {}  # overrides but for numbers -> lines of a config that is the same
        for job in jobs:
            stored = self.folder_of(job) / ".hydra" / "config.yaml"
            if not stored.exists():
                continue
            kind = tuple(word for word in job.swept if number_in(word) is None)
            lines = stored.read_text(encoding="utf-8").splitlines()
            if _differ_by_swept_numbers(job, lines, alike.get(kind, [])):
                continue  # without composing thousands of configs
            before, now = (masked(_values(config)) for config in (OmegaConf.load(stored), composed(job)))
            others = [key for key in differing(before, now) if not is_free(key)]
            if others:
                changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in others[:8])
                raise ConfigError(
                    f"{self.folder} holds runs of another configuration: {changes}; "
                    "set it back, or use another folder: hydra.sweep.dir=..."
                )
            alike[kind] = lines

    def run(
        self,
        jobs: Iterable[Job],
        total: int,
        *,
        at_once: bool,
        ended: Callable[[Job, Entry], None] = lambda job, entry: None,
    ) -> None:
        """Launch jobs; each has a line in the ledger after its end.

        Args:
            jobs: to run; a launcher with a pool takes them one by one, as late as possible.
            total: their number.
            at_once: pass all jobs to a launcher without a pool at once, instead of one after another.
            ended: called with the entry of each job that has ended; `jobs` may depend on it.
        """
        serve = getattr(self.launcher, "serve", None)
        if serve is not None:
            self._serve(serve, jobs, total, ended)
            return
        batches = [list(jobs)] if at_once else ([job] for job in jobs)
        for batch in batches:
            if batch and not self.task.is_to_stop():
                self._launch(batch)
                for job in batch:
                    entry = self.entry_of(job)
                    if entry is not None:
                        ended(job, entry)

    def entry_of(self, job: Job) -> Entry | None:
        """The entry of a job that ended since this start of the sweep."""
        entries = self.ledger.entries()
        self.ended |= {entry.hash: entry for entry in entries[self.seen :]}
        self.seen = len(entries)
        return self.ended.get(job.hash)

    def _serve(
        self, serve: Callable[..., None], jobs: Iterable[Job], total: int, ended: Callable[[Job, Entry], None]
    ) -> None:
        """Run jobs in a launcher's pool."""
        launched: dict[int, Job] = {}
        count = itertools.count(1)

        def remaining() -> Iterator[tuple[int, list[str], str]]:
            for job in jobs:
                if self.task.is_to_stop():
                    return
                launched[job.number] = job
                self.task.jobs.clear()  # each process receives the task with its own job alone
                if (entry := self.entry_of(job)) is not None and entry.status not in UNFINISHED:
                    ended(job, entry)  # an earlier process of this sweep had started it, and it ended meanwhile
                    continue
                yield job.number, self.launched(job), " ".join(job.swept)

        def on_end(number: int, result: JobReturn, started: float) -> str:
            job = launched[number]
            entry, error = self.entry_of(job), returned(result)
            failed = isinstance(error, BaseException) and status_of(error) not in UNFINISHED
            if entry is None or (entry.status in UNFINISHED and failed):  # its last process has recorded nothing
                self.ledger.record(job, started, status_of(error), reason=first_line(error))
            entry = cast(Entry, self.entry_of(job))
            ended(job, entry)
            return f"{' '.join(job.swept)}  {summary_of(entry)}  ({next(count)} of {total})"

        serve(remaining(), on_end)

    def _launch(self, batch: list[Job]) -> None:
        """Launch jobs with a launcher that returns when all have ended, or raises when it has lost one of them."""
        started = time.monotonic()
        try:
            self.launcher.launch([self.launched(job) for job in batch], initial_job_idx=batch[0].number)
        except Exception as error:
            begun = [job for job in batch if (self.folder_of(job) / JOB_LOCK).exists()]
            if not begun:
                raise
            for job in begun:
                # others may still run; each holds its lock
                with lock(self.folder_of(job) / JOB_LOCK):
                    if self.entry_of(job) is None:
                        self.ledger.record(job, started, "killed", reason=f"its process is gone: {first_line(error)}")

    def close(
        self,
        jobs: Sequence[Job],
        extra: Mapping[str, Mapping[str, float]] | None = None,
        elsewhere: Mapping[str, Entry] | None = None,
        raced: bool = False,
    ) -> None:
        """Print the table, and how to use the best run.

        Args:
            jobs: of the sweep.
            extra: hash -> further results of a run, by name.
            elsewhere: hash -> entry of a run that has no line in the ledger because another process does it.
            raced: see `by_point`.

        Raises:
            SweepFailed: any of the other jobs is not finished.
        """
        from hydra_plugins.detr_exp._table import show, winner  # imports rich, which takes time

        entries, elsewhere = self.ledger.latest(), elsewhere or {}
        runs = honest_runs(self.folder, {job.hash: entries[job.hash] for job in jobs if job.hash in entries})
        further = {name: dict(values) for name, values in (extra or {}).items()}
        for name, run in runs.items():
            if run.choices is not None:
                further.setdefault(name, {})[HELD_OUT] = run.choices[0].there
        show(jobs, {**entries, **elsewhere}, further, self._metric(entries), raced)
        if (chosen := choice_among(runs)) is not None:
            say(f"\nthe best was {chosen}")
        points = by_point([entries[job.hash] for job in jobs if job.hash in entries], raced)
        if points and not any((extra or {}).values()):  # of several objectives none is the best in all
            best = next(job for job in jobs if job.hash == points[0][0].hash)
            result = f"{self._metric(entries)} {score(points[0][0]):.4f}"
            say("", *winner(best, self.folder_of(best), result, self.config.hydra.runtime.config_sources))
        say(f"\nall runs on one page:\n  {python()} -m detr_exp.report {shlex.quote(f'runs={self.folder}')}")
        own = [job for job in jobs if job.hash not in elsewhere]
        bad = [job for job in own if job.hash not in entries or entries[job.hash].status not in FINISHED]
        if bad:
            failed = sum(job.hash in entries and entries[job.hash].status not in UNFINISHED for job in bad)
            what = "failed" if failed == len(bad) else "are not finished"
            again = " with sweep_retry=failed" if failed else ""
            raise SweepFailed(f"{len(bad)} of {len(own)} runs {what}; the same command{again} runs only those")

    def _metric(self, entries: Mapping[str, Entry]) -> str:
        """What the runs of this folder were judged by."""
        from detr_exp.runs.past import PastRun

        done = (folder_of(self.folder, e.hash, e.overrides) for e in entries.values() if e.status in FINISHED)
        for folder in (folder for folder in done if (folder / RECORD).exists()):
            with suppress(ValueError):  # damaged
                return PastRun.load(folder).monitor
        return "result"


def name_of(config: DictConfig) -> str:
    """The swept keys and a hash of the command: equal for equal commands."""
    overrides = [one for one in config.hydra.overrides.task if one.partition("=")[0] not in SWEEP_KEYS]
    search = [
        one for one in config.hydra.overrides.hydra if re.match(r"hydra[./]sweeper(?!\.(?:n_trials|storage)\b)", one)
    ]
    parsed = OverridesParser.create().parse_overrides(overrides)
    keys = dict.fromkeys(one.key_or_group for one in parsed if one.is_sweep_override())
    named = config.hydra.runtime.choices.get("sweep") or "+".join(key.rpartition(".")[2] for key in keys) or "sweep"
    return f"{re.sub(r'[^A-Za-z0-9_+-]', '_', named)[:40]}-{hash_of([*overrides, *search])[:6]}"


def hash_of(overrides: Iterable[str]) -> str:
    """A short name for a set of overrides: ten letters and digits, valid on any file system."""
    return hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:10]


def summary_of(entry: Entry) -> str:
    """End of a line: the result, or the status and its reason."""
    shown = "" if entry.metric is None else f"{entry.metric:.4f}"
    return " ".join(filter(None, [shown, "" if entry.status == "ok" and shown else entry.status, entry.reason]))


def _differ_by_swept_numbers(job: Job, lines: Sequence[str], others: Sequence[str]) -> bool:
    """Whether the lines of a job's config are those of another one, but for the numbers that the job is to have."""
    numbers = {word.partition("=")[0].rpartition(".")[2]: number_in(word) for word in job.swept}
    changed = [line.strip().replace(": ", "=", 1) for line, other in zip(lines, others) if line != other]
    found = {one.partition("=")[0]: number_in(one) for one in changed}
    return len(lines) == len(others) and None not in found.values() and found.items() <= numbers.items()


def _values(config: Container) -> Values:
    """Every key of a config with its unresolved value."""
    return flat(as_first_version(values_of(config, resolve=False)))
