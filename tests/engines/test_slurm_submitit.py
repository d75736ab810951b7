"""Sweeps with `hydra/launcher=submitit_slurm` on real daemons: its signal before the time limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from slurm_cluster import SlurmCluster, wait_for
from slurm_sweep import APP_WORDS, LIMIT, Sweep

LAUNCHER = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture
def interrupted(sweep: Callable[..., Sweep], slurm: SlurmCluster) -> Callable[..., tuple[Sweep, str]]:
    """A sweep of one run that has received SIGUSR2, as SLURM sends it before submitit's time limit, and its job."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

    def start(*words: str) -> tuple[Sweep, str]:
        one = sweep(*APP_WORDS, *LAUNCHER, *words, "seed=5")
        for name in ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_NTASKS"):
            del one.environment[name]  # it passes on variables of a job from which the sweep is started
        (one.folder / "hold").touch()
        one.start()
        one.wait_for_files("2", 1)
        (id,) = slurm.run("squeue", "-h", "-t", "RUNNING", "-o", "%i").splitlines()
        slurm.run("scancel", "--signal=USR2", id)
        wait_for(one.ledger, LIMIT, one.log())
        (one.folder / "hold").unlink()
        return one, id

    return start


def test_a_run_saves_before_submitit_queues_it_again(
    interrupted: Callable[..., tuple[Sweep, str]], slurm: SlurmCluster
) -> None:
    one, id = interrupted("hydra.launcher.timeout_min=60")
    assert one.end() == 0, one.log()
    assert slurm.field(id, "Restarts") == "1"
    assert [(line["status"], line["metric"]) for line in one.ledger()] == [("killed", None), ("ok", 5.0)]


def test_a_run_that_submitit_gives_up_has_saved_and_is_not_failed(
    interrupted: Callable[..., tuple[Sweep, str]], slurm: SlurmCluster
) -> None:
    one, id = interrupted("hydra.launcher.timeout_min=10")  # it keeps ten minutes back: any signal is of the limit
    assert one.end() == 1
    assert slurm.field(id, "Restarts") == "0"
    assert [line["status"] for line in one.ledger()] == ["killed"]
    assert "the same command runs only those" in one.log()
    one.start()
    assert one.end() == 0, one.log()
    assert [(line["status"], line["metric"]) for line in one.ledger()[1:]] == [("ok", 5.0)]
