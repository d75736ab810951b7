from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from detr_exp import locks
from detr_exp.locks import LockedError, is_locked, lock

REFUSALS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO, 524)  # 524: of NFS, not in `errno`
HOLD = """
import sys, time, fcntl
from pathlib import Path
from detr_exp import locks
def refuse(*_): raise OSError(37, "No locks available")
fcntl.flock = refuse
locks.BEAT = 0.1
with locks.lock(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=[None, errno.ENOLCK], ids=["locks", "no locks"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        refuse(monkeypatch, request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    monkeypatch.setattr(locks, "SILENCE", 0.3)
    monkeypatch.setattr(locks, "POLL", 0.005)
    monkeypatch.setattr(locks._Mark, "is_explained", False)


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def elsewhere(monkeypatch: pytest.MonkeyPatch, name: str = "other") -> None:
    """From here on this process is on another machine."""
    monkeypatch.setattr(locks, "_machine", lambda: (name, "4026531836"))


def test_one_at_a_time(disk: None, tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with lock(path):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lock"]


def test_a_lock_that_another_has_is_refused_after_the_timeout(disk: None, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with lock(path):
        assert is_locked(path)
        began = time.monotonic()
        with pytest.raises(LockedError, match="lock"), lock(path, timeout=0.05):
            pass
        assert time.monotonic() - began >= 0.05
    assert not is_locked(path)
    with lock(path, timeout=0):
        pass


def test_it_is_the_lock_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with filelock.FileLock(path):
        assert is_locked(path)
    with lock(path), pytest.raises(filelock.Timeout):
        filelock.FileLock(path).acquire(timeout=0)


def test_a_lock_whose_file_was_removed_by_its_last_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "lock", fcntl.flock

    def slow(number: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(number, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with lock(path, timeout=0):
        assert is_locked(path)


@pytest.mark.parametrize("number", REFUSALS)
def test_a_disk_without_locks_is_guarded_by_a_file_and_says_so_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, number)
    for name in ("a", "b"):
        with lock(tmp_path / name):
            assert (tmp_path / f"{name}.held").read_text().split()[2] == str(os.getpid())
            assert is_locked(tmp_path / name)
        assert not (tmp_path / f"{name}.held").exists()
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "has no locks" in record.getMessage()
    assert os.strerror(number) in record.getMessage()


def test_the_file_of_a_living_process_of_another_machine_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.ENOLCK)
    with lock(tmp_path / "lock"):
        elsewhere(monkeypatch)
        for _ in range(3):
            assert is_locked(tmp_path / "lock")
            time.sleep(0.2)


@pytest.mark.parametrize("content", ["other 1/pid 17 4711 0123 3\n", "", "\0\0\0", "a b c d e f", "x" * 10000])
def test_the_file_of_a_dead_machine_or_a_damaged_one_is_taken_over_after_some_silence(
    content: str, disk: None, tmp_path: Path
) -> None:
    (tmp_path / "lock.held").write_text(content)
    began = time.monotonic()
    with lock(tmp_path / "lock", timeout=0):
        assert time.monotonic() - began >= locks.SILENCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock, on a disk without locks."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.communicate()


def test_the_file_of_a_killed_process_is_taken_over_at_once(
    holder: subprocess.Popen[str], disk: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SILENCE", 600.0)
    assert is_locked(tmp_path / "lock")
    holder.kill()
    holder.wait()
    with lock(tmp_path / "lock", timeout=0):
        pass


def test_a_process_that_was_stopped_for_long_has_lost_its_lock_and_ends(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.ENOLCK)
    elsewhere(monkeypatch)
    holder.send_signal(signal.SIGSTOP)
    with lock(tmp_path / "lock", timeout=0):
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(10) == 75
        assert is_locked(tmp_path / "lock")


def test_another_process_with_the_same_number_is_not_the_one_that_had_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.ENOLCK)
    monkeypatch.setattr(locks, "SILENCE", 600.0)
    name, identity = locks._machine()
    assert name == socket.gethostname()
    (tmp_path / "lock.held").write_text(f"{name} {identity} {os.getpid()} 1 0123 3\n")
    with lock(tmp_path / "lock", timeout=0):
        pass


def test_a_file_that_a_third_process_has_taken_over_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = locks._Mark(tmp_path / "lock")
    mark.path.write_text("of a third\n")
    assert not mark._is_removed("of a dead one\n")
    assert mark.path.read_text() == "of a third\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lock.held"]


def test_the_file_comes_back_when_somebody_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOLCK)
    with lock(tmp_path / "lock"):
        (tmp_path / "lock.held").unlink()
        until = time.monotonic() + 10
        while not (tmp_path / "lock.held").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")


def test_a_forked_process_does_not_end_the_lock(disk: None, tmp_path: Path) -> None:
    with lock(tmp_path / "lock") as _:
        if not (child := os.fork()):
            held = locks._Mark(tmp_path / "lock")
            held.remove()
            os._exit(int(not is_locked(tmp_path / "lock")))
        assert os.waitpid(child, 0)[1] == 0
        assert is_locked(tmp_path / "lock")


def test_a_folder_that_cannot_be_written_to_is_another_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"), lock(tmp_path / "absent" / "lock"):
        pass


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc, on Linux")
def test_commands_run_on_a_disk_without_locks(tmp_path: Path, tiny_run: list[str]) -> None:
    """The C library refuses all locks, as it does on such a disk."""
    library = tmp_path / "no_locks.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("no_locks.c"), "-ldl"], check=True
    )

    def run(command: str, *words: str) -> str:
        there = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", f"detr_exp.{command}", *words]
        done = subprocess.run(line, cwd=tmp_path, env=there, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "Traceback" not in said
        return said

    said = run("train", *(word for word in tiny_run if word != "tracker=none"), "hydra.run.dir=run")
    assert said.count("has no locks (No locks available); files *.held") == 1
    assert "which SQLite needs" in said
    run("train", *tiny_run, "--multirun", "seed=1,2", "hydra.sweep.dir=sweep")
    assert len(list(tmp_path.glob("sweep/*/checkpoint.pth"))) == 2
    run("sync", "run=sweep")
    assert not list(tmp_path.glob("**/*.held"))
