"""One process for each run of a sweep, on a pool of GPUs or of shares of the processor, with a live table.

A run that dies does not affect others, each returns its memory to the system, and runs do not wait for each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from detr_exp.config.hydra_private import ended_with, returned
from detr_exp.signals import OWNED, Interrupt, Interrupted, ended_by
from hydra_plugins.detr_exp._recorded import JobError

LOG = "job.log"  # in the run folder: the output of a run
GRACE = 60.0  # seconds for runs to save their state when the sweep receives a signal to end
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
Ended = Callable[[int, JobReturn, float], str]


class Running(NamedTuple):
    """A running job.

    Attributes:
        number: of the job.
        shown: its overrides, to print.
        slot: its index in the pool.
        place: name of its GPU or slot, to print.
        process: its standard input stays open as long as this process lives.
        log: what it prints.
        answer: the file for its result.
        started: time of `time.monotonic()`.
    """

    number: int
    shown: str
    slot: int
    place: str
    process: subprocess.Popen[bytes]
    log: Path
    answer: Path
    started: float


class LocalLauncher(Launcher):
    """Runs jobs of a sweep on this machine.

    Args:
        slots: runs at once; None: one for each GPU, or without one for every two processor cores.
        threads: of a run, on the processor; None: the cores divided by the slots.
    """

    def __init__(self, slots: int | None, threads: int | None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.gpus = visible_gpus()
        self.slots = slots or len(self.gpus) or max(1, cores // 2)
        self.threads = threads or max(1, cores // self.slots)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        results: dict[int, JobReturn] = {}

        def ended(number: int, result: JobReturn, started: float) -> str:
            results[number] = result
            return str(returned(result))

        jobs = enumerate(job_overrides, initial_job_idx)
        self.serve(((number, overrides, " ".join(filter_overrides(overrides))) for number, overrides in jobs), ended)
        return [results[number] for number in sorted(results)]

    def serve(self, jobs: Iterable[tuple[int, Sequence[str], str]], ended: Ended) -> None:
        """Run jobs, each in the first free slot of the pool.

        Args:
            jobs: number, overrides, and the part of them to print; the next one is taken when a slot is free.
            ended: called with number, result and start of a job after its end; its return value is printed.

        Raises:
            Interrupted: this process received a signal to end; the runs have saved their state.
        """
        from hydra_plugins.detr_exp._live import Live  # imports rich, which takes time

        setup_globals()
        waiting, running = iter(jobs), list[Running]()
        with tempfile.TemporaryDirectory() as scratch, Interrupt() as interrupt, Live() as live:
            try:
                while interrupt.number is None:
                    while len(running) < self.slots and (job := next(waiting, None)) is not None:
                        slot = min(set(range(self.slots)) - {run.slot for run in running})
                        running.append(self._start(*job, slot, Path(scratch)))
                        live.line(f"#{job[0]} started on {running[-1].place}: {job[2]}")
                    if not running:
                        return
                    live.show(running)
                    time.sleep(0.1)
                    for run in [run for run in running if run.process.poll() is not None]:
                        running.remove(run)
                        live.line(f"#{run.number} ended: {ended(run.number, result_of(run), run.started)}")
                raise Interrupted(interrupt.number)
            finally:
                end(running)

    def _start(self, number: int, overrides: Sequence[str], shown: str, slot: int, scratch: Path) -> Running:
        """Start the process of a job."""
        import cloudpickle

        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
        folder.mkdir(parents=True, exist_ok=True)
        task, answer = scratch / f"{number}.pkl", scratch / f"{number}.json"
        with open(task, "wb") as file:
            pickle.dump(sys.path, file)
            cloudpickle.dump((self.hydra_context, self.task_function, config, Singleton.get_state()), file)
        environment = os.environ | dict.fromkeys(THREADS, str(self.threads)) | {OWNED: "1"}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        with open(folder / LOG, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "hydra_plugins.detr_exp._job_process", str(task), str(answer)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C goes to the sweep, which ends its runs
            )
        place = f"GPU {environment['CUDA_VISIBLE_DEVICES']}" if self.gpus else f"slot {slot}"
        return Running(number, shown, slot, place, process, folder / LOG, answer, time.monotonic())


def result_of(run: Running) -> JobReturn:
    """The result of a process that has ended."""
    if run.answer.exists():
        answer = json.loads(run.answer.read_text(encoding="utf-8"))
        if "error" in answer:
            return ended_with(JobStatus.FAILED, JobError(answer["error"]))
        return ended_with(JobStatus.COMPLETED, answer["value"])
    code = run.process.returncode
    if number := ended_by(code):
        return ended_with(JobStatus.FAILED, Interrupted(number))
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
    return ended_with(JobStatus.FAILED, JobError(f"its process was ended {how}"))


def end(running: Sequence[Running]) -> None:
    """Send runs a signal to end after saving their state; kill those that do not end in time."""
    for run in running:
        run.process.terminate()
    deadline = time.monotonic() + GRACE
    for run in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(max(0.0, deadline - time.monotonic()))
        run.process.kill()
        run.process.wait()


def visible_gpus() -> list[str]:
    """GPUs for `CUDA_VISIBLE_DEVICES`, found without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)
    return listed.stdout.split() if listed.returncode == 0 else []
