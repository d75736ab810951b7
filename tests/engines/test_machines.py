"""Trainings on two machines, which are network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from detr_exp.trainer import checkpoint as files

OURS = "detr_exp.torchrun"
TIMEOUT = 15
RUN = [
    "hydra.run.dir=run",
    "trainer.checkpoint_every_steps=2",
    f"trainer.hardware.timeout={TIMEOUT}",
]


NAMES = "127.0.0.1 localhost\n10.99.0.1 machine1\n10.99.0.2 machine2\n"


class Machines:
    """Two network namespaces that share the disk; their names are those of this process."""

    def __init__(self) -> None:
        self.spaces = [f"detr{os.getpid()}m{number}" for number in (1, 2)]
        self.cables = [f"d{os.getpid()}v{number}" for number in (1, 2)]
        self.started: list[subprocess.Popen[str]] = []

    def up(self) -> None:
        for space in self.spaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            hosts = Path("/etc/netns", space, "hosts")
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(NAMES)
        ends = [[end, "netns", space] for end, space in zip(self.cables, self.spaces, strict=True)]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, (space, end) in enumerate(zip(self.spaces, self.cables, strict=True), 1):
            ip("-n", space, "addr", "add", f"10.99.0.{number}/24", "dev", end)
            ip("-n", space, "link", "set", end, "up")

    def down(self) -> None:
        for number, space in enumerate(self.spaces, 1):
            self.kill(number)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)
        for process in self.started:
            process.communicate()

    def start(
        self, number: int, folder: Path, *words: str, launcher: str = OURS, restarts: int = 0
    ) -> subprocess.Popen[str]:
        """Ranks on a machine."""
        command = ["ip", "netns", "exec", self.spaces[number - 1], "unshare", "--uts", "sh", "-c"]
        command += ['hostname "$0"; exec "$@"', f"machine{number}"]
        command += [sys.executable, "-m", launcher, "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.99.0.1:29500", f"--max-restarts={restarts}"]
        there = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(
            [*command, "-m", "detr_exp.train", *words, *RUN],
            cwd=folder,
            env=there,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def cable(self, state: str) -> None:
        ip("-n", self.spaces[0], "link", "set", self.cables[0], state)

    def processes(self, number: int) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.spaces[number - 1]], capture_output=True, text=True)
        return list(map(int, listed.stdout.split()))

    def ranks(self, number: int) -> list[int]:
        """The processes that train, whose parent is `torchrun`."""
        found = []
        for process in self.processes(number):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if b"detr_exp.train" in words and not {b"torch.distributed.run", OURS.encode()} & set(words):
                found.append(process)
        return found

    def kill(self, number: int) -> None:
        for process in self.processes(number):
            os.kill(process, signal.SIGKILL)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines(absent: Callable[[str], NoReturn]) -> Iterator[Machines]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        absent("network namespaces need root, ip (iproute2) and unshare (util-linux)")
    made = Machines()
    try:
        made.up()
    except subprocess.CalledProcessError as error:
        made.down()
        absent(f"this kernel makes no network namespaces ({error.stderr.decode().strip()})")
    yield made
    made.down()


@pytest.fixture(scope="module")
def undisturbed(machines: Machines, some_seconds: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(machines, folder, some_seconds)
    return folder / "run"


def finish(machines: Machines, folder: Path, words: list[str]) -> None:
    for process in [machines.start(number, folder, *words) for number in (1, 2)]:
        said = process.communicate(timeout=300)
        assert process.returncode == 0, "".join(said)[-4000:]


def interrupted(
    machines: Machines, folder: Path, words: list[str], launcher: str = OURS, restarts: int = 0
) -> list[subprocess.Popen[str]]:
    """Start a run and wait until it has saved its state."""
    pair = [machines.start(number, folder, *words, launcher=launcher, restarts=restarts) for number in (1, 2)]
    until = time.monotonic() + 300
    while not (folder / "run" / files.NEWEST).exists():
        assert pair[0].poll() is None, pair[0].communicate()[1][-4000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    return pair


@pytest.mark.smoke
def test_a_killed_rank_is_started_again_and_the_run_resumes(
    machines: Machines,
    undisturbed: Path,
    some_seconds: list[str],
    differences: Callable[[Path, Path], list[str]],
    tmp_path: Path,
) -> None:
    pair = interrupted(machines, tmp_path, some_seconds, "torch.distributed.run", restarts=1)
    os.kill(machines.ranks(2)[0], signal.SIGKILL)
    said = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said[0][1][-4000:]
    assert "at step" in said[0][0]
    assert not differences(tmp_path / "run", undisturbed)


def test_a_machine_that_dies_ends_the_other_rank_and_the_run_resumes(
    machines: Machines,
    undisturbed: Path,
    some_seconds: list[str],
    differences: Callable[[Path, Path], list[str]],
    tmp_path: Path,
) -> None:
    pair = interrupted(machines, tmp_path, some_seconds)
    machines.cable("down")  # so that no connection is closed
    machines.kill(2)
    _, told = pair[0].communicate(timeout=300)
    assert pair[0].returncode == 75, told
    assert f"nothing was heard of rank 1 on machine2 for {TIMEOUT} s" in told
    assert "Traceback" not in told
    machines.cable("up")
    finish(machines, tmp_path, [*some_seconds, "trainer.resume=auto"])
    assert not differences(tmp_path / "run", undisturbed)


@pytest.mark.smoke
def test_a_broken_cable_ends_the_ranks_on_both_sides(
    machines: Machines, some_seconds: list[str], tmp_path: Path
) -> None:
    pair = interrupted(machines, tmp_path, some_seconds)
    machines.cable("down")
    began = time.monotonic()
    try:
        told = [process.communicate(timeout=300)[1] for process in pair]
    finally:
        machines.cable("up")
    assert [process.returncode for process in pair] == [75, 75], told
    assert f"nothing was heard of rank 1 on machine2 for {TIMEOUT} s" in told[0]
    silences = ("the machine of rank 0 (machine1) has not answered", "nothing was heard of rank 0 on machine1")
    assert any(f"{silence} for {TIMEOUT} s" in told[1] for silence in silences), told[1]  # its last answer may be older
    assert time.monotonic() - began < 200, "torchrun has waited for the machine"
    assert "Traceback" not in "".join(told)


def test_machines_that_know_only_their_own_names_train_together(
    machines: Machines,
    undisturbed: Path,
    some_seconds: list[str],
    differences: Callable[[Path, Path], list[str]],
    tmp_path: Path,
) -> None:
    files_of = [Path("/etc/netns", space, "hosts") for space in machines.spaces]
    for number, hosts in enumerate(files_of, 1):
        hosts.write_text("".join(line for line in NAMES.splitlines(True) if f"machine{3 - number}" not in line))
    try:
        finish(machines, tmp_path, some_seconds)
    finally:
        for hosts in files_of:
            hosts.write_text(NAMES)
    assert not differences(tmp_path / "run", undisturbed)
