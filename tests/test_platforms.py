"""A system without what only some have: no `flock`, no SIGHUP, SIGUSR1 and SIGKILL, workers that are spawned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# at the top, since spawned workers run it too
WITHOUT = """
import multiprocessing, os, runpy, signal, sys
sys.modules["fcntl"] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"):
    delattr(signal, name)
for name in ("killpg", "sched_getaffinity"):
    delattr(os, name)
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.argv = ["train", *sys.argv[1:]]
    runpy.run_module("detr_exp.train", run_name="__main__")
"""


def test_a_sweep_runs_without_locks_and_signals_of_unix_and_with_spawned_workers(tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text(WITHOUT)
    words = [
        "--multirun",
        "seed=0,1",
        "model=rtdetrv2_tiny",
        "model.image_size=[64,64]",
        "model.num_queries=20",
        "data.train=2",
    ]
    words += [
        "data.val=2",
        "data.test=0",
        "data.num_workers=1",
        "trainer.epochs=1",
        "trainer/hardware=cpu",
        "tracker=none",
    ]
    words += ["trainer.batch_size=2", "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [sys.executable, "without.py", *words], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "files *.held guard it instead" in done.stdout + done.stderr
    assert len(list((tmp_path / "sweep").glob("*/checkpoint.pth"))) == 2
    assert not list(tmp_path.rglob("*.held")), "a lock ends with its block"
