"""One SLURM job for each run of a sweep; `conf/hydra/launcher/slurm.yaml` explains the settings.

A job saves and is queued again before its time limit and when a job of higher priority needs its place; SLURM queues it
again when its machine dies. Each time it resumes in its folder. The sweep's own process only submits and watches.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from signal import valid_signals
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from detr_exp.config.mistakes import ConfigError
from detr_exp.signals import OWNED, ended_by
from detr_exp.terminal import say
from hydra_plugins.detr_exp._job_process import NOT_SHARED
from hydra_plugins.detr_exp._pool import Ended, Pool, State, Work, how_ended
from hydra_plugins.detr_exp._recorded import JobError, LostError

# USR1 comes before the time limit, only to this shell; TERM at a cancellation or preemption. Status 75: it has saved
# after USR1. A job whose limit is too short to save anything is not queued again for ever.
SCRIPT = """#!/bin/bash
cd {folder} || exit 72
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$SLURM_CPUS_ON_NODE}}"
{command} &
process=$!
for name in USR1 TERM; do trap "kill -$name $process" "$name"; done
status=0
while kill -0 "$process" 2>/dev/null; do wait "$process"; status=$?; done
if [ "$status" -eq 75 ] && {{ [ -e checkpoint.pth ] || [ "${{SLURM_RESTART_COUNT:-0}}" -lt 3 ]; }}; then
  scontrol requeue "$SLURM_JOB_ID" || status=69
