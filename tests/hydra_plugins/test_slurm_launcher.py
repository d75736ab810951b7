"""What the SLURM launcher makes of its settings, and of answers that a real cluster gives too rarely."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp import train
from detr_exp.config.mistakes import ConfigError
from detr_exp.trainer.run_status import status_of
from hydra_plugins.detr_exp import slurm_launcher
from hydra_plugins.detr_exp._pool import Work
from hydra_plugins.detr_exp.slurm_launcher import Listed, SlurmLauncher, literal, name_of

Commands = Callable[..., None]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Puts scripts on the PATH: name -> what it does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_launcher, "PAUSE", 0.0)

    def put(**scripts: str) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{text}\n")
            (folder / name).chmod(0o755)

    put(squeue="", sacct="exit 1")
    return put


@pytest.fixture
def launcher() -> SlurmLauncher:
    made = SlurmLauncher({"time": "1:00:00", "mem": None, "exclusive": True}, 300, 4, 0.1)
    made.known = {}
    return made


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(
        "b0", ["python", "a b"], tmp_path / "100% sweep" / "b0", {"MINE": "1"}, tmp_path / "100% sweep/b0/job.log"
    )


@pytest.mark.parametrize("limit", ["0:07:00", "24:00:00", "7-00:00:00", None])
def test_time_limits(limit: str | None) -> None:
    options = SlurmLauncher({"time": limit}, 300, 1, 1.0).options
    assert [one for one in options if one.startswith("--time")] == ([] if limit is None else [f"--time={limit}"])


@pytest.mark.parametrize("limit", [86400, 60, "60", "30:00", "0:06:59", "soon", "1-12"])
def test_time_limits_that_are_too_short_or_of_unknown_unit_are_refused(limit: object) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.s"):
        SlurmLauncher({"time": limit}, 300, 1, 1.0)


@pytest.mark.parametrize("name", ["array", "--partition", "p", "signal", "output", "ntasks", "no-requeue"])
def test_options_that_contradict_the_launcher_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.launcher\."):
        SlurmLauncher({name: 1}, 300, 1, 1.0)


def test_a_job_is_submitted_with_its_options_and_without_those_of_another_job(
    commands: Commands, launcher: SlurmLauncher, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SLURM_CONF", "here")
    commands(sbatch='for one in "$@"; do echo "$one" >> words; done; env > environment; cat > script; echo "7;cluster"')
    assert launcher.start(work) == ("7", "the queue")
    words = (tmp_path / "words").read_text().splitlines()
    assert {"--time=1:00:00", "--exclusive", "--requeue", "--signal=B:USR1@300"} <= set(words)
    assert not any(word.startswith("--mem") for word in words)
    assert f"--output={tmp_path}/100%% sweep/b0/job.log" in words
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"SLURM_CONF=here", "MINE=1"} <= set(environment)
    assert not any(line.startswith("SLURM_MEM") for line in environment)
    assert "python 'a b' &" in (tmp_path / "script").read_text()


def test_a_controller_that_does_not_answer_may_have_accepted_the_job(
    commands: Commands, launcher: SlurmLauncher, work: Work, tmp_path: Path
) -> None:
    line = f"7|PENDING||Priority|{name_of(work)}"
    says = "echo 'Socket timed out on send/recv operation' >&2; exit 1"
    commands(sbatch=f"echo '{line}' > queue; echo submitted >> count; {says}", squeue="cat queue")
    assert launcher.start(work) == ("7", "the queue (Priority)")
    assert (tmp_path / "count").read_text() == "submitted\n", "not twice"


@pytest.mark.parametrize(("state", "id"), [("RUNNING", "7"), ("COMPLETING", "7"), ("CANCELLED", "8"), ("FAILED", "8")])
def test_a_job_of_an_earlier_process_is_taken_over_unless_it_has_ended_since(
    commands: Commands, launcher: SlurmLauncher, work: Work, state: str, id: str
) -> None:
    launcher.known = {name_of(work): Listed("7", "COMPLETING", "n1", "None", name_of(work))}
    commands(sbatch="echo 8", squeue=f"echo '7|{state}|n1|None|{name_of(work)}'", scontrol="echo ExitCode=1:0")
    assert launcher.start(work)[0] == id


def test_a_full_queue_is_waited_for(commands: Commands, launcher: SlurmLauncher, work: Work) -> None:
    commands(sbatch="[ -e tried ] && exec echo 9; touch tried; echo 'error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    assert launcher.start(work)[0] == "9"


def test_what_sbatch_refuses_is_said(commands: Commands, launcher: SlurmLauncher, work: Work) -> None:
    commands(sbatch="echo 'error: invalid partition specified: none' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"invalid partition specified: none; .*hydra\.launcher\.sbatch"):
        launcher.start(work)


def test_silence_says_nothing_about_jobs(commands: Commands, launcher: SlurmLauncher) -> None:
    commands(squeue="echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1")
    assert launcher.poll(["7"])["7"].error is None


@pytest.mark.parametrize(
    ("line", "status", "lost", "words"),
    [
        ("RUNNING|n1", None, False, ""),
        ("COMPLETING|n1", None, False, ""),
        ("REQUEUED|", None, False, ""),
        ("PREEMPTED|n1", None, False, ""),
        ("SPECIAL_EXIT|", None, False, ""),
        ("CANCELLED|n1", "killed", False, "cancelled"),
        ("TIMEOUT|n1", "killed", True, "time limit"),
        ("NODE_FAIL|n1", "killed", True, "machine"),
        ("OUT_OF_MEMORY|n1", "oom", False, "memory"),
        ("COMPLETED|n1", "failed", False, "without a result"),
        ("FAILED 137:0|n1", "failed", False, "SIGKILL"),
        ("FAILED 0:9|n1", "failed", False, "SIGKILL"),
        ("FAILED 75:0|n1", "killed", False, "SIGUSR1"),
        ("FAILED 69:0|n1", "killed", True, "scontrol"),
        ("FAILED 72:0|n1", "failed", False, "hydra.sweep.dir"),
        ("FAILED 3:0|n1", "failed", False, "status 3"),
        ("FAILED 0:53|n1", "failed", False, "hydra.sweep.dir"),
        ("FAILED 0:125|n1", "failed", False, "0:125"),
        ("FAILED 255:0|n1", "failed", False, "255:0"),
    ],
)
def test_states(
    commands: Commands, launcher: SlurmLauncher, line: str, status: str | None, lost: bool, words: str
) -> None:
    name, machine = line.split("|")
    name, _, code = name.partition(" ")
    commands(squeue=f"echo '7|{name}|{machine}|None|x|y'", scontrol=f"echo 'JobState={name} ExitCode={code} x'")
    state = launcher.poll(["7"])["7"]
    assert (None if state.error is None else status_of(state.error), state.lost) == (status, lost)
    assert words in str(state.error)


def test_a_job_that_waits_for_somebody_is_reported_once(
    commands: Commands, launcher: SlurmLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(squeue="echo '7|PENDING||launch failed requeued held|x'")
    assert [launcher.poll(["7"])["7"].error for _ in range(2)] == [None, None]
    assert capsys.readouterr().out.count("scontrol release 7") == 1


@pytest.mark.parametrize(
    ("answer", "status", "lost"),
    [
        ("echo 'CANCELLED by 1000|0:15|n1'", "killed", False),
        ("echo 'FAILED|1:0|n1'", "failed", False),
        ("echo 'PREEMPTED|0:0|n1'", "killed", True),
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", "killed", True),
        ("", "killed", True),
    ],
)
def test_a_job_that_has_left_the_queue_is_looked_up(
    commands: Commands, launcher: SlurmLauncher, answer: str, status: str, lost: bool
) -> None:
    commands(sacct=answer)
    state = launcher.poll(["7"])["7"]
    assert (status_of(state.error), state.lost) == (status, lost)


def test_names_are_one_word_and_differ_with_the_folder(work: Work) -> None:
    other = work._replace(folder=work.folder.parent.parent / "other" / "b0")
    names = {name_of(work), name_of(other)}
    assert len(names) == 2
    assert all(set("|%, ").isdisjoint(name) for name in names)
    assert literal(Path("/a%j\\b")) == "/a%%j\\\\b"


def test_without_slurm_it_says_so(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert command(train.main, "--multirun", "hydra/launcher=slurm", "seed=0,1") == 2
    assert "sbatch" in (said := capfd.readouterr().err)
    assert "hydra/launcher=local" in said
