"""Sweeps of real trainings, in processes of their own."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

TRAIN = [sys.executable, "-m", "detr_exp.train", "--multirun", "hydra.sweep.dir=s", "hydra/launcher=local"]
MLFLOW = "tracker.tracking_uri=sqlite:///mlflow.db"

pytestmark = pytest.mark.slow


def ledger(folder: Path) -> list[dict[str, Any]]:
    path = folder / "s" / "sweep.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_eight_at_once_on_a_store_that_is_not_there_yet(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [override for override in tiny_run if not override.startswith("tracker")]
    command = [*TRAIN, *overrides, MLFLOW, "hydra.launcher.slots=8", "seed=range(8)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    store = sqlite3.connect(tmp_path / "mlflow.db")
    identity = json.loads((tmp_path / "s" / "parent.json").read_text())["id"]
    rows = store.execute("select run_uuid from tags where key = 'detr_exp.run' and value = ?", [identity])
    ((parent,),) = rows.fetchall()
    runs = [run for (run,) in store.execute("select run_uuid from runs where status = 'FINISHED'") if run != parent]
    assert len(runs) == 8
    parents = store.execute("select value from tags where key = 'mlflow.parentRunId'").fetchall()
    assert parents == [(parent,)] * 8
    counted = "select count(*) from metrics where run_uuid = ? and key = ? group by step"
    for run in runs:
        for name in ("val/mAP", "best/mAP", "train/loss"):
            assert store.execute(counted, [run, name]).fetchall() == [(1,)], f"{name}: there, and not twice"
    best = max(line["metric"] for line in ledger(tmp_path))
    copied = dict(store.execute("select key, value from latest_metrics where run_uuid = ?", [parent]))
    assert copied["best/monitor"] == copied["best/mAP"] == best


def test_a_killed_sweep_ends_as_if_nothing_had_happened(tiny_run: list[str], tmp_path: Path) -> None:
    """Finished runs are skipped, and a half-done one gives the same bits."""
    command = [
        *(*TRAIN, *tiny_run, "hydra.launcher.slots=1", "seed=1,2", "trainer.deterministic=true"),
        *("trainer.epochs=12", "trainer.max_steps=null", "trainer.log_every_steps=1"),
    ]
    folders = {}
    for name in ("undisturbed", "killed"):
        folder = folders[name] = tmp_path / name
        folder.mkdir()
        if name == "killed":
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
            try:
                deadline = time.monotonic() + 600
                while time.monotonic() < deadline and not is_half_done(folder):
                    time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
            assert len(ledger(folder)) == 1, "the second run is half-done"
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = ({line["hash"]: line["metric"] for line in ledger(folder)} for folder in folders.values())
    assert one == other
    assert len(ledger(folders["killed"])) in (2, 3), "with a line of the run that saw its sweep go"
    for job in one:
        first, second = (
            torch.load(next(folder.glob(f"s/*{job}")) / "checkpoint.pth", weights_only=True)
            for folder in folders.values()
        )
        assert first["step"] == second["step"] == 24
        for kind in ("model", "ema"):
            assert_same_bits(first[kind], second[kind])


def is_half_done(folder: Path) -> bool:
    if len(ledger(folder)) != 1:
        return False
    (done,) = ledger(folder)
    return any(not path.parent.name.endswith(done["hash"]) for path in (folder / "s").glob("*/checkpoint.pth"))


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    else:
        assert one == other
