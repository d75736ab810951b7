"""Sweep commands on a SLURM cluster, and what their jobs did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from slurm_cluster import SlurmCluster, wait_for

HERE = Path(__file__).parent
LIMIT = 900.0  # seconds for a sweep of some seconds on a busy machine

# instead of a training: counts to ten, slowly while there is a file `hold`, and saves when it receives a signal
APP = """
import os, signal, sys, time
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from detr_exp import cli
from detr_exp.signals import Interrupt, Interrupted

def task(cfg):
    if cfg.seed == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.seed == 101:
        raise KeyError("no such thing")
    folder = Path(HydraConfig.get().runtime.output_dir)
    state, passed = folder / "checkpoint.pth", ["MINE", "SLURM_NTASKS", "OMP_NUM_THREADS"]
    count = int(state.read_text()) if state.exists() else 0
    print("from", count, [os.environ.get(name) for name in passed], os.getcwd(), flush=True)
    with Interrupt() as interrupt:
        while count < 10:
            count += 1
            (folder / f"{count}").touch()
            time.sleep(0.05)
            while Path("hold").exists() and count >= 2 and interrupt.number is None:
                time.sleep(0.05)
            state.write_text(str(count))
            if interrupt.number is not None:
                raise Interrupted(interrupt.number)
    return float(cfg.seed)

if __name__ == "__main__":
    cli.main(task, "config", "")
"""
APP_WORDS = ["app.py", "--multirun", "tracker=none", "hydra.sweep.dir=s"]
LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.sbatch.cpus-per-task=1", "hydra.launcher.interval=0.5"]


class Sweep:
    """A sweep command in a folder, and the jobs in its queue."""

    def __init__(self, slurm: SlurmCluster, folder: Path, *words: str) -> None:
        self.slurm, self.folder = slurm, folder
        self.command = [sys.executable, *words]
        self.environment = os.environ | slurm.environment | {"PYTHONPATH": str(HERE), "MINE": "yes"}
        # as in a job from which the sweep is started
        self.environment |= {"SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "100", "SLURM_NTASKS": "7"}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with open(self.folder / "sweep.log", "a") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                text=True,
                preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # also under nohup
            )

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(LIMIT)

    def end(self) -> int:
        """The exit status; requeued jobs start soon."""

        def is_over() -> bool:
            self.slurm.hurry()
            return self.process.poll() is not None

        wait_for(is_over, LIMIT, self.log())
        return self.process.returncode

    def log(self) -> str:
        return (self.folder / "sweep.log").read_text()

    def ledger(self) -> list[dict[str, Any]]:
        path = self.folder / "s" / "sweep.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def jobs(self) -> dict[str, list[str]]:
        """Run folder -> ids of the jobs that were ever submitted for it."""
        lines = self.slurm.run("squeue", "-h", "--states=all", "--sort=i", "-o", "%i %j").splitlines()
        pairs = [line.split() for line in lines]
        return {
            name: [id for id, job in pairs if f"s-{name}-" in job and self.slurm.field(id, "WorkDir") == str(folder)]
            for name, folder in ((path.name, path) for path in self.runs())
        }

    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("s/*/job.log"))

    def wait_for_files(self, name: str, count: int) -> None:
        """Wait until so many run folders have a file of this name."""
        pattern = f"s/[!.]*/{name}"  # submitit has a folder for each job in a hidden one
        wait_for(lambda: len(list(self.folder.glob(pattern))) == count or not self.is_fine(), LIMIT, pattern)
        assert self.is_fine(), self.log()

    def is_fine(self) -> bool:
        return self.process.poll() is None
