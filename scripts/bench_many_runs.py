"""What the runs of a sweep of thousands cost beside themselves: plan, ledger and table.

python scripts/bench_many_runs.py [--rounds 1] [--dry]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from measure import Row, Section, run

COUNTS = (100, 1_000, 10_000)
GATE = 1.5
TEXT = """
Stand-in runs that train nothing: a grid on a launcher whose runs end at once. Each is planned, given to the launcher,
recorded in the ledger by itself, read from there by the sweep, printed, and ranked in the table. A value is what one
run costs among the most, divided by what one costs among a hundred: 1 is flat, and a cost that grows with the square of
the runs would be 100. CPU time and the highest resident memory, less those of the same process with two runs. The check
of all values before the first run starts is left out: it composes one config for every value of a swept key, at 80 ms.
"""
SWEEP = """
import time
from hydra.core.utils import JobStatus
from detr_exp import cli
from detr_exp.config.hydra_private import ended_with
from hydra_plugins.detr_exp._ledger import Ledger
from hydra_plugins.detr_exp._pool import Pool

def at_once(pool, jobs, ended):
    task = pool.task_function
    of_runs = Ledger(task.folder)
    for number, overrides, shown in jobs:
        of_runs.record(task.jobs[next(reversed(task.jobs))], time.monotonic(), "ok", number / 1e6)
        print(f"#{number} ended: {ended(number, ended_with(JobStatus.COMPLETED, 0.5), time.monotonic())}")

Pool.serve = at_once
cli.grid.refuse_before_start = lambda *_: None  # it composes once for every value, not for every run
cli.main(lambda cfg: 0.5, "config", "")
"""
MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss, done.returncode)
"""


class Cost(NamedTuple):
    """CPU seconds and kilobytes."""

    seconds: float
    kilobytes: float


def cost_of(folder: str, *words: str) -> Cost:
    """Of a Python process.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", MEASURED, sys.executable, *words]
    said = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    if said[2] != "0":
        raise RuntimeError(f"{words[:1]} ended with {said[2]}")
    return Cost(float(said[0]), float(said[1]))


def sweep(count: int) -> Cost:
    words = ["--multirun", "tracker=none", "hydra.sweep.dir=s", f"seed=range({count})"]
    with tempfile.TemporaryDirectory() as folder:
        return cost_of(folder, "-c", SWEEP, *words, "hydra/launcher=local")


def bench(rounds: int) -> Section:
    none, each = sweep(2), []
    for count in COUNTS:
        found = [sweep(count) for _ in range(rounds)]
        least = Cost(min(one.seconds for one in found), min(one.kilobytes for one in found))
        each.append(Cost((least.seconds - none.seconds) / count, (least.kilobytes - none.kilobytes) / count))
    return section(each)


def section(each: Sequence[Cost]) -> Section:
    """What to say about the costs of a run among each of `COUNTS`."""
    shown = " / ".join(f"{count:,}" for count in COUNTS)
    times = " / ".join(f"{one.seconds * 1e3:.2f}" for one in each) + " ms"
    sizes = " / ".join(f"{one.kilobytes:.1f}" for one in each) + " kB"
    of_time, of_size = (large / small for large, small in zip(each[-1], each[0]))
    rows = [
        Row(f"CPU time of a run among {shown}", of_time, f"among {COUNTS[0]}", GATE, times),
        Row("memory of the sweep for a run", of_size, f"among {COUNTS[0]}", GATE, sizes),
    ]
    return Section("Thousands of runs", rows, TEXT, packages=("hydra-core",))


if __name__ == "__main__":
    sys.exit(run("many_runs", bench, __doc__, rounds=1))
