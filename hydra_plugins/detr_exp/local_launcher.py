"""One process for each run of a sweep, on a pool of GPUs or of shares of the processor, with a live table.

A run that dies does not affect others, each returns its memory to the system, and runs do not wait for each other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from detr_exp.signals import OWNED
from hydra_plugins.detr_exp._pool import GRACE, THREADS, Ended, Pool, State, Work, how_ended

GPU = re.compile("[0-9]+|(GPU|MIG)-.+")


class Child(NamedTuple):
    """A process of this sweep.

    Attributes:
        slot: its index in the pool.
        place: name of its GPU or slot, to print.
        process: its standard input stays open as long as the sweep's process lives.
    """

    slot: int
    place: str
    process: subprocess.Popen[bytes]


class LocalLauncher(Launcher):
    """Runs jobs of a sweep on this machine.

    Args:
        slots: runs at once; None: one for each GPU, or without one for every two processor cores.
        threads: of a run, on the processor; None: the cores divided by the slots.
    """

    retries, survives, interval = 0, False, 0.1

    def __init__(self, slots: int | None, threads: int | None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.gpus = visible_gpus()
        self.slots = slots or len(self.gpus) or max(1, cores // 2)
        self.threads = threads or max(1, cores // self.slots)
        self.children: dict[str, Child] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.pool = Pool(self, hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.pool.launch(job_overrides, initial_job_idx)

    def serve(self, jobs: Iterable[tuple[int, Sequence[str], str]], ended: Ended) -> None:
        self.pool.serve(jobs, ended)

    def start(self, work: Work) -> tuple[str, str]:
        slot = min(set(range(self.slots)) - {child.slot for child in self.children.values()})
        environment = os.environ | dict.fromkeys(THREADS, str(self.threads)) | {OWNED: "1"}
        place = f"slot {slot}"
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
            place = f"GPU {environment['CUDA_VISIBLE_DEVICES']}"
        with open(work.log, "ab") as log:
            process = subprocess.Popen(
                work.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C goes to the sweep, which ends its runs
            )
        self.children[str(process.pid)] = Child(slot, place, process)
        return str(process.pid), place

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        states = {}
        for id in ids:
            child = self.children[id]
            code = child.process.poll()
            states[id] = State(child.place, None if code is None else how_ended(code))
            if code is not None:
                del self.children[id]
        return states

    def cancel(self, ids: Sequence[str]) -> None:
        """Kills those that do not end in time."""
        processes = [self.children[id].process for id in ids if id in self.children]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()


def visible_gpus() -> list[str]:
    """GPUs for `CUDA_VISIBLE_DEVICES`, found without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        # CUDA sees those before the first that is none, such as the `NoDevFiles` of SLURM
        names = (name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(","))
        return list(itertools.takewhile(GPU.fullmatch, names))
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)
    return listed.stdout.split() if listed.returncode == 0 else []
