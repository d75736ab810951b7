"""Sweeps of tasks that take no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from detr_exp import cli


class Swept(NamedTuple):
    """What a sweep command left behind."""

    status: int
    out: str
    err: str
    lines: list[dict[str, Any]]


@pytest.fixture
def sweep(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., Swept]:
    """Runs a task under `--multirun` in the folder `s` of an empty folder."""

    def run(task: Callable[[Any], Any], *overrides: str) -> Swept:
        capsys.readouterr()
        folder = ("hydra.sweep.dir=s", "hydra.output_subdir=.hydra")  # which a training writes itself
        status = command(lambda: cli.main(task, "config", ""), "--multirun", "tracker=none", *folder, *overrides)
        printed = capsys.readouterr()
        ledger = Path("s/sweep.jsonl")
        lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
        return Swept(status, printed.out, printed.err, lines)

    return run