fi
exit "$status"
"""
NOT_QUEUED = 69  # exit status of a job that has saved, and whose machine has no scontrol that works
# options of sbatch that this launcher sets, or that contradict one job of one process for each run
OURS = {
    **dict.fromkeys(("signal",), "set hydra.launcher.save_seconds=..."),
    **dict.fromkeys(("array",), "set hydra.launcher.slots=..."),
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "a run is one job on one machine; drop it"),
    **dict.fromkeys(("output", "error", "open-mode"), "the log is job.log in the run folder; drop it"),
    **dict.fromkeys(("job-name", "parsable", "wrap", "chdir", "wait"), "the launcher sets it; drop it"),
    **dict.fromkeys(("requeue", "no-requeue", "export", "export-file"), "the launcher sets it; drop it"),
}
ENDED = {  # states in which SLURM does nothing more with a job -> (it may be started again, why it ended)
    "COMPLETED": (False, "it ended without a result"),
    "FAILED": (False, ""),
    "CANCELLED": (False, "its SLURM job was cancelled"),
    "DEADLINE": (False, "its SLURM job reached its deadline"),
    "OUT_OF_MEMORY": (False, "out of memory: it used more than SLURM had granted"),
    "TIMEOUT": (True, "its time limit was over before it had saved"),
    "NODE_FAIL": (True, "its machine failed"),
    "BOOT_FAIL": (True, "its machine did not start"),
    "PREEMPTED": (True, "its SLURM job was preempted"),
    "REVOKED": (True, "its SLURM job was revoked"),
}
SIBLINGS = ("SLURM_", "SBATCH_ARRAY", "CUDA_VISIBLE_DEVICES", "TMPDIR", OWNED)  # of a job that starts the sweep
NO_LOG = 53  # the number of a signal in the exit code of a job whose log could not be opened on its machine
FORMAT = "%i|%T|%N|%r|%j"
TRIES = 20  # attempts of sbatch while the controller is busy or a limit is reached
PAUSE = 15.0  # seconds between them
BUSY = re.compile(r"timed out|timeout|unable to contact|connect|temporar|limit|try again|not respond", re.IGNORECASE)


class Listed(NamedTuple):
    """A line of squeue."""

    id: str
    state: str
    machine: str
    reason: str
    name: str


class SlurmLauncher(Launcher):
    """Runs jobs of a sweep on a SLURM cluster.

    Args:
        sbatch: its options: name -> value; true for one without a value; None: not given.
        save_seconds: before the time limit in which a job saves and is queued again.
        slots: jobs in the queue at once; None: all.
        interval: seconds between two calls of squeue.

    Raises:
        ConfigError: an option that does not fit, or too short a time limit.
    """

    retries, survives = 3, True

    def __init__(self, sbatch: Mapping[str, Any], save_seconds: int, slots: int | None, interval: float) -> None:
        given = {name: value for name, value in sbatch.items() if value not in (None, False)}
        for name in given:
            refuse_option(name)
        refuse_short(given.get("time"), save_seconds)
        self.slots, self.interval, self.held = slots or sys.maxsize, interval, set[str]()
        self.options = [f"--signal=B:USR1@{save_seconds}", "--requeue", "--open-mode=append", "--export=ALL"]
        self.options += ["--parsable", "--ntasks=1"]
        self.options += [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        missing = [name for name in ("sbatch", "squeue", "scancel", "scontrol") if shutil.which(name) is None]
        if missing:
            raise ConfigError(
                f"hydra/launcher=slurm needs {', '.join(missing)}, which is not on the PATH; start the sweep on a "
                "machine of a SLURM cluster, or on this one: hydra/launcher=local"
            )
        self.pool = Pool(self, hydra_context, task_function, config)
        # an earlier process may have been killed before it noted the id of a job
        self.known = {one.name: one for one in listed() or [] if one.state not in ENDED}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.pool.launch(job_overrides, initial_job_idx)

    def serve(self, jobs: Iterable[tuple[int, Sequence[str], str]], ended: Ended) -> None:
        self.pool.serve(jobs, ended)

    def start(self, work: Work) -> tuple[str, str]:
        """Submit a job, unless it is there.

        Raises:
            ConfigError: sbatch refuses it.
        """
        name = name_of(work)
        script = SCRIPT.format(folder=shlex.quote(str(work.folder)), command=shlex.join(work.command))
        command = [
            "sbatch",
            *self.options,
            f"--job-name={name}",
            f"--output={literal(work.log)}",
            f"--chdir={work.folder}",
        ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(SIBLINGS)}
        environment |= {key: os.environ[key] for key in ("SLURM_CONF", "SLURM_CLUSTERS") if key in os.environ}
        known = self.known.pop(name, None)
        if known is not None and self.poll([known.id])[known.id].error is not None:
            known = None  # it has ended since
        for attempt in range(TRIES):
            if known is not None:
                return known.id, place_of(known)
            done = subprocess.run(
                command, input=script, env=environment | work.environment, capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return done.stdout.strip().partition(";")[0], "the queue"
            if not BUSY.search(done.stderr) or attempt + 1 == TRIES:
                break
            time.sleep(PAUSE)
            # a controller that answers too late may have accepted the job
            known = next((one for one in listed() or [] if one.name == name and one.state not in ENDED), None)
        raise ConfigError(
            f"sbatch refused a job: {done.stderr.strip()[:300]}; give options that the cluster accepts: "
            "hydra.launcher.sbatch.partition=..., account, time, mem"
        )

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        jobs = listed()
        if jobs is None:  # which says nothing about the jobs
            return dict.fromkeys(ids, State("SLURM does not answer"))
        for one in jobs:
            if one.id in ids and "held" in one.reason.lower() and one.id not in self.held:
                self.held.add(one.id)
                say(f"warning: SLURM holds job {one.id} ({one.reason}); let it run: scontrol release {one.id}")
        known = {one.id: one for one in jobs}
        return {id: state_of(known[id]) if id in known else forgotten(id) for id in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        subprocess.run(["scancel", *ids], capture_output=True, check=False)
        while any(state.error is None for state in self.poll(ids).values()):
            time.sleep(1.0)


def refuse_short(limit: object, save_seconds: int) -> None:
    """Refuse a time limit that cannot be read, or that leaves no time to train.

    Raises:
        ConfigError: see above.
    """
    if limit is None:
        return
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d?):(\d\d?)", str(limit))
    if match is None:
        raise ConfigError(
            f"hydra.launcher.sbatch.time is {limit!r}; write hours:minutes:seconds or days-hours:minutes:seconds, in "
            "quotes in files, where 24:00:00 is a number: hydra.launcher.sbatch.time='24:00:00'"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < save_seconds + 120:
        raise ConfigError(
            f"hydra.launcher.sbatch.time is {limit}, of which {save_seconds} s are to save, and SLURM sends its signal "
            "up to 60 s early; use a longer limit, or less time to save: hydra.launcher.save_seconds=60"
        )


def refuse_option(name: str) -> None:
    """
    Raises:
        ConfigError: it is no long option of sbatch, or one that the launcher sets.
    """
    if not re.fullmatch("[a-z][a-z0-9-]+", name):
        raise ConfigError(
            f"hydra.launcher.sbatch has {name!r}; use the long names of sbatch's options without their dashes: "
            "hydra.launcher.sbatch.partition=gpu"
        )
    if name in OURS:
        raise ConfigError(f"hydra.launcher.sbatch.{name} contradicts this launcher: {OURS[name]}")


def name_of(work: Work) -> str:
    """A job's name, by which it is found again: that of its sweep and of its run, and a hash of its folder."""
    sweep = re.sub(r"[^A-Za-z0-9_.+-]", "_", work.folder.parent.name)
    return f"{sweep}-{work.name}-{hashlib.sha256(str(work.folder).encode()).hexdigest()[:8]}"


