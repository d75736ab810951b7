"""Sweeps on a Ray cluster of two nodes on this machine, which all tests share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'detr_exp[ray]'")

TRAIN = [sys.executable, "-m", "detr_exp.train"]
PATIENCE = 900.0  # seconds
SEEDS = ("1", "2")


class Cluster(NamedTuple):
    """A head and a second node, of one core and one pretended GPU each."""

    address: str
    folder: Path

    def start(self, *words: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--num-gpus=1"]
        quiet = ["--disable-usage-stats", "--object-store-memory=80000000"]
        with open(self.folder / "start.log", "ab") as log:
            subprocess.run([*command, *quiet, *words], stdout=log, stderr=log, timeout=PATIENCE, check=True)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of the cluster with this word in their command line, oldest first."""
        return sorted(running(str(self.folder), name), key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path("/tmp") / f"ray-{os.getpid()}"  # the paths of its sockets may not be long
    folder.mkdir()
    port, clients = free_port(), free_port()
    found = Cluster(f"127.0.0.1:{port}", folder)
    try:
        found.start(
            *("--head", f"--port={port}", f"--ray-client-server-port={clients}", "--include-dashboard=false"),
            f"--temp-dir={folder}",
        )
        found.start(f"--address={found.address}")
        yield found
    finally:
        for process in found.processes(""):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def running(*words: str) -> list[psutil.Process]:
    """Processes whose command lines or folders contain all words."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            told = " ".join([*process.cmdline(), process.environ().get("RAY_SESSION_DIR", "")])
            if all(word in told for word in words):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def training(some_seconds: list[str]) -> list[str]:
    """Words of a run; with those of a resumed one, because they stand in its checkpoints."""
    return [*some_seconds, "trainer.resume=auto"]


@pytest.fixture(scope="module")
def undisturbed(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seed -> folder of the run without Ray."""
    folders = {seed: tmp_path_factory.mktemp("undisturbed") / "run" for seed in SEEDS}
    for seed, folder in folders.items():
        subprocess.run([*TRAIN, *training, f"seed={seed}", f"hydra.run.dir={folder}"], check=True)
    return folders


class Sweep:
    """A sweep command in a folder."""

    def __init__(self, folder: Path, cluster: Cluster, *words: str) -> None:
        address = [f"hydra.launcher.address={cluster.address}", "hydra.launcher.num_cpus=1"]
        self.command = [*TRAIN, "--multirun", "hydra/launcher=ray", *address, "hydra.sweep.dir=s", *words]
        self.folder = folder

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.folder / "out", "ab") as out:
            return subprocess.Popen(self.command, cwd=self.folder, stdout=out, stderr=out)

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        try:
            assert process.wait(PATIENCE) == 0, self.said()
        finally:
            process.kill()

    def said(self) -> str:
        return (self.folder / "out").read_text()

    def ledger(self) -> list[dict[str, Any]]:
        path = self.folder / "s" / "sweep.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> dict[str, int]:
        """Run folder -> how many lines of metrics it has."""
        found = {path.parent.name: path for path in self.folder.glob("s/*/metrics.jsonl")}
        return {name: len(path.read_text().splitlines()) for name, path in found.items()}

    def processes(self) -> list[psutil.Process]:
        """Of its runs; the parents are Ray's workers."""
        return running("_job_process", str(self.folder))


