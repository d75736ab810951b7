"""Sweeps with `hydra/launcher=slurm` on real daemons: what may happen to jobs, and to the sweep's own process."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_for
from slurm_sweep import APP_WORDS, LAUNCHER, LIMIT, Sweep

from detr_exp.runs.swept import hash_in


def test_a_run_that_dies_takes_nothing_with_it(sweep: Callable[..., Sweep]) -> None:
    one = sweep(*APP_WORDS, *LAUNCHER, "seed=100,101,2")
    one.start()
    assert one.end() == 1
    ended = {line["number"]: (line["status"], line["metric"], line["reason"]) for line in one.ledger()}
    assert ended == {
        0: ("failed", None, "its process was ended by SIGKILL"),
        1: ("failed", None, "KeyError: 'no such thing'"),
        2: ("ok", 2.0, None),
    }
    logs = "".join((run / "job.log").read_text() for run in one.runs())
    assert f"from 0 ['yes', '1', '1'] {one.folder}" in logs, "variables of the user, not those of another job"


def through_the_worst(
    one: Sweep, slurm: SlurmCluster, ids: dict[str, str], at_limit: Callable[[str], tuple[str, ...]]
) -> tuple[list[str], str, str]:
    """Lose the machine of the first job, cancel one of the others, bring one to its time limit, and end the sweep.

    Args:
        one: a sweep of four jobs on two machines, which its own process has left.
        slurm: where they run.
        ids: of the jobs, by the names of their runs.
        at_limit: the command that has SLURM send a job the signal which it sends before the time limit.

    Returns:
        names of the runs that lost their machine, of the cancelled one, and of the one at its limit.
    """
    dying = slurm.field(ids[min(ids)], "NodeList")
    lost = [name for name, id in ids.items() if slurm.field(id, "NodeList") == dying]
    cancelled, limited = [name for name in ids if name not in lost]
    slurm.kill(dying)
    try:
        slurm.run("scancel", ids[cancelled])
        assert slurm.ended(ids[cancelled], LIMIT) == "CANCELLED"
        slurm.run(*at_limit(ids[limited]))
        wait_for(lambda: slurm.field(ids[limited], "JobState") == "PENDING", LIMIT, "it was not queued again")
        slurm.run("scontrol", "update", f"JobId={ids[limited]}", "TimeLimit=UNLIMITED")  # room for the rest of it
        one.start()
        (one.folder / "hold").unlink()
        assert one.end() == 0, one.log()
    finally:
        slurm.boot(dying)
    assert "ended by SIGUSR1" in (one.folder / "s" / limited / "job.log").read_text()
    assert {slurm.field(ids[name], "Restarts") for name in (*lost, limited)} == {"1"}
    assert {line["hash"]: line["status"] for line in one.ledger()} == dict.fromkeys(map(hash_in, ids), "ok")
    return lost, cancelled, limited


@pytest.mark.smoke
def test_everything_at_once(sweep: Callable[..., Sweep], slurm: SlurmCluster) -> None:
    """One cancelled, one at its time limit, two on a machine that dies; the sweep's process is killed meanwhile."""
    one = sweep(*APP_WORDS, *LAUNCHER, "seed=1,2,3,4")
    (one.folder / "hold").touch()
    one.start()
    one.wait_for_files("2", 4)
    ids = {name: id for name, (id,) in one.jobs().items()}
    one.stop(signal.SIGKILL)
    (one.folder / "s" / min(ids) / ".job" / "started.json").unlink()  # as if it had been killed just after submitting

    lost, cancelled, limited = through_the_worst(
        one, slurm, ids, lambda id: ("scancel", "--batch", "--signal=USR1", id)
    )
    again = {name: len(ids) - 1 for name, ids in one.jobs().items()}
    assert again == dict.fromkeys(lost, 0) | {limited: 0, cancelled: 1}, "only a cancelled one is submitted again"
    assert sorted(line["hash"] for line in one.ledger() if line["status"] == "killed") == sorted(
        map(hash_in, (cancelled, limited))
    )
    ranked = [int(line.split()[0]) for line in one.log().split("best first")[1].splitlines()[2:6]]
    assert ranked == [3, 2, 1, 0]
    for name in (cancelled, limited):
        log = (one.folder / "s" / name / "job.log").read_text()
        assert [line.split()[1] for line in log.splitlines() if line.startswith("from")] == ["0", "2"], log


def test_a_sweep_that_ends_lets_its_jobs_save_and_continues_them(sweep: Callable[..., Sweep]) -> None:
    one = sweep(*APP_WORDS, *LAUNCHER, "seed=1,2", "hydra.launcher.slots=2")
    (one.folder / "hold").touch()
    one.start()
    one.wait_for_files("2", 2)
    assert one.stop(signal.SIGINT) == 130
    assert [line["status"] for line in one.ledger()] == ["killed", "killed"]
    (one.folder / "hold").unlink()
    one.start()
    assert one.end() == 0, one.log()
    assert [line["status"] for line in one.ledger()[2:]] == ["ok", "ok"]