def literal(path: os.PathLike[str]) -> str:
    """A path in which sbatch replaces nothing."""
    return str(path).replace("\\", r"\\").replace("%", "%%")


def listed() -> list[Listed] | None:
    """This user's jobs, those of the last minutes included; None if SLURM does not answer."""
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", f"--format={FORMAT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return [Listed(*line.split("|", 4)) for line in done.stdout.splitlines() if line.count("|") >= 4]


def place_of(job: Listed) -> str:
    return job.machine or f"the queue ({job.reason})"


def state_of(job: Listed) -> State:
    """The state of a job that SLURM knows."""
    if job.state not in ENDED or job.state == "PREEMPTED":  # as long as it is listed, it may be queued again
        return State(place_of(job))
    code = "0:0"
    if job.state == "FAILED":
        shown = subprocess.run(["scontrol", "show", "job", job.id], capture_output=True, text=True, check=False).stdout
        code = (re.search(r"\bExitCode=(\S+)", shown) or ["", "1:0"])[1]
    return ended(job.state, code, job.machine)


def forgotten(id: str) -> State:
    """The state of a job that squeue no longer lists: that of the accounting, where there is one."""
    if shutil.which("sacct") is not None:
        command = ["sacct", "-n", "-X", "-P", "-j", id, "-o", "State,ExitCode,NodeList"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        if lines:
            state, code, machine = lines[-1].split("|", 2)
            state = state.split()[0]  # "CANCELLED by 1000"
            if state in ENDED:
                return ended(state, code, machine)
    return State("the queue", LostError("SLURM no longer knows its job"), lost=True)


def ended(state: str, code: str, machine: str) -> State:
    """The state of a job that has ended.

    Args:
        state: of SLURM.
        code: `exit status:signal`.
        machine: on which it ran.
    """
    lost, reason = ENDED[state]
    if state == "FAILED":
        status, number = (int(part) for part in code.split(":"))
        if status > 128 and not ended_by(status):
            status, number = 0, status - 128  # as the shell says that a signal ended its process
        if number == NO_LOG:
            status, number = NOT_SHARED, 0
        elif status == NOT_QUEUED:
            return State(
                machine, LostError("it has saved, but its machine has no scontrol to queue it again"), lost=True
            )
        elif number not in (0, *valid_signals()):
            return State(machine, JobError(f"SLURM reports the exit code {code}"))
        return State(machine, how_ended(-number if number else status))
    error = JobError(reason) if state in ("COMPLETED", "OUT_OF_MEMORY") else LostError(reason)
    return State(machine, error, lost)