def until(met: Callable[[], object], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def half_done(sweep: Sweep) -> None:
    """Wait until both runs have trained for some steps."""
    until(lambda: len(sweep.steps()) == 2 and min(sweep.steps().values()) > 5, sweep.said)


def assert_undisturbed(
    sweep: Sweep, undisturbed: dict[str, Path], differences: Callable[[Path, Path], list[str]]
) -> None:
    latest = {line["hash"]: line for line in sweep.ledger()}
    assert [line["status"] for line in latest.values()] == ["ok", "ok"]
    for line in latest.values():
        (seed,) = (word.removeprefix("seed=") for word in line["overrides"])
        assert differences(undisturbed[seed], next(sweep.folder.glob(f"s/*{line['hash']}"))) == []


@pytest.mark.smoke
def test_killed_workers_and_runs_are_started_again_and_resume(
    cluster: Cluster, training: list[str], undisturbed: dict[str, Path], differences: Any, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, cluster, *training, f"seed={','.join(SEEDS)}")
    process = sweep.start()
    half_done(sweep)
    one, other = sweep.processes()
    one.kill()  # the training itself
    other.parent().kill()  # Ray's worker
    sweep.wait(process)
    assert sweep.said().count("started again") == 2
    assert_undisturbed(sweep, undisturbed, differences)
    (log,) = {path.name for path in tmp_path.glob("s/*/*.log") if "job" in path.name}
    assert log == "job.log"


def test_runs_go_on_without_their_sweep_which_finds_them_again(
    cluster: Cluster, training: list[str], undisturbed: dict[str, Path], differences: Any, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, cluster, *training, f"seed={','.join(SEEDS)}")
    process = sweep.start()
    half_done(sweep)
    process.kill()
    process.wait()
    before = {one.pid for one in sweep.processes()}
    assert len(before) == 2
    again = sweep.start()
    sweep.wait(again)
    assert_undisturbed(sweep, undisturbed, differences)
    assert len(sweep.ledger()) == 2, "each run has trained once"
    assert "started again" not in sweep.said()


def test_being_asked_to_end_saves_the_runs(
    cluster: Cluster, training: list[str], undisturbed: dict[str, Path], differences: Any, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, cluster, *training, f"seed={','.join(SEEDS)}")
    process = sweep.start()
    half_done(sweep)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130, sweep.said()
    assert sweep.processes() == []
    assert Counter(line["status"] for line in sweep.ledger()) == {"killed": 2}
    sweep.wait(sweep.start())
    assert_undisturbed(sweep, undisturbed, differences)


def test_a_search_prunes(cluster: Cluster, tmp_path: Path) -> None:
    """Trials are asked for one by one, report to one study from their processes, and are told to stop."""
    (tmp_path / "app.py").write_text(
        "from detr_exp import cli\n"
        "from detr_exp.trainer.run_status import PrunedError\n"
        "from detr_exp.trainer.trial import pruning_check\n"
        "def task(cfg):\n"
        "    is_behind = pruning_check()\n"
        "    for epoch in range(1, 5):\n"
        "        if is_behind(epoch, epoch * cfg.optim.lr):\n"
        "            raise PrunedError(epoch * cfg.optim.lr, epoch)\n"
        "    return 4 * cfg.optim.lr\n"
        "cli.main(task, 'config', '')\n"
    )
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "hydra.sweeper.pruner=median"]
    search += ["hydra.sweeper.min_epochs=1", "hydra.sweeper.startup_trials=2", "hydra.sweeper.sampler=random"]
    words = ["tracker=none", "trainer.epochs=4", *search, "optim.lr=tag(log,interval(1e-5,1e-2))"]
    sweep = Sweep(tmp_path, cluster, *words)
    sweep.command[1:3] = ["app.py"]
    sweep.wait(sweep.start())
    ledger = sweep.ledger()
    assert sorted(line["number"] for line in ledger) == list(range(8))
    counts = Counter(line["status"] for line in ledger)
    assert counts["pruned"] > 0, ledger
    assert counts["ok"] + counts["pruned"] == 8, ledger


def test_each_run_sees_its_own_gpu(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os\n"
        "from detr_exp import cli\n"
        "def task(cfg):\n"
        "    print('gpu', os.environ['CUDA_VISIBLE_DEVICES'], 'threads', os.environ['OMP_NUM_THREADS'], os.getcwd())\n"
        "    return cfg.optim.lr\n"
        "cli.main(task, 'config', '')\n"
    )
    for gpus, seen in (("1", "0"), ("0", "")):
        sweep = Sweep(tmp_path, cluster, "tracker=none", f"hydra.sweep.dir=g{gpus}", f"hydra.launcher.num_gpus={gpus}")
        command = [sys.executable, "app.py", *sweep.command[3:], "optim.lr=1e-3,2e-3"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed = {path.read_text().strip() for path in (tmp_path / f"g{gpus}").glob("*/job.log")}
        assert printed == {f"gpu {seen} threads 1 {tmp_path}"}


def test_a_run_that_has_no_room_anywhere_is_refused(cluster: Cluster, tiny_run: list[str], tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, cluster, *tiny_run, "seed=1,2", "hydra.launcher.num_gpus=8")
    assert sweep.start().wait(PATIENCE) == 2
    assert "hydra.launcher.num_gpus=0" in sweep.said()
    assert "Traceback" not in sweep.said()


def test_without_an_answer_at_the_address_nothing_starts(tiny_run: list[str], tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, Cluster(f"127.0.0.1:{free_port()}", tmp_path), *tiny_run, "seed=1,2")
    assert sweep.start().wait(PATIENCE) == 2
    assert "ray start --head" in sweep.said()
    assert "Traceback" not in sweep.said()


def test_runs_of_a_lost_node_go_on_on_another(
    cluster: Cluster, training: list[str], undisturbed: dict[str, Path], differences: Any, tmp_path: Path
) -> None:
    """The last test: the cluster has one node less afterwards."""
    sweep = Sweep(tmp_path, cluster, *training, f"seed={','.join(SEEDS)}")
    process = sweep.start()
    half_done(sweep)
    raylets = cluster.processes("--raylet_socket_name")
    assert len(raylets) == 2
    raylets[1].kill()
    sweep.wait(process)
    assert sweep.said().count("started again") == 1
    assert_undisturbed(sweep, undisturbed, differences)
