"""A real PostgreSQL: runs and searches of several processes, while the server is restarted."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from postgres import IN_ADDRESS, PASSWORD, Postgres, programs

ROOT = Path(__file__).resolve().parents[2]
TRACKED = """
import json, sys, time
from pathlib import Path
from detr_exp.tracker.tracker import Tracker

uri, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
(folder / "best.pth").write_bytes(bytes([number]) * 1000)
tracker = Tracker(tracking_uri=uri, project="p", run=None, tensorboard=False, wandb=False, checkpoints=True)
tracker.start(run_dir=folder, config={"seed": number})
for step in range(1, 41):
    tracker.log(step, {"a": step * 1.0, "b": number + step / 100})
    time.sleep(0.25)
tracker.checkpoint(folder / "best.pth", 40)
tracker.finish()
"""
SEARCH = """
import os, sys, time
from hydra.core.hydra_config import HydraConfig
from detr_exp import cli
from detr_exp.trainer.trial import pruning_check

def task(cfg):
    number = HydraConfig.get().job.num
    with open(os.environ["STARTED"], "a") as file:
        file.write(f"{number}\\n")
    is_behind = pruning_check()
    for epoch in range(1, 4):
        time.sleep(float(os.environ["SECONDS"]))
        is_behind(epoch, cfg.optim.lr * epoch)
    return cfg.optim.lr