def test_a_terminal_that_is_closed_leaves_the_jobs(sweep: Callable[..., Sweep], slurm: SlurmCluster) -> None:
    one = sweep(*APP_WORDS, *LAUNCHER, "seed=1")
    (one.folder / "hold").touch()
    one.start()
    one.wait_for_files("2", 1)
    assert one.stop(signal.SIGHUP) == 129
    (one.folder / "hold").unlink()
    ((name, (id,)),) = one.jobs().items()
    assert slurm.ended(id, LIMIT) == "COMPLETED"
    assert [line["status"] for line in one.ledger()] == ["ok"], "recorded by the job itself"
    one.start()
    assert one.end() == 0, one.log()
    assert one.jobs() == {name: [id]}


def test_a_refused_job_ends_the_sweep_with_what_sbatch_says(sweep: Callable[..., Sweep]) -> None:
    one = sweep(*APP_WORDS, *LAUNCHER, "hydra.launcher.sbatch.partition=none", "seed=1,2")
    one.start()
    assert one.end() == 2
    assert "invalid partition specified: none" in one.log()
    assert "Traceback" not in one.log()


def test_a_machine_that_does_not_share_the_folder_is_named(sweep: Callable[..., Sweep], slurm: SlurmCluster) -> None:
    one = sweep(*APP_WORDS, *LAUNCHER, "+hydra.launcher.sbatch.nodelist=n2", "seed=1")
    slurm.hide("n2", one.folder)
    try:
        one.start()
        assert one.end() == 1
        ((status, reason),) = [(line["status"], line["reason"]) for line in one.ledger()]
        assert status == "failed"
        assert "does not see the run folder; start the sweep in a folder that all machines share" in reason
    finally:
        slurm.kill("n2")
        slurm.boot("n2")


def test_a_job_that_its_machine_cannot_queue_again_is_submitted_again(
    sweep: Callable[..., Sweep], slurm: SlurmCluster
) -> None:
    one = sweep(*APP_WORDS, *LAUNCHER, "+hydra.launcher.sbatch.nodelist=n2", "seed=1")
    (one.folder / "hold").touch()
    slurm.take_away("n2", "scontrol")
    try:
        one.start()
        one.wait_for_files("2", 1)
        ((id,),) = one.jobs().values()
        slurm.run("scancel", "--batch", "--signal=USR1", id)
        assert slurm.ended(id, LIMIT) == "FAILED"
        (one.folder / "hold").unlink()
        assert one.end() == 0, one.log()
    finally:
        slurm.kill("n2")
        slurm.boot("n2")
    assert [line["status"] for line in one.ledger()] == ["killed", "ok"]
    assert "no scontrol to queue it again" in one.log()


def test_four_trainings_end_with_the_same_bits_as_without_an_engine(
    sweep: Callable[..., Sweep],
    slurm: SlurmCluster,
    some_seconds: list[str],
    differences: Callable[[Path, Path], list[str]],
) -> None:
    """One cancelled, one over its time limit, two on a machine that dies; the sweep's process is killed meanwhile."""
    words = [word for word in some_seconds if not word.startswith("tracker")]
    words += ["tracker=mlflow", "tracker.tracking_uri=sqlite:///mlflow.db", "seed=1,2,3,4", "optim.lr=1e-3"]
    words += ["allow_targets=[held_shapes]", "data.source._target_=held_shapes.held"]
    common = ["-m", "detr_exp.train", "--multirun", *words]
    one = sweep(*common, "hydra.sweep.dir=s", *LAUNCHER)
    (one.folder / "hold").touch()
    one.start()
    one.wait_for_files("checkpoint.pth", 4)
    ids = {name: id for name, (id,) in one.jobs().items()}
    one.stop(signal.SIGKILL)

    # five minutes before the end it saves
    through_the_worst(one, slurm, ids, lambda id: ("scontrol", "update", f"JobId={id}", "EndTime=now+4minutes"))

    alone = subprocess.run(
        [sys.executable, *common, "hydra.sweep.dir=alone"],
        cwd=one.folder,
        env=one.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    for name in ids:
        found = differences(one.folder / "s" / name, one.folder / "alone" / name)
        assert [place for place in found if ".config.trainer.resume" not in place] == []
    table, expected = (text.split("best first")[1].splitlines()[2:6] for text in (one.log(), alone.stdout))
    assert [line.split()[:4] for line in table] == [line.split()[:4] for line in expected]
    with sqlite3.connect(one.folder / "mlflow.db") as store:
        states = store.execute("select count(*), status from runs group by status").fetchall()
        assert states == [(10, "FINISHED")], "twice four runs and their parents"
        twice = "select key from metrics where key not like 'system/%' group by run_uuid, key, step having count(*) > 1"
        assert [key for (key,) in store.execute(twice) if not key.startswith("time/")] == []
