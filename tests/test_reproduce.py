"""Doing a run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp import reproduce, train
from detr_exp.reproduce import Difference, changes, differences

Command = Callable[..., int]


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compared(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "system/"))} for line in journal(folder)]


def test_the_same_numbers_to_the_last_digit(
    command: Command, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["seed=null", "trainer.log_every_steps=1", "loss=focal", "hydra.run.dir=run"]
    assert command(train.main, *tiny_run, *overrides) == 0
    assert command(reproduce.main, "run=run", "hydra.run.dir=again") == 0
    assert "reproduced: all" in capsys.readouterr().out
    assert compared(Path("again")) == compared(Path("run"))
    assert any(line.get("train/loss", 0) > 0 for line in compared(Path("again")))


def test_differences_are_reported(command: Command, tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(train.main, *tiny_run, "hydra.run.dir=run") == 0
    record = json.loads(Path("run/run.json").read_text())
    record["tags"] |= {"version/torch": "1.0", "data.fingerprint": "other", "git.commit": "0" * 40}
    Path("run/run.json").write_text(json.dumps(record))
    lines = journal(Path("run"))
    lines[0]["train/loss"] = 1.0
    Path("run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(reproduce.main, "run=run", "hydra.run.dir=again") == 1
    printed = capsys.readouterr()
    for name in ("version/torch: was 1.0, is", "data.fingerprint: was other, is", f"git.commit: was {'0' * 40}"):
        assert name in printed.out
    assert "not reproduced: 1 of" in printed.out
    assert "train/loss  was 1.0, is" in printed.out
    assert "1 values differ" in printed.err


def test_nothing_changed_and_code_that_had_no_commit() -> None:
    tags = {"python": "3", "version/torch": "2", "git.dirty": "false", "loss": "vfl"}
    assert changes(tags, tags) == ["code, packages, machine and data have not changed"]
    (sentence,) = changes({**tags, "git.dirty": "true"}, {**tags, "git.dirty": "true"})
    assert "changed since its commit" in sentence


def test_differences_are_those_of_numbers_that_count() -> None:
    before = [{"step": 1, "time/unix": 1.0, "train/loss": 0.1 + 0.2}, {"step": 2, "val/mAP": None, "gone": 1.0}]
    now = [{"step": 1, "time/unix": 9.0, "train/loss": 0.3}, {"step": 2, "val/mAP": None}]
    assert differences(before, before) == []
    assert differences(before, now) == [
        Difference("train/loss", 1, 0.1 + 0.2, 0.3),
        Difference("gone", 2, 1.0, None),
    ]


@pytest.mark.parametrize(("overrides", "message"), [([], "run must be given"), (["run=absent"], "is no folder")])
def test_mistakes(command: Command, capfd: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    assert command(reproduce.main, *overrides) == 2
    assert message in capfd.readouterr().err