sys.exit(cli.main(task, "config", ""))
"""


@pytest.fixture(scope="module")
def postgres(absent: Callable[[str], NoReturn]) -> Iterator[Postgres]:
    if programs() is None:
        absent("PostgreSQL is not installed (apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        absent("psycopg is not installed (pip install 'detr_exp[engines]')")
    server = Postgres()
    yield server
    server.stop()


class Searcher:
    """A process of the search in a folder of its own, as on a machine of its own."""

    def __init__(
        self, base: Path, name: str, address: str, trials: int, seconds: float = 0.3, folder: str = ""
    ) -> None:
        self.place, self.folder = base / name, base / (folder or name)
        self.place.mkdir(exist_ok=True)
        (self.place / "search.py").write_text(SEARCH)
        words = ["--multirun", "tracker=none", "hydra/sweeper=optuna", "hydra/launcher=basic"]
        words += [
            f"hydra.sweeper.n_trials={trials}",
            "optim.lr=tag(log,interval(1e-5,1e-1))",
            "hydra.sweeper.study=one",
        ]
        words += ["hydra.sweeper.pruner=median", f"hydra.sweeper.storage={address}"]
        words += [f"hydra.sweep.dir={self.folder}", "hydra.output_subdir=.hydra"]
        environment = {"PYTHONPATH": str(ROOT), "SECONDS": str(seconds)}
        environment["STARTED"] = str(self.place / "started")
        with open(self.place / "output", "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "search.py", *words],
                cwd=self.place,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return (self.place / "output").read_text()

    @property
    def started(self) -> list[int]:
        """Numbers of the trials that were started here, in order."""
        file = self.place / "started"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def end(self) -> int:
        return self.process.wait(600)


def until(is_true: Callable[[], bool], seconds: float = 500) -> None:
    begun = time.monotonic()
    while not is_true():
        assert time.monotonic() - begun < seconds
        time.sleep(0.2)


def states(server: Postgres, database: str) -> Counter[str]:
    return Counter(server.ask(database, "select state from trials"))


def with_password(folder: Path) -> list[Path]:
    secrets = (PASSWORD.encode(), IN_ADDRESS.encode())
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(secret in path.read_bytes() for secret in secrets)]


@pytest.mark.smoke
def test_a_search_by_three_processes_with_a_restart_of_the_server(postgres: Postgres, tmp_path: Path) -> None:
    address = postgres.database("three")
    searchers = [Searcher(tmp_path, name, address, trials=12) for name in "abc"]
    until(lambda: sum(len(one.started) for one in searchers) >= 5)
    postgres.halt()
    time.sleep(3)
    postgres.start()
    assert [one.end() for one in searchers] == [0, 0, 0], [one.output for one in searchers]
    numbers = [number for one in searchers for number in one.started]
    assert sorted(numbers) == list(range(12)), "each trial once, and no more than the total"
    assert sum(states(postgres, "three").values()) - states(postgres, "three")["WAITING"] == 12
    points = postgres.ask("three", "select param_value from trial_params")
    assert len(set(points)) == 12
    for one in searchers:
        rows = [json.loads(line) for line in (one.folder / "sweep.jsonl").read_text().splitlines()]
        assert [row["number"] for row in rows] == one.started
    said = [one.output for one in searchers]
    assert any("12 runs, best first" in output for output in said), "who ends first may not know the last point yet"
    assert with_password(tmp_path) == []


def test_a_killed_process_goes_on_with_its_own_trials_and_others_leave_them(postgres: Postgres, tmp_path: Path) -> None:
    address = postgres.database("killed")
    first = Searcher(tmp_path, "a", address, trials=6, seconds=1.5)
    until(lambda: len(first.started) == 2)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    second = Searcher(tmp_path, "b", address, trials=6, seconds=0.1)
    assert second.end() == 0, second.output
    assert 1 not in second.started
    assert f"at {os.uname().nodename}:{first.folder}" in second.output
    again = Searcher(tmp_path, "a", address, trials=6, seconds=0.1)
    assert again.end() == 0, again.output
    assert again.started == [0, 1, 1]
    assert states(postgres, "killed")["RUNNING"] == 0
    assert sorted({*second.started, *again.started}) == list(range(6))


def test_two_processes_in_one_folder(postgres: Postgres, tmp_path: Path) -> None:
    """Also with the journal in it: `null` is its address."""
    for address in (postgres.database("folder"), "null"):
        base = tmp_path / str(address == "null")
        base.mkdir()
        both = [Searcher(base, name, address, trials=8, folder="sweep") for name in "ab"]
        assert [one.end() for one in both] == [0, 0], [one.output for one in both]
        assert sorted(number for one in both for number in one.started) == list(range(8))
        rows = [json.loads(line) for line in (base / "sweep" / "sweep.jsonl").read_text().splitlines()]
        assert sorted(row["number"] for row in rows) == list(range(8))


def test_a_server_that_is_down_is_answered_in_words(postgres: Postgres, tmp_path: Path) -> None:
    address = postgres.database("down")
    postgres.halt()
    one = Searcher(tmp_path, "a", address, trials=2)
    status = one.end()
    postgres.start()
    assert status == 1
    assert "cannot be reached" in one.output
    assert "Connection refused" in one.output
    assert "Traceback" not in one.output
    assert with_password(tmp_path) == []


def tracked(number: int, address: str, folder: Path) -> subprocess.Popen[bytes]:
    """A run that logs to the server; its output is in a file beside its folder."""
    command = [sys.executable, "-c", TRACKED, address, folder / f"run{number}", str(number)]
    with open(folder / f"run{number}.log", "wb") as log:
        there = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=folder, env=there, stdout=log, stderr=log)


def sent(number: int, address: str, folder: Path) -> None:
    sync = [sys.executable, "-m", "detr_exp.sync", f"run=run{number}", "tracking_uri=${oc.env:ADDRESS}"]
    subprocess.run(sync, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "ADDRESS": address}, check=True)


def test_eight_runs_at_once_in_mlflow_with_a_restart_of_the_server(postgres: Postgres, tmp_path: Path) -> None:
    address = postgres.database("runs")
    runs = [tracked(number, address, tmp_path) for number in range(8)]
    until(lambda: "metrics" in postgres.ask("runs", "select tablename from pg_tables"))
    until(lambda: int(postgres.ask("runs", "select count(*) from metrics where key = 'a'")[0]) > 20)
    postgres.halt()
    time.sleep(2)
    postgres.start()
    assert [run.wait(600) for run in runs] == [0] * 8
    for number in range(8):
        sent(number, address, tmp_path)
    counts = postgres.ask(
        "runs", "select count(*), count(distinct (run_uuid, key, step)) from metrics where key in ('a','b')"
    )
    assert counts == ["640|640"]
    assert postgres.ask("runs", "select status, count(*) from runs group by status") == ["FINISHED|8"]
    assert postgres.ask("runs", "select count(*) from experiments where name = 'p'") == ["1"]
    found = {path.read_bytes() for path in (tmp_path / "outputs" / "mlartifacts").rglob("best.pth")}
    assert found == {bytes([number]) * 1000 for number in range(8)}
    assert not (tmp_path / "mlruns").exists()
    assert with_password(tmp_path) == []


@pytest.mark.usefixtures("postgres")  # which says why where there is none
def test_a_server_with_too_few_connections_costs_nothing(tmp_path: Path) -> None:
    def said(words: str) -> int:
        return sum(words in path.read_text() for path in tmp_path.glob("run*.log"))

    crowded = Postgres(connections=5)
    try:
        address = crowded.database("runs")
        others = [crowded.client() for _ in range(5)]
        runs = [tracked(number, address, tmp_path) for number in range(6)]
        until(lambda: said("cannot be reached") == 6)
        for other in others:
            other.kill()
            other.communicate()
        assert [run.wait(600) for run in runs] == [0] * 6
        for number in range(6):
            sent(number, address, tmp_path)
        counts = "select count(*), count(distinct (run_uuid, key, step)) from metrics where key in ('a','b')"
        assert crowded.ask("runs", counts) == ["480|480"]
        assert crowded.ask("runs", "select status, count(*) from runs group by status") == ["FINISHED|6"]
    finally:
        crowded.stop()
    assert said("too many clients already") == 6
    assert said("Traceback") == 0
