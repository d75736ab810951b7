"""Tests with real schedulers, stores and machines, which they start and stop on this machine: `make test-engines`.

All of them have the marker `engines`, and are in no other run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from slurm_cluster import SlurmCluster, missing
from slurm_sweep import APP, Sweep

HERE = Path(__file__).parent
COMPARE = HERE.parents[1] / "scripts" / "kill_and_resume.py"


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("engines")


@pytest.fixture(scope="session")
def absent() -> Callable[[str], NoReturn]:
    """Skips a test because its engine is not here; where CI runs as root, which could install it, the test fails."""

    def say(reason: str) -> NoReturn:
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(f"{reason}, and CI may not skip it")
        pytest.skip(reason)

    return say


@pytest.fixture(scope="session")
def some_seconds(tiny_run: list[str]) -> list[str]:
    """Overrides of a deterministic training of 24 steps, which takes seconds: there is time to interrupt it."""
    words = [word for word in tiny_run if not word.startswith(("trainer.epochs", "trainer.max_steps"))]
    longer = ["trainer.epochs=12", "trainer.log_every_steps=1", "trainer.deterministic=true"]
    return [*words, *longer, "trainer.hardware.threads=1"]


@pytest.fixture(scope="session")
def differences() -> Callable[[Path, Path], list[str]]:
    """(run folder, run folder) -> where their checkpoints and metrics are not equal bit for bit.

    Without whether each was to resume: `trainer.resume`, which their configs in the checkpoints hold.
    """
    spec = importlib.util.spec_from_file_location("kill_and_resume", COMPARE)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return lambda one, two: [found for found in script.compare(one, two) if ".config.trainer.resume:" not in found]


@pytest.fixture(scope="session")
def slurm(absent: Callable[[str], NoReturn]) -> Iterator[SlurmCluster]:
    """A SLURM cluster of two machines."""
    if reason := missing():
        absent(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def sweep(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    started: list[Sweep] = []

    def new(*words: str) -> Sweep:
        (tmp_path / "app.py").write_text(APP)
        started.append(Sweep(slurm, tmp_path, *words))
        return started[-1]

    yield new
    for one in started:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()
            one.process.wait()
    slurm.run("scancel", "--user=root")
