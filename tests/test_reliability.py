"""What the world does to a training, and what becomes of it: the rows of `docs/reliability.md` that need a process."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from detr_exp.trainer import checkpoint as files

ROOT = Path(__file__).parent.parent
WORKERS = "data.num_workers=2"
LONG = ["trainer.epochs=1000", "trainer.eval_interval=1000", "trainer.max_steps=null"]
AS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a file system")
pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


class Training:
    """A training in a process group of its own, as `timeout` and service managers start it."""

    def __init__(self, folder: Path, words: list[str], shell: str = "exec RUN", before: Callable | None = None):
        self.folder = folder
        command = " ".join(f"'{word}'" for word in [sys.executable, "-m", "detr_exp.train", *words])
        self.process = subprocess.Popen(
            ["bash", "-c", shell.replace("RUN", f"{command} 'hydra.run.dir={folder}'")],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=before,
        )

    def wait_for(self, lines: int) -> None:
        log = self.folder / "metrics.jsonl"
        self.wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(6000):
            if condition():
                return
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        raise AssertionError("it never came to that")

    def end(self, status: int) -> tuple[str, str]:
        """What it has printed; it has ended with this status, without a traceback and without leaving a process."""
        out, err = self.process.communicate(timeout=300)
        assert "Traceback" not in out + err
        assert self.process.returncode == status, out + err
        left = ["pgrep", "-r", "DRST", "-g", str(self.process.pid)]
        for _ in range(100):  # the tracker of shared memory ends a moment after the process it watches
            if subprocess.run(left, stdout=subprocess.DEVNULL, check=False).returncode:
                return out, err
            time.sleep(0.05)
        raise AssertionError("a process was left")

    @property
    def step(self) -> int:
        return files.load(self.folder / files.NEWEST)["step"]

    @property
    def status(self) -> str:
        return json.loads((self.folder / "run.json").read_text("utf-8"))["status"]


@pytest.fixture
def start(tmp_path: Path, tiny_run: list[str]) -> Iterator[Callable[..., Training]]:
    started: list[Training] = []

    def one(*words: str, folder: Path | None = None, **how: object) -> Training:
        given = [*tiny_run, "tracker=none", "trainer.log_every_steps=1", *words]
        started.append(Training(folder or tmp_path / "run", given, **how))  # type: ignore[arg-type]
        return started[-1]

    yield one
    for training in started:
        if training.process.poll() is None:
            os.killpg(training.process.pid, signal.SIGKILL)
            training.process.communicate()


# ------------------------------------------------------------------------------------------------------------- signals


ONE_BY_ONE = (("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 75), ("SIGUSR2", 75))


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SIGTERM", 143),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ONE_BY_ONE),
    ],
)
def test_a_signal_to_the_whole_group_saves_and_ends(start: Callable[..., Training], name: str, status: int) -> None:
    training = start(WORKERS, *LONG)
    training.wait_for(2)
    os.killpg(training.process.pid, signal.Signals[name])
    _, err = training.end(status)
    assert err.rstrip().endswith(f"ended by {name}")
    assert training.step >= 2
    assert training.status == "killed"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["trainer.hardware.devices=2"], ["trainer.eval_interval=1", "data.val=64"]])
def test_a_signal_to_ranks_and_evaluations(start: Callable[..., Training], words: list[str]) -> None:
    training = start(WORKERS, *LONG, *words)
    training.wait_for(6)
    os.killpg(training.process.pid, signal.SIGUSR1)
    training.end(75)
    assert training.step >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5])
def test_a_signal_before_there_is_anything_to_save(start: Callable[..., Training], seconds: float) -> None:
    training = start(WORKERS, *LONG)
    time.sleep(seconds)
    os.killpg(training.process.pid, signal.SIGUSR1)
    training.end(75 if seconds > 1 else training.process.wait())  # 138 while Python itself starts


@pytest.mark.slow
def test_timeout_of_the_shell(start: Callable[..., Training]) -> None:
    training = start(WORKERS, *LONG, shell="timeout -s TERM 15 RUN; exit $?")
    training.end(124)
    assert training.status == "killed"


@pytest.mark.slow
def test_nohup_goes_on(start: Callable[..., Training]) -> None:
    training = start(*LONG, "trainer.max_steps=12", shell="exec nohup RUN")
    training.wait_for(1)
    os.killpg(training.process.pid, signal.SIGHUP)
    training.end(0)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_signal_to_a_sweep(start: Callable[..., Training], tmp_path: Path, launcher: str) -> None:
    sweep = tmp_path / "sweep"
    training = start("--multirun", "seed=1,2", f"hydra/launcher={launcher}", f"hydra.sweep.dir={sweep}", WORKERS, *LONG)
    training.wait_until(lambda: any(log.read_bytes() for log in sweep.glob("*/metrics.jsonl")))
    os.killpg(training.process.pid, signal.SIGTERM)
    training.end(143)
    assert list(sweep.glob("*/checkpoint.pth"))
    assert {json.loads(path.read_text("utf-8"))["status"] for path in sweep.glob("*/run.json")} == {"killed"}


def workers_of(pid: int) -> list[int]:
    return [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text("utf-8").split()
    ]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named_and_the_state_saved(start: Callable[..., Training]) -> None:
    training = start(WORKERS, *LONG)
    training.wait_for(2)
    os.kill(workers_of(training.process.pid)[0], signal.SIGKILL)
    _, err = training.end(1)
    assert "was ended by SIGKILL, most likely because memory ran out; use fewer workers: data.num_workers=1" in err
    assert "The state is saved" in err
    assert training.step >= 2


@pytest.mark.slow
def test_a_worker_of_one_rank_that_is_killed_ends_all_ranks(start: Callable[..., Training]) -> None:
    training = start(WORKERS, *LONG, "trainer.hardware.devices=2")
    training.wait_for(2)
    ranks = [pid for pid in workers_of(training.process.pid) if len(workers_of(pid)) >= 2]
    os.kill(workers_of(ranks[-1])[0], signal.SIGKILL)
    _, err = training.end(1)
    assert "was ended by SIGKILL, most likely because memory ran out" in err


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["RUN | head -n 1; exit ${PIPESTATUS[0]}", "exec RUN >&- 2>&- <&-", "TERM"])
def test_predictions_are_kept(trained: Path, tmp_path: Path, shell: str) -> None:
    images, folder = tmp_path / "pictures", tmp_path / "found"
    images.mkdir()
    for number in range(2000 if shell == "TERM" else 2):
        Image.new("RGB", (64, 64), "gray").save(images / f"{number}.png")
    words = [sys.executable, "-m", "detr_exp.predict", f"checkpoint={trained}", f"source={images}", "threshold=0.01"]
    words += ["batch_size=1", f"hydra.run.dir={folder}"]
    command = shell.replace("TERM", "exec RUN").replace("RUN", " ".join(f"'{word}'" for word in words))
    process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if shell == "TERM":
        while not list(folder.glob("drawings/*")):
            time.sleep(0.02)
        process.terminate()
    _, err = process.communicate(timeout=300)
    assert (process.returncode, "Traceback" in err) == (143 if shell == "TERM" else 0, False)
    assert json.loads((folder / "detections.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------------------------------- streams


def test_readers_that_leave_closed_streams_and_plain_terminals_end_nothing(start: Callable[..., Training]) -> None:
    training = start(
        "trainer.max_steps=2", shell="PYTHONIOENCODING=ascii RUN 2>&- <&- | head -n 1; exit ${PIPESTATUS[0]}"
    )
    training.end(0)
    assert training.status == "ok"
    assert (training.folder / files.BEST_TOTAL).exists()


def test_the_reader_of_a_help_text_may_leave() -> None:
    command = f"'{sys.executable}' -m detr_exp.train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_names_of_any_alphabet_where_the_locale_knows_ascii_only(tmp_path: Path, tiny_run: list[str]) -> None:
    root, folder = tmp_path / "Daten 日本", tmp_path / "run"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for name in ("größe", "猫"):
        Image.new("RGB", (64, 64), "gray").save(root / "images" / f"{name}.png")
        (root / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.3 0.3\n1 0.3 0.3 0.2 0.2\n", encoding="utf-8")
    (root / "data.yaml").write_text("train: images\nval: images\nnames: [Tür, 猫]\n", encoding="utf-8")
    plain = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 exec RUN"
    words = [word for word in tiny_run if not word.startswith("data")]
    words += ["trainer.run_test=false", "data=yolo", f'data.root="{root}"', WORKERS]
    out, _ = Training(folder, words, shell=plain).end(0)
    assert out.isascii()
    assert "猫" in (folder / "config.yaml").read_text("utf-8") + (folder / "run.log").read_text("utf-8")


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Options -> a small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = []

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        made.append(folder)
        return folder

    yield mount
    for _ in made:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@AS_ROOT
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_that_fits(
    start: Callable[..., Training], mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=250m")
    training = start(
        *LONG, "trainer.checkpoint_every_steps=1", "trainer.checkpoint_interval=1", "trainer.keep_checkpoints=100",
        folder=disk / "run",
    )  # fmt: skip
    _, err = training.end(2)
    assert "No space left on device" in err
    assert "hydra.run.dir" in err
    assert training.step >= 1


@AS_ROOT
@pytest.mark.slow
def test_a_read_only_folder_is_said(start: Callable[..., Training], mounted: Callable[[str], Path]) -> None:
    _, err = start(folder=mounted("ro") / "run").end(2)
    assert "Read-only file system" in err


@AS_ROOT
@pytest.mark.slow
def test_shared_memory_that_is_too_small_is_said(start: Callable[..., Training]) -> None:
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec RUN"
    training = start(WORKERS, *LONG, "trainer.batch_size=8", shell='exec unshare -m bash -c "' + small + '"')
    _, err = training.end(1)
    assert "/dev/shm" in err
    assert "data.num_workers=1, or 0" in err


def limited(what: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (value, value))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "value", "status", "words"),
    [
        ("RLIMIT_FSIZE", 150_000, 2, "File too large"),
        ("RLIMIT_NOFILE", 24, 1, "Too many open files.*ulimit -n 4096.*data.num_workers=1, or 0"),
        ("RLIMIT_AS", 1_200_000_000, 1, "memory ran out"),
    ],
)
def test_limits_are_said_in_a_sentence(
    start: Callable[..., Training], what: str, value: int, status: int, words: str
) -> None:
    _, err = start(WORKERS, before=limited(getattr(resource, what), value)).end(status)
    assert re.search(words, err), err


# ------------------------------------------------------------------------------------------------------------- company


@pytest.mark.slow
def test_the_second_of_two_writers_is_refused_and_the_first_goes_on(start: Callable[..., Training]) -> None:
    first = start(*LONG, "trainer.max_steps=40")
    first.wait_for(1)
    _, err = start(*LONG).end(2)
    assert "is in use by another run; use another folder: hydra.run.dir=" in err
    first.end(0)
    assert first.status == "ok"


def test_every_row_of_the_page_names_a_test() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, test in named:
            assert f"def {test}(" in (ROOT / path).read_text("utf-8"), f"{path} has no {test}"
