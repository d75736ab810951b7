"""How the bench scripts judge what they measured, and what they write down."""

from __future__ import annotations

from types import ModuleType

import measure as module
import pytest


@pytest.fixture(name="measure")
def measure_without_its_page(tmp_path, monkeypatch) -> ModuleType:
    monkeypatch.setattr(module, "PAGE", tmp_path / "performance.md")
    return module


def test_what_is_missed(measure):
    row = measure.Row
    assert not row("a", 0.5, gate=0.5).is_missed
    assert row("a", 0.51, gate=0.5).is_missed
    assert row("a", float("nan"), gate=0.5).is_missed
    assert not row("a", 0.9).is_missed
    assert not row("a", 0.9, gate=0.5, skipped="no AMX").is_missed
    assert row("a", 0.1, gate=0.5, fault="other values").is_missed
    assert row("a", 0.9, gate=0.5, skipped="no AMX").verdict == "not judged: no AMX"


def test_a_ratio_is_the_median_of_the_rounds(measure):
    times = {"ours": [1.0, 8.0, 1.0], "peer": [2.0, 2.0, 4.0]}
    assert measure.ratio(times) == 0.5
    row = measure.beside("a", times, gate=0.6)
    assert (row.value, row.peer, row.detail, row.is_missed) == (0.5, "peer", "1000 / 2000 ms", False)


def test_contenders_take_turns(measure):
    calls = []
    times = measure.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert "".join(calls) == "ababab"  # the first of each is not timed
    assert [len(values) for values in times.values()] == [2, 2]


def test_a_section_replaces_itself_and_leaves_the_others(measure):
    def write(name: str, title: str, value: float) -> str:
        rows = [measure.Row("part", value, "peer", gate=0.5), measure.Row("shown", 0.123456)]
        measure.write(name, measure.Section(title, rows, text="What | how.", packages=()), rounds=3)
        return measure.PAGE.read_text()

    write("start", "Start", 0.25)
    write("steps", "Training step", 0.75)
    page = write("start", "Start", 0.125)
    assert page.count("## ") == 2
    assert page.index("## Training step") < page.index("## Start")
    assert "0.250" not in page
    summary = page.partition("<!--")[0]
    assert "| [Start](#start) | part | 0.125 | peer | <= 0.50 | ok |" in summary
    assert "| [Training step](#training-step) | part | 0.750 | peer | <= 0.50 | MISSED |" in summary
    assert "shown" not in summary
    assert "`python scripts/bench_start.py`, 3 rounds" in page
