"""A system without what only some have: no `flock`, no SIGHUP, SIGUSR1 and SIGKILL, workers that are spawned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_a_training_runs_without_locks_and_signals_of_unix_and_with_spawned_workers(
    tmp_path: Path, tiny_run: list[str]
) -> None:
    (tmp_path / "without.py").write_text(WITHOUT)
    words = [word for word in tiny_run if not word.startswith(("data.num_workers", "trainer.epochs"))]
    words += ["data.num_workers=1", "trainer.epochs=1", "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, "without.py", *words], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "files *.held guard it instead" in done.stdout + done.stderr
    assert (tmp_path / "run" / "checkpoint.pth").exists()
    assert not list(tmp_path.rglob("*.held")), "a lock ends with its block"
