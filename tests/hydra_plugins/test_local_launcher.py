"""Launchers that start processes: each run dies alone, and a sweep that is killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detr_exp import train
from detr_exp.signals import Interrupted
from hydra_plugins.detr_exp._pool import Work
from hydra_plugins.detr_exp.local_launcher import LocalLauncher, visible_gpus

APP = """
import os, signal, sys, time
from detr_exp import cli

def task(cfg):
    time.sleep(float(os.environ.get("NAP", "0")))
    if not os.environ.get("MENDED"):
        if cfg.optim.lr == 1e-3:
            raise KeyError("no such thing")
        if cfg.optim.lr == 2e-3:
            sys.exit("leaving")
        if cfg.optim.lr == 3e-3:
            os.kill(os.getpid(), signal.SIGKILL)
    print("threads", os.environ.get("OMP_NUM_THREADS"), "gpu", os.environ.get("CUDA_VISIBLE_DEVICES"))
    return 100 * cfg.optim.lr

if __name__ == "__main__":
    cli.main(task, "config", "")
"""
WORDS = ["--multirun", "tracker=none", "hydra.sweep.dir=s"]


@pytest.fixture
def app(tmp_path: Path) -> list[str]:
    (tmp_path / "app.py").write_text(APP)
    return [sys.executable, "app.py", *WORDS]


def ledger(folder: Path) -> list[dict[str, Any]]:
    path = folder / "s" / "sweep.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def swept(command: list[str], folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(
        [*command, *overrides], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_run_that_dies_takes_nothing_with_it(app: list[str], tmp_path: Path) -> None:
    overrides = ["optim.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3", "hydra/launcher=local", "hydra.launcher.slots=3"]
    done = swept(app, tmp_path, *overrides)
    lines = {line["number"]: line for line in ledger(tmp_path)}
    assert done.returncode == 1
    assert {number: line["metric"] for number, line in lines.items() if line["status"] == "ok"} == {
        3: 0.4,
        4: 0.5,
        5: 0.6,
    }
    reasons = [lines[number]["reason"] for number in (0, 1, 2)]
    assert reasons == ["KeyError: 'no such thing'", "it called sys.exit('leaving')", "its process was ended by SIGKILL"]
    ranked = [int(line.split()[0]) for line in done.stdout.split("best first")[1].splitlines()[2:8]]
    assert ranked == [5, 4, 3, 0, 1, 2]
    log = next((tmp_path / "s").glob(f"*-{lines[0]['hash']}/job.log")).read_text()
    assert "KeyError" in log, "what a run prints is in its folder"

    again = swept(app, tmp_path, *overrides, "sweep_retry=failed", MENDED="1")
    assert again.returncode == 0, again.stderr
    assert sorted(line["number"] for line in ledger(tmp_path)[6:]) == [0, 1, 2], "only what was missing"


def test_a_sweep_that_is_killed_goes_on(app: list[str], tmp_path: Path) -> None:
    command = [*app, "optim.lr=4e-3,5e-3", "hydra/launcher=local", "hydra.launcher.slots=1"]
    first = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"NAP": "2"}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not ledger(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    assert len(ledger(tmp_path)) == 1
    assert swept(command, tmp_path).returncode == 0
    assert [(line["number"], line["metric"]) for line in ledger(tmp_path)] == [(0, 0.4), (1, 0.5)]


def test_runs_share_threads_and_have_their_own_gpu(app: list[str], tmp_path: Path) -> None:
    overrides = ["optim.lr=4e-3,5e-3", "hydra/launcher=local", "hydra.launcher.threads=3"]
    swept(app, tmp_path, *overrides, CUDA_VISIBLE_DEVICES="5,7", NAP="1")
    printed = {path.read_text().strip() for path in (tmp_path / "s").glob("*/job.log")}
    assert printed == {"threads 3 gpu 5", "threads 3 gpu 7"}


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        ("0, 1", ["0", "1"]),
        ("GPU-8932f937-d72c,MIG-GPU-89/1/0", ["GPU-8932f937-d72c", "MIG-GPU-89/1/0"]),
        ("2,-1,3", ["2"]),
        ("NoDevFiles", []),
        ("none", []),
        ("-1", []),
    ],
)
def test_gpus_are_those_that_cuda_sees(value: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == gpus


def test_the_pool_fits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert LocalLauncher(None, None).slots == max(1, cores // 2)
    assert LocalLauncher(cores, None).threads == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert LocalLauncher(None, None).slots == 3


def test_being_asked_to_end_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def jobs() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from ()

    launcher = LocalLauncher(1, None)
    launcher.setup(hydra_context=None, task_function=None, config=None)
    assert launcher.serve(jobs(), lambda *_: "") is None, "there was nothing to end"

    def endless() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        yield 0, ["x"], "x"

    work = Work("x", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, {}, tmp_path / "log")
    monkeypatch.setattr(launcher.pool, "_prepared", lambda *_: work)
    with pytest.raises(Interrupted):
        launcher.serve(endless(), lambda *_: "")
    (child,) = launcher.children.values()
    assert child.process.returncode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "lost"),
    [
        (["hydra/launcher=submitit_local"], {2}),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], set()),
    ],
    ids=["submitit", "joblib"],
)
def test_other_launchers_keep_the_ledger_too(
    app: list[str], tmp_path: Path, overrides: list[str], lost: set[int]
) -> None:
    """A killed process: submitit's others go on; joblib gives up, and the next start does the rest."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher" if lost else "hydra_plugins.hydra_joblib_launcher")
    sweep = "optim.lr=1e-3,2e-3,3e-3,4e-3" if lost else "optim.lr=1e-3,2e-3,4e-3,5e-3"
    done = swept(app, tmp_path, *overrides, sweep)
    assert done.returncode == 1
    statuses = {line["number"]: line["status"] for line in ledger(tmp_path)}
    assert {number for number, status in statuses.items() if status == "killed"} == lost
    assert [statuses[number] for number in (0, 1)] == ["failed", "failed"]
    assert statuses[3] == "ok"
    again = swept(app, tmp_path, *overrides, sweep, "sweep_retry=failed", MENDED="1")
    assert again.returncode == 0, again.stderr
    assert sorted(line["number"] for line in ledger(tmp_path)[4:]) == sorted({0, 1} | lost)


@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm", "joblib"])
def test_the_numbers_of_a_launcher_may_stand_beside_references(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str], launcher: str
) -> None:
    """A sweep's own checks come after those of its launcher, whose keys refer to the sweep's folder."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="optional")
    assert command(train.main, "--multirun", f"hydra/launcher={launcher}", "seed=0,1", "hydra.sweep.subdir=x") == 2
    assert "hydra.sweep.subdir cannot be set" in capfd.readouterr().err
