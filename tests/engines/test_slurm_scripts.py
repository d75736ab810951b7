"""`scripts/slurm/` as they are, on real daemons: signals before the time limit, preemptions, lost machines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_for

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "slurm"
LIMIT = 900.0  # seconds for a training of some seconds on a busy machine
Differences = Callable[[Path, Path], list[str]]


@pytest.fixture(scope="module")
def undisturbed(some_seconds: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same training without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = [*some_seconds, f"hydra.run.dir={folder}/run"]
    command = [sys.executable, "-m", "detr_exp.train", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "run"


class Job:
    """A submitted script.

    Args:
        folder: in which it is submitted.
        options: of sbatch.
        overrides: arguments of the script.
    """

    def __init__(
        self, slurm: SlurmCluster, folder: Path, script: str, options: list[str], overrides: list[str]
    ) -> None:
        self.slurm, self.folder = slurm, folder
        common = ["--parsable", "--output=job.log", f"--chdir={folder}", "--cpus-per-task=1", "--time=60"]
        self.id = slurm.run("sbatch", *common, *options, str(SCRIPTS / script), *overrides)
        self.run = folder / "outputs" / self.id

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else "no log"

    def wait_for_checkpoint(self) -> None:
        """Wait until it has saved, and has not ended."""

        def is_there() -> bool:
            assert self.field("JobState") in ("RUNNING", "PENDING", "CONFIGURING"), self.log()
            return (self.run / "checkpoint.pth").exists()

        wait_for(is_there, LIMIT, "no checkpoint")

    def field(self, name: str) -> str:
        return self.slurm.field(self.id, name)

    def ended(self) -> str:
        return self.slurm.ended(self.id, LIMIT)


@pytest.mark.smoke
def test_a_training_saves_before_its_time_limit_and_resumes(
    slurm: SlurmCluster, some_seconds: list[str], undisturbed: Path, differences: Differences, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "train.sh", [], some_seconds)
    job.wait_for_checkpoint()
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # as SLURM does for --signal=B:USR1@300
    assert job.ended() == "COMPLETED", job.log()
    assert job.field("Restarts") == "1"
    assert "resumed" in job.log()
    assert differences(job.run, undisturbed) == []


def test_a_preempted_training_resumes(
    slurm: SlurmCluster, some_seconds: list[str], undisturbed: Path, differences: Differences, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "train.sh", ["--exclusive", "--nodelist=n1"], some_seconds)
    job.wait_for_checkpoint()
    slurm.run("sbatch", "-p", "high", "-w", "n1", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    assert job.ended() == "COMPLETED", job.log()
    assert job.field("Restarts") == "1"
    assert "ended by SIGTERM" in job.log()
    assert differences(job.run, undisturbed) == []


def test_a_training_whose_machine_dies_resumes_on_another(
    slurm: SlurmCluster, some_seconds: list[str], undisturbed: Path, differences: Differences, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "train.sh", [], some_seconds)
    job.wait_for_checkpoint()
    machine = job.field("NodeList")
    slurm.kill(machine)
    try:
        assert job.ended() == "COMPLETED", job.log()
        assert job.field("NodeList") != machine
    finally:
        slurm.boot(machine)
    assert differences(job.run, undisturbed) == []


def test_a_cancelled_training_saves_and_stays_cancelled(
    slurm: SlurmCluster, some_seconds: list[str], tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "train.sh", [], some_seconds)
    job.wait_for_checkpoint()
    slurm.run("scancel", job.id)
    assert job.ended() == "CANCELLED"
    wait_for(lambda: "ended by SIGTERM" in job.log(), 30, job.log())


def test_a_failed_training_is_not_started_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "train.sh", [], ["model.weights=missing.pth"])
    assert job.ended() == "FAILED"
    assert (job.field("ExitCode"), job.field("Restarts")) == ("2:0", "0"), job.log()


def test_a_time_limit_that_leaves_no_time_to_save_is_not_tried_for_ever(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "detr_exp").mkdir()  # `python -m` finds it before the installed one
    (tmp_path / "detr_exp" / "__init__.py").touch()
    (tmp_path / "detr_exp" / "train.py").write_text("raise SystemExit(75)")
    job = Job(slurm, tmp_path, "train.sh", [], [])
    assert job.ended() == "FAILED"
    assert (job.field("ExitCode"), job.field("Restarts")) == ("75:0", "3"), job.log()


MACHINES = ["--nodes=2", "--exclusive", "--partition=grace"]


@pytest.fixture(scope="module")
def on_two_machines(slurm: SlurmCluster, some_seconds: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training on two machines that nothing happens to."""
    job = Job(slurm, tmp_path_factory.mktemp("two"), "train_machines.sh", MACHINES, some_seconds)
    assert job.ended() == "COMPLETED", job.log()
    return job.run


@pytest.mark.parametrize("how", ["time limit", "preemption"])
def test_two_machines_save_and_resume(
    how: str,
    slurm: SlurmCluster,
    some_seconds: list[str],
    on_two_machines: Path,
    differences: Differences,
    tmp_path: Path,
) -> None:
    job = Job(slurm, tmp_path, "train_machines.sh", MACHINES, some_seconds)
    job.wait_for_checkpoint()
    if how == "time limit":
        slurm.run("scancel", "--batch", "--signal=USR1", job.id)
    else:
        slurm.run("sbatch", "-p", "high", "--nodes=2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    assert job.ended() == "COMPLETED", job.log()
    assert job.field("Restarts") == "1"
    assert "resumed" in job.log()
    assert differences(job.run, on_two_machines) == []
