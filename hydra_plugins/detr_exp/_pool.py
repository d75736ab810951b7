"""Runs the jobs of a sweep on an engine: whatever starts processes, on this machine or on others.

The pool does what all launchers have in common: it takes jobs one by one when there is room, writes what a job needs
into its run folder, waits for its answer there, starts lost jobs again, and shows a live table. A launcher is a Hydra
plugin of one file that is an `Engine`, and passes `launch` and `serve` on to its pool:

- `start` starts a command somewhere, with this folder, this environment, and its output appended to this log. The
  command does the rest in any process: it changes to the folder of the sweep's command, so that relative paths mean
  the same, runs the task, appends to the ledger and writes the answer. Without access to its run folder it exits with
  `NOT_SHARED`.
- `poll` says for all ids at once where the jobs are and which have ended, and `cancel` asks jobs to save and end.
- A job that was started before resumes in its folder from its newest checkpoint (`RecordedTask`), whoever starts it.
- With `survives`, jobs go on when the sweep's own process is gone or loses its terminal. Started again, it skips the
  jobs that have ended by their lines in the ledger, and finds the running ones by the ids in their folders.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from detr_exp.config.hydra_private import ended_with, returned
from detr_exp.signals import OWNED, Interrupt, Interrupted, ended_by
from detr_exp.writing import write
from hydra_plugins.detr_exp._job_process import NOT_SHARED
from hydra_plugins.detr_exp._recorded import JobError

# in the run folder:
LOG = "job.log"  # the output of a run
JOB = ".job"  # a folder that only this user can read, because the task holds the whole config
TASK, ANSWER, STARTED = f"{JOB}/task.pkl", f"{JOB}/answer.json", f"{JOB}/started.json"
PASSED = (  # beginnings of the names of environment variables that jobs receive, besides `hydra.job.env_copy`
    *("DETR_EXP_", "PYTHON", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "NCCL_", "GLOO_", "CUBLAS_", "OMP_"),
    *("MLFLOW_", "WANDB_", "HF_", "AWS_", "AZURE_", "GOOGLE_", "PG"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
GRACE = 60.0  # seconds for runs to save their state when the sweep receives a signal to end
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Ended(Protocol):
    """Called when a job has ended, with its number, what it returned, and its seconds; the status it got."""

    def __call__(self, number: int, result: JobReturn, seconds: float, /) -> str: ...


class Work(NamedTuple):
    """What an engine starts.

    Attributes:
        name: of the job, unique in its sweep.
        command: program and arguments.
        folder: in which to start it, that of the run; absolute.
        environment: variables to set besides those of the place where it runs.
        log: file to which its output is appended; it exists.
    """

    name: str
    command: list[str]
    folder: Path
    environment: dict[str, str]
    log: Path


class State(NamedTuple):
    """Where a job is.

    Attributes:
        place: a GPU, a machine, a queue; to print.
        error: how it ended, if it has and left no answer; None while it waits or runs.
        lost: its end is no fault of its own (its machine died, its time was over): it may be started again.
    """

    place: str
    error: BaseException | None = None
    lost: bool = False


class Engine(Protocol):
    """Starts processes.

    Attributes:
        slots: jobs that may be there at once, those that wait included.
        retries: how many times a lost job is started again.
        survives: its jobs go on without the sweep's process, and another process finds them by their ids.
        interval: seconds between two calls of `poll`.
    """

    slots: int
    retries: int
    survives: bool
    interval: float

    def start(self, work: Work) -> tuple[str, str]:
        """Start a job; returns its id, and where it is, to print."""

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """The state of these jobs; one that the engine does not know has ended and is lost."""

    def cancel(self, ids: Sequence[str]) -> None:
        """Ask these jobs to save their state and end; return when they have ended."""


class Running(NamedTuple):
    """A job that waits or runs.

    Attributes:
        number: of the job.
        shown: its overrides, to print.
        work: what was started.
        id: of the engine.
        started: time of `time.monotonic()`.
        starts: how many times it was started.
        place: where it is, to print.
    """

    number: int
    shown: str
    work: Work
    id: str
    started: float
    starts: int
    place: str

    @property
    def log(self) -> Path:
        return self.work.log


class Pool:
    """The jobs of a sweep on an engine.

    Args:
        engine: starts them.
        hydra_context, task_function, config: as Hydra hands them to a launcher.
    """

    def __init__(
        self, engine: Engine, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.engine, self.hydra_context, self.task_function, self.config = engine, hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all of these jobs, as Hydra's own sweepers want it."""
        results: dict[int, JobReturn] = {}

        def ended(number: int, result: JobReturn, started: float) -> str:
            results[number] = result
            return str(returned(result))

        jobs = enumerate(job_overrides, initial_job_idx)
        self.serve(((number, overrides, " ".join(filter_overrides(overrides))) for number, overrides in jobs), ended)
        return [results[number] for number in sorted(results)]

    def serve(self, jobs: Iterable[tuple[int, Sequence[str], str]], ended: Ended) -> None:
        """Run jobs, each as soon as there is room.

        Args:
            jobs: number, overrides, and the part of them to print; the next one is taken when a slot is free.
            ended: called with number, result and start of a job after its end; its return value is printed.

        Raises:
            Interrupted: this process received a signal to end. The runs have saved their state, or go on if they
                survive and only the terminal was closed.
        """
        from hydra_plugins.detr_exp._live import Live  # imports rich, which takes time

        setup_globals()
        waiting, running = iter(jobs), dict[str, Running]()
        with Interrupt() as interrupt, Live() as live:
            try:
                while interrupt.number is None:
                    while len(running) < self.engine.slots and (job := next(waiting, None)) is not None:
                        self._begin(*job, running, live.line)
                    if not running:
                        return
                    live.show(list(running.values()))
                    time.sleep(self.engine.interval)
                    self._look(running, ended, live.line)
                raise Interrupted(interrupt.number)
            finally:
                if running and not (self.engine.survives and interrupt.number == signal.SIGHUP):
                    self.engine.cancel(list(running))

    def _begin(
        self, number: int, overrides: Sequence[str], shown: str, running: dict[str, Running], say: Callable[[str], None]
    ) -> None:
        """Start a job, or find it running."""
        run = self._found(number, overrides, shown)
        what = "still runs"
        if run is None:
            work = self._prepared(number, overrides)
            run, what = self._started(Running(number, shown, work, "", time.monotonic(), 0, "")), "started"
        running[run.id] = run
        say(f"#{number} {what} on {run.place}: {shown}")

    def _look(self, running: dict[str, Running], ended: Ended, say: Callable[[str], None]) -> None:
        """Take out the jobs that have ended, and start lost ones again."""
        states = self.engine.poll(list(running))
        for run in list(running.values()):
            state = states[run.id]
            if state.error is None:
                running[run.id] = run._replace(place=state.place)
                continue
            del running[run.id]
            answered = (run.work.folder / ANSWER).exists()
            if not answered and state.lost and run.starts <= self.engine.retries:
                say(f"#{run.number} lost on {state.place} ({state.error}); started again to go on where it was")
                again = self._started(run)
                running[again.id] = again
                continue
            say(f"#{run.number} ended: {ended(run.number, result_of(run.work.folder, state.error), run.started)}")
            shutil.rmtree(run.work.folder / JOB, ignore_errors=True)

    def _composed(self, number: int, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
        """The config of a job, and its folder."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config, (Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)).absolute()

    def _prepared(self, number: int, overrides: Sequence[str]) -> Work:
        """Write what a job needs into its folder."""
        import cloudpickle

        config, folder = self._composed(number, overrides)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).mkdir(mode=0o700, exist_ok=True)
        content = (self.hydra_context, self.task_function, config, Singleton.get_state())
        place = (os.getcwd(), [os.path.abspath(entry) for entry in sys.path])
        write(folder / TASK, pickle.dumps(place) + cloudpickle.dumps(content))
        (folder / ANSWER).unlink(missing_ok=True)
        (folder / LOG).touch()
        return work_in(folder)

    def _started(self, run: Running) -> Running:
        """Start a job."""
        (id, place), starts = self.engine.start(run.work), run.starts + 1
        if self.engine.survives:
            write(run.work.folder / STARTED, json.dumps({"id": id, "time": time.time(), "starts": starts}))
        return run._replace(id=id, starts=starts, place=place)

    def _found(self, number: int, overrides: Sequence[str], shown: str) -> Running | None:
        """The job, if an earlier process of this sweep has started it and it still runs."""
        if not self.engine.survives:
            return None
        from detr_exp.runs.past import mapping

        _, folder = self._composed(number, overrides)
        known = mapping(folder / STARTED, json.loads)
        id = known.get("id")
        if not isinstance(id, str) or (state := self.engine.poll([id])[id]).error is not None:
            return None
        started = time.monotonic() - (time.time() - known["time"])
        return Running(number, shown, work_in(folder), id, started, known["starts"], state.place)


def work_in(folder: Path) -> Work:
    """What to start for the job in a run folder."""
    command = [sys.executable, "-m", "hydra_plugins.detr_exp._job_process", str(folder / TASK), str(folder / ANSWER)]
    return Work(folder.name, command, folder, passed_on(), folder / LOG)


def passed_on() -> dict[str, str]:
    """The variables of this process that its jobs receive on other machines."""
    found = {name: value for name, value in os.environ.items() if name.upper().startswith(PASSED) and name != OWNED}
    if modules := found.get("PYTHONPATH"):  # read before the job is in the folder of the sweep's command
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, modules.split(os.pathsep)))
    return found


def result_of(folder: Path, error: BaseException) -> JobReturn:
    """The result of a job that has ended.

    Args:
        folder: of the run.
        error: how it ended, if it has left no answer.
    """
    from detr_exp.runs.past import mapping

    answer = mapping(folder / ANSWER, json.loads)
    if "value" in answer:
        return ended_with(JobStatus.COMPLETED, answer["value"])
    return ended_with(JobStatus.FAILED, JobError(answer["error"]) if "error" in answer else error)


def how_ended(code: int) -> BaseException:
    """What an exit status (negative: a signal's number) says about a job that left no answer."""
    if number := ended_by(code):
        return Interrupted(number)
    if code == NOT_SHARED:
        return JobError(
            "its machine does not see the run folder; start the sweep in a folder that all machines share, or set one: "
            "hydra.sweep.dir=..."
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
    return JobError(f"its process was ended {how}")
