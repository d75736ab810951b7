"""What the runs of a sweep of thousands cost beside themselves: plan, ledger and table, report, MLflow's store.

python scripts/bench_many_runs.py [--rounds 1] [--dry]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

from measure import Row, Section, run

COUNTS, OF_MLFLOW = (100, 1_000, 10_000), (100, 500, 2_000)
GATE = 1.5
TEXT = """
Stand-in runs that train nothing. A value is what one run costs among the most, divided by what one costs among a
hundred: 1 is flat, and a cost that grows with the square of the runs would be 100. CPU time and the highest resident
memory, less those of the same process with two runs.

- *Sweep*: a grid of seeds on a launcher whose runs end at once. The values are checked, and each run is planned, given
  to the launcher, recorded in the ledger by itself, read from there by the sweep, printed, and ranked in the table.
- *Report*: the page about run folders with five seeds each, a learning rate that is nearly always another one, seven
  weight decays, networks of other sizes and times, and ten evaluations.
- *MLflow*: the sweep again, whose runs are created in a sqlite store below the sweep's, with parameters, tags and
  config, log one line and are ended, in one process.

Beyond: the times stay per run, but of 10,000 runs the report takes two minutes and three quarters of a gigabyte, much
of it to parse the `config.yaml` of each, and its page has 0.8 MB for every 1,000: report parts of a sweep
(`runs=[...]`). A store in a sqlite file lets one run write at a time: use a server, or PostgreSQL. What a scheduler
permits at once is kept by `hydra.launcher.slots`.
"""
TASK = """
import os, time
from pathlib import Path
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf
from detr_exp.runs.swept import folder_of
from detr_exp import cli
from detr_exp.config.compose import compose
from detr_exp.config.hydra_private import ended_with
from detr_exp.tracker.tracker import Tracker
from hydra_plugins.detr_exp._ledger import Ledger
from hydra_plugins.detr_exp._pool import Pool

def track(folder, config, overrides):
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    tracker = Tracker(**{key: value for key, value in config["tracker"].items() if key != "_target_"})
    tracker.start(run_dir=folder, config=config, choices={"model": "rtdetrv2"}, overrides=overrides)
    tracker.log(1, {"val/mAP": 0.5})
    tracker.finish()

def at_once(pool, jobs, ended):
    task = pool.task_function
    os.environ |= task.environment
    of_runs, words = Ledger(task.folder), pool.config.hydra.overrides.task[:2]
    config = OmegaConf.to_container(compose(words), resolve=True)
    for number, overrides, shown in jobs:
        job = task.jobs[next(reversed(task.jobs))]
        if config["tracker"]["tracking_uri"]:
            track(folder_of(task.folder, job.hash, job.swept), config | {"seed": number}, job.overrides)
        of_runs.record(job, time.monotonic(), "ok", number / 1e6)
        print(f"#{number} ended: {ended(number, ended_with(JobStatus.COMPLETED, 0.5), time.monotonic())}")

Pool.serve = at_once
cli.main(lambda cfg: 0.5, "config", "")
"""
FOLDERS = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
from detr_exp.config.compose import compose
from detr_exp.tracker.base import RunRecord

config = OmegaConf.to_yaml(compose(["seed=-7", "optim.lr=-8", "optim.weight_decay=-9"]), resolve=True)
for number in range(int(sys.argv[1])):
    seed, point = number % 5, number // 5
    folder, rate, decay = Path("s", f"{number:010x}"), 1e-5 * (1 + point % 997), 1e-5 * (1 + point % 7)
    folder.mkdir(parents=True)
    text = config.replace(" -7\\n", f" {seed}\\n").replace(" -8\\n", f" {rate}\\n").replace(" -9\\n", f" {decay}\\n")
    (folder / "config.yaml").write_text(text)
    words = [f"seed={seed}", f"optim.lr={rate}", f"optim.weight_decay={decay}"]
    tags = {"parameters": str(20_000_000 + point), "hardware": "2 cores"}
    record = RunRecord(f"{number:032x}", "p", f"s/{number}", tags=tags, words=words, status="ok", seconds=60.0)
    record.save(folder)
    lines = [
        {"step": 10 * epoch, "val/epoch": epoch, "train/epoch": epoch, "train/loss": 9 - epoch, "time": 60.0 * epoch,
         "val/mAP": number * 7919 % 10007 / 1e5 + epoch / 100, "time/val_network_ms": 10 + point / 100 + epoch / 10}
        for epoch in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
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


def sweep(count: int, *store: str) -> Cost:
    words = [*(store or ("tracker=none", "trainer.epochs=1")), "hydra.sweep.dir=s", f"seed=range({count})"]
    with tempfile.TemporaryDirectory() as folder:
        return cost_of(folder, "-c", TASK, "--multirun", *words, "hydra/launcher=local")


def with_mlflow(count: int) -> Cost:
    return sweep(count, "tracker=mlflow", "tracker.tracking_uri=sqlite:///mlflow.db")


def report(count: int) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", FOLDERS, str(count)], cwd=folder, check=True)
        return cost_of(folder, "-m", "detr_exp.report", "runs=s", "hydra.run.dir=r")


PARTS: dict[str, tuple[Callable[[int], Cost], Sequence[int]]] = {
    "sweep": (sweep, COUNTS),
    "report": (report, COUNTS),
    "MLflow": (with_mlflow, OF_MLFLOW),
}


def bench(rounds: int) -> Section:
    found = {}
    for name, (part, counts) in PARTS.items():
        least = [min_of([part(count) for _ in range(rounds)]) for count in (2, *counts)]
        found[name] = [
            Cost(*((value - none) / count for value, none in zip(cost, least[0])))
            for cost, count in zip(least[1:], counts)
        ]
    return section(found)


def min_of(costs: Sequence[Cost]) -> Cost:
    return Cost(*map(min, zip(*costs)))


def section(found: dict[str, list[Cost]]) -> Section:
    """What to say about the costs of a run among each of the counts, by part."""
    rows = []
    for name, each in found.items():
        counts = PARTS[name][1]
        shown = " / ".join(f"{count:,}" for count in counts)
        times = " / ".join(f"{one.seconds * 1e3:.2f}" for one in each) + " ms"
        sizes = " / ".join(f"{one.kilobytes:.1f}" for one in each) + " kB"
        of_time, of_size = (large / small for large, small in zip(each[-1], each[0]))
        rows += [
            Row(f"{name}: CPU time of a run among {shown}", of_time, f"among {counts[0]}", GATE, times),
            Row(f"{name}: memory for a run", of_size, f"among {counts[0]}", GATE, sizes),
        ]
    return Section("Thousands of runs", rows, TEXT, packages=("hydra-core", "mlflow"))


if __name__ == "__main__":
    sys.exit(run("many_runs", bench, __doc__, rounds=1))
