"""What a person sees while a run trains."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable

import pytest

from detr_exp.terminal import ConsoleHandler, say
from detr_exp.trainer import console as module
from detr_exp.trainer.console import Console, class_table


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Screen]:
    def make(columns: int, term: str = "xterm") -> Screen:
        stream = Screen()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", term)
        return stream

    return make


FIELDS = ["loss 1.2345", "mAP 0.123", "mAP50 0.234", "12.3 images/s", "1.0 GiB", "lr 0.0001", "2:10:33 left"]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_fields_stay_whole_on_any_terminal(screen: Callable[..., Screen], columns: int) -> None:
    shown = screen(columns)
    Console("rich").fields("epoch 1/2", FIELDS)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert "  ".join(line.strip() for line in lines) == "  ".join(["epoch 1/2", *FIELDS])
    assert len(lines) == {40: 3, 80: 2, 200: 1}[columns]


def test_without_a_terminal_a_line_stays_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console("rich").fields("epoch 1/2", FIELDS * 9)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(("term", "bar"), [("xterm-256color", "rich"), ("dumb", "none"), ("unknown", "none")])
def test_a_terminal_that_cannot_draw_gets_lines(screen: Callable[..., Screen], term: str, bar: str) -> None:
    screen(80, term)
    assert Console("rich").bar == bar


@pytest.mark.parametrize("term", ["dumb", None])
def test_lines_show_loss_and_time_left(
    screen: Callable[..., Screen],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    term: str | None,
) -> None:
    shown = screen(80, term) if term else None
    monkeypatch.setattr(module, "PRINTED", 0.0)
    with Console("rich").progress("epoch 1/2", 3) as meter:
        meter(lambda: FIELDS)
        meter()
    text = shown.getvalue() if shown else capsys.readouterr().out
    said = text.replace("\n    ", "  ").splitlines()
    assert said[0] == "  ".join(["epoch 1/2", "1/3", *FIELDS])
    assert said[1].startswith("epoch 1/2  2/3  0.0 s left")
    assert "\x1b" not in "".join(said)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_bar_fits_and_shows_the_most_important_first(
    screen: Callable[..., Screen], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    shown = screen(columns)
    monkeypatch.setattr(module, "REDRAWN", 0.0)
    with Console("rich").progress("epoch 12/100", 1000) as meter:
        meter(lambda: FIELDS, advance=500)
    *_, last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).strip().splitlines()[-1].split("\r")
    assert last.startswith("epoch 12/100 ━")
    assert " 500/1000 loss 1.2345  mAP 0.123" in last
    assert "…" not in last
    assert len(last) <= columns
    assert last.endswith("2:10:33 left") is (columns == 200)


def test_a_text_beside_the_bar_is_only_asked_for_when_it_is_drawn(screen: Callable[..., Screen]) -> None:
    screen(80)
    asked: list[int] = []
    with Console("rich").progress("epoch 1/2", 1000) as meter:
        for step in range(1000):
            meter(lambda step=step: asked.append(step) or [])
    assert len(asked) < 500


def test_wide_characters_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"class": name, "objects": 3, "AP": 0.5, "f1": -1.0} for name in ("猫", "dog", "x" * 99)]
    Console("none").table(class_table("bbox", [*rows, {"class": "absent", "objects": 0, "AP": -1.0, "f1": 0.0}]))
    head, *lines = capsys.readouterr().out.rstrip("\n").splitlines()
    assert head.split() == ["bbox", "objects", "AP", "F1"]
    assert [line.split()[1:] for line in lines] == [["3", "0.500", "-"]] * 3
    assert lines[0].index("3") == lines[1].index("3") - 1  # one character of two columns
    assert len(lines[2].split()[0]) == 32


@pytest.mark.parametrize("bar", ["rich", "tqdm"])
def test_messages_stand_above_the_bar_and_are_whole(
    screen: Callable[..., Screen], monkeypatch: pytest.MonkeyPatch, bar: str
) -> None:
    """Whoever prints them: the console, or a logger whose handler was made before the bar."""
    shown = screen(80)
    monkeypatch.setattr(sys, "stderr", shown)
    handler = ConsoleHandler()
    with Console(bar).progress("epoch 1/2", 4) as meter:
        for step in range(4):
            meter(lambda: FIELDS[:1])
            say(f"printed {step}")
            handler.handle(logging.LogRecord("somebody", logging.WARNING, "file", 1, f"logged {step}", (), None))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    assert [line for line in lines if line.startswith(("printed", "logged"))] == [
        f"{kind} {step}" for step in range(4) for kind in ("printed", "logged")
    ]
    assert sys.stderr is shown


def test_a_log_keeps_its_lines_while_a_bar_is_drawn(
    screen: Callable[..., Screen], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, log = screen(80), io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Console("rich").progress("epoch 1/2", 4) as meter:
        meter()
        ConsoleHandler().handle(logging.LogRecord("somebody", logging.WARNING, "file", 1, "logged", (), None))
    assert log.getvalue() == "logged\n"
    assert "logged" not in shown.getvalue()


def test_without_a_known_end_the_pace_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PRINTED", 0.0)
    with Console("rich").progress("predicting", 0) as meter:
        meter()
    assert re.fullmatch(r"predicting  1/\?  [0-9.]+ a second\n", capsys.readouterr().out)
