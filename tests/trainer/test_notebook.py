"""Progress in a notebook, by a stand-in for its kernel."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from detr_exp.trainer import console
from detr_exp.trainer.console import Console


class Handle:
    """What `display` gives: the texts that the cell has shown, one after another."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, content: dict[str, str], raw: bool) -> None:
        self.shown.append(content["text/plain"])


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    handles: list[Handle] = []

    def display(content: dict[str, str], raw: bool, display_id: bool) -> Handle:
        handles.append(Handle())
        handles[-1].update(content, raw)
        return handles[-1]

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return handles


def test_one_line_for_everything_that_a_training_counts(lines: list[Handle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REDRAWN", 0.0)
    shown = Console("rich")
    with shown.progress("epoch 1/2", 3) as meter:
        meter(lambda: ["loss 1.5"])
        with shown.progress("evaluating val", 1):
            pass
        meter(advance=2)
    (line,) = lines
    assert line.shown[:2] == ["epoch 1/2  1/3  loss 1.5", "evaluating val  0/1  0.0 s left"]
    assert line.shown[-1] == "epoch 1/2  3/3  0.0 s left"


def test_it_changes_seldom_and_at_the_end(lines: list[Handle]) -> None:
    with Console(True).progress("epoch 1/1", 1000) as meter:
        for _ in range(1000):
            meter()
    assert len(lines[0].shown) < 20
    assert lines[0].shown[-1].startswith("epoch 1/1  1000/1000")


def test_none_where_it_is_switched_off_or_there_is_no_kernel(
    lines: list[Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Console("none").progress("epoch", 1) as meter:
        meter()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())  # IPython on a terminal
    with Console("rich").progress("epoch", 1) as meter:
        meter()
    assert not lines
