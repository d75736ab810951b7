"""Trainings on two ranks as a shell starts them: signals, deaths, sweeps, torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from detr_exp import launch
from detr_exp.config.mistakes import ConfigError
from detr_exp.signals import Interrupted
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import distributed
from detr_exp.trainer.heartbeat import PeerSilentError
from detr_exp.trainer.run_status import PrunedError

TRAIN = [sys.executable, "-m", "detr_exp.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "detr_exp.train"]
RANKS = "trainer.hardware.devices=2"
LONG = ["trainer.epochs=1000", "trainer.max_steps=2000", "trainer.log_every_steps=1", "trainer.eval_interval=1000"]


def start(folder: Path, command: list[str], *words: str) -> subprocess.Popen[str]:
    there = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *words], cwd=folder, env=there, text=True, **pipes)  # type: ignore[call-overload]


def wait_for_steps(process: subprocess.Popen[str], log: Path, count: int) -> None:
    """Until a run has logged so many lines."""
    for _ in range(3000):
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    raise AssertionError("no steps")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_run_which_then_resumes_and_saves_at_a_signal(
    tmp_path: Path, tiny_run: list[str]
) -> None:
    words = [*tiny_run, *LONG, RANKS, "hydra.run.dir=run", "trainer.checkpoint_every_steps=2", "trainer.resume=auto"]
    newest, log = tmp_path / "run" / files.NEWEST, tmp_path / "run" / "metrics.jsonl"
    killed = start(tmp_path, TRAIN, *words)
    wait_for_steps(killed, log, 3)
    os.kill(ranks_of(killed)[1], signal.SIGKILL)
    began = time.monotonic()
    _, told = killed.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert killed.returncode == 1
    assert "rank 1 was ended by SIGKILL" in told or "rank 0 failed" in told
    assert "trainer.resume=auto" in told
    step = files.load(newest)["step"]
    assert step >= 2

    ended = start(tmp_path, TRAIN, *words)
    wait_for_steps(ended, log, step + 3)
    ended.send_signal(signal.SIGTERM)
    printed, told = ended.communicate(timeout=120)
    assert ended.returncode == 143, told[-3000:]
    assert f"at step {step}" in printed
    assert "ended by SIGTERM" in told
    assert "Traceback" not in told
    assert files.load(newest)["step"] > step


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_rank_that_is_silent_ends_the_run_with_one_sentence(tmp_path: Path, tiny_run: list[str]) -> None:
    words = [*tiny_run, *LONG, RANKS, "hydra.run.dir=run", "trainer.hardware.timeout=15"]
    run = start(tmp_path, TRAIN, *words)
    wait_for_steps(run, tmp_path / "run" / "metrics.jsonl", 3)
    os.kill(ranks_of(run)[1], signal.SIGSTOP)
    _, told = run.communicate(timeout=300)
    assert run.returncode == 75, told
    assert told.count("nothing was heard of rank 1 on ") == 1
    assert "trainer.resume=auto" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_sweep_of_runs_of_two_ranks(tmp_path: Path, tiny_run: list[str]) -> None:
    words = [word for word in tiny_run if not word.startswith("tracker")]
    sweep = start(tmp_path, TRAIN, "--multirun", *words, RANKS, "seed=1,2")
    printed, told = sweep.communicate(timeout=1800)
    assert sweep.returncode == 0, told[-3000:]
    assert len(list(tmp_path.glob("outputs/sweeps/**/checkpoint_best_total.pth"))) == 2
    store = sqlite3.connect(tmp_path / "outputs" / "mlflow.db")
    runs = dict(store.execute("select run_uuid, status from runs"))
    children = [run for (run,) in store.execute("select run_uuid from tags where key = 'mlflow.parentRunId'")]
    assert len(children) == 2
    assert {runs[run] for run in children} == {"FINISHED"}
    assert "2 runs" in printed


@pytest.mark.slow
def test_under_torchrun_there_is_one_folder(tmp_path: Path, tiny_run: list[str]) -> None:
    run = start(tmp_path, TORCHRUN, *tiny_run)
    printed, told = run.communicate(timeout=1800)
    assert run.returncode == 0, told[-3000:]
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert (folder / files.BEST_TOTAL).exists()
    assert (folder / ".hydra" / "config.yaml").exists()
    assert printed.count("training RTDETRv2") == 1
    assert files.load(folder / files.NEWEST)["world_size"] == 2


@pytest.mark.slow
def test_a_mistake_of_the_user_costs_one_message(tmp_path: Path) -> None:
    run = start(tmp_path, TRAIN, "data=coco", "data.root=/absent", "trainer/hardware=cpu", RANKS)
    _, told = run.communicate(timeout=1800)
    assert run.returncode == 2
    assert "Traceback" not in told
    assert told.count("/absent") == 1


@pytest.mark.parametrize("ending", [Interrupted(15), PrunedError(0.5, 3)])
def test_endings_travel_from_the_ranks_to_the_process_that_started_them(ending: Exception) -> None:
    told = pickle.loads(pickle.dumps(ending))
    assert type(told) is type(ending)
    assert (str(told), vars(told)) == (str(ending), vars(ending))


@pytest.mark.parametrize(
    ("exitcode", "message", "kind", "words"),
    [
        (2, "ConfigError: data.root is wrong", ConfigError, "^data.root is wrong$"),
        (-9, "Signal 9 (SIGKILL)", launch.RanksFailed, "rank 1 was ended by SIGKILL.*trainer.resume=auto"),
        (2, {"message": "ValueError: x is 3: no"}, ConfigError, "^x is 3: no$"),
        (1, "KeyError: 'x'", launch.RanksFailed, "rank 1 failed"),
        (
            75,
            {"message": "PeerSilentError: nothing was heard of rank 1"},
            PeerSilentError,
            "^nothing was heard",
        ),
        (75, "", Interrupted, "SIGUSR1"),
        (-15, "", Interrupted, "SIGTERM"),
        (130, "", Interrupted, "SIGINT"),
    ],
)
def test_the_error_of_the_parent_for_a_failed_rank(exitcode: int, message: Any, kind: type, words: str) -> None:
    failure = SimpleNamespace(exitcode=exitcode, message=message, timestamp=0)
    error = launch._reason(SimpleNamespace(failures={1: failure}))
    assert type(error) is kind
    assert re.search(words, str(error))


def test_a_signal_goes_to_all_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    ranks: list[SimpleNamespace] = []
    monkeypatch.setattr(multiprocessing, "active_children", lambda: ranks)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    assert not launch._send(signal.SIGTERM), "there are no ranks yet"
    ranks += [SimpleNamespace(pid=7), SimpleNamespace(pid=8)]
    assert launch._send(signal.SIGTERM)
    assert sent == [(7, signal.SIGTERM), (8, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("before", "given", "resume"),
    [
        ([], None, "auto"),
        (["run.json"], None, "auto"),
        ([files.NEWEST], "other.pth", "auto"),
        ([], "other.pth", "other.pth"),
    ],
)
def test_what_torchrun_restarts_resumes_in_its_folder(
    before: list[str], given: str | None, resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, new = tmp_path / "earlier", tmp_path / "new"
    for folder in (earlier, new):
        folder.mkdir()
    for name in before:
        (earlier / name).touch()
    cfg = OmegaConf.create({"trainer": {"resume": given}})
    monkeypatch.setattr(distributed, "earlier_folder", lambda: None)
    assert launch._folder_at_restart(new, cfg) == new
    assert cfg.trainer.resume == given
    monkeypatch.setattr(distributed, "earlier_folder", lambda: earlier)
    assert launch._folder_at_restart(new, cfg) == earlier
    assert cfg.trainer.resume == resume
    assert not new.exists()
