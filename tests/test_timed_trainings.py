"""Trainings whose CPU time is counted: the sitting's limit, and the table."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def timed():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("timed_trainings")
    finally:
        sys.path.remove(str(SCRIPTS))


def test_a_process_is_ended_when_the_sitting_is_over(timed, tmp_path):
    sitting = timed.Sitting(0.3)
    place = timed.Place(tmp_path, tmp_path, tmp_path, "file", sitting)
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    status, seconds = place._watched(process)
    assert status in timed.INTERRUPTED
    assert 0.3 <= seconds < 10
    assert sitting.spent == seconds
    assert sitting.is_over
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert timed.Place(tmp_path, tmp_path, tmp_path, "file", timed.Sitting(60))._watched(process)[0] == 3


def test_unfinished_trainings_wait_for_the_next_sitting_and_finished_ones_are_not_repeated(
    timed, tmp_path, monkeypatch
):
    monkeypatch.setattr(timed.Place, "set", lambda self, name: None)
    ends = iter([(143, 2.0), (0, 3.0)])
    monkeypatch.setattr(timed.Place, "_watched", lambda self, process: next(ends))
    monkeypatch.setattr(subprocess, "Popen", lambda command, **streams: command)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    place = timed.Place(tmp_path, tmp_path, tmp_path, "file", timed.Sitting(100.0))
    assert place.train("run", "cards", ["seed=0"], ["run"]) is None
    assert place.train("run", "cards", ["seed=0"], ["run"]) == 5.0
    assert place.train("run", "cards", ["seed=0"], ["run"]) == 5.0, "no third process"
    place.sitting.spent = 100.0
    assert place.train("other", "cards", [], []) is None


def test_a_row_has_the_paired_difference_of_the_means(timed):
    rng = np.random.default_rng(0)

    def arm(shift):
        return [
            [{"mAP": 0.5 + shift + 0.01 * seed, "drawn": list(noise + 0.5 + shift), "images": 40}] for seed in (0, 1, 2)
        ]

    noise = rng.normal(0, 0.01, 50)
    found = timed.compared(arm(0.02), arm(0.0))
    assert found.value == pytest.approx(0.02)
    assert timed.row("cards", arm(0.02), arm(0.0), "45%").startswith("| cards | 3 | 0.5100 | 0.5300 | +0.0200 (")
