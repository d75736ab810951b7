"""The page about runs: complete in itself, whatever the runs came to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp import report, train
from detr_exp.tracker.base import RunRecord

Command = Callable[..., int]
VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Collects text and addresses, and insists on tags being closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        assert tag != "script"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make(folder: Path, number: int, score: float | None, status: str = "ok", **facts: object) -> Path:
    """The folder of a run with a few lines, tables and an image."""
    folder.mkdir(parents=True)
    lr = [1e-4, 3e-4, 1e-3][number % 3]
    lines: list[dict] = [
        {"step": 10 * k, "time/unix": 100.0 * k, "train/loss": 3 - k / 9, "train/epoch": k} for k in range(3)
    ]
    if score is not None:
        value = {"val/mAP": score, "val/mAP50": 2 * score, "time/val_images_per_second": 50 + number}
        lines += [{"step": 30, "time/unix": 400.0, "val/epoch": 3.0, **value}]
        rows = [{"class": name, "objects": 3, "AP": score / (k + 1)} for k, name in enumerate(["<b>cat</b>", "dog"])]
        (folder / "classes.json").write_text(json.dumps({"bbox": rows}))
        (folder / "worst").mkdir()
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "worst/step_0000030.jpg")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"optim: {{lr: {lr}}}\nseed: {number}\n")
    tags = {"parameters": str(1_000_000 * (1 + number % 4)), "git.commit": "abc"}
    record = RunRecord(id=f"{number:032d}", project="p", name=f"sweep/run{number}", status=status, tags=tags)
    record.words, record.seconds = [f"optim.lr={lr}", f"seed={number}"], 3600.0
    record.message = str(facts.get("message") or "") or None
    record.save(folder)
    return folder


def page_of(command: Command, *overrides: str) -> str:
    assert command(report.main, *overrides, "hydra.run.dir=page") == 0
    return Path("page/report.html").read_text()


def assert_complete(page: str) -> Checker:
    result = Checker(page)
    assert all(address.startswith("data:image/jpeg;base64,") for address in result.addresses)
    assert not re.search(r"url\(|@import|https?://", page)
    return result


def test_runs_of_every_kind(command: Command, tmp_path: Path) -> None:
    for number in range(12):
        make(tmp_path / f"sweep/{number}", number, 0.1 + number % 3 / 10 + number / 1000)
    make(tmp_path / "sweep/12", 12, None, "oom", message="<script>alert(1)</script> out of memory")
    make(tmp_path / "sweep/13", 13, None, "running")
    page = page_of(command, "runs=sweep")
    text = " ".join(assert_complete(page).text)
    assert "<script>alert(1)</script> out of memory" in text, "as text, not as a script"
    assert "<b>cat</b>" in text
    order = re.findall(r"</span>learning rate ([0-9.e-]+)</td>\s*<td class=\"status", page)
    assert [float(lr) for lr in order] == [1e-3, 3e-4, 1e-4], "seeds of one setting are one row"
    assert "0.3065 ± 0.0039" in text, "of runs 2, 5, 8, 11"
    assert "learning rate mattered < 0.001 100 %" in " ".join(text.split())
    assert "checkpoint=sweep/11" in text
    for heading in (
        "What differs",
        "Curves",
        "What mattered",
        "Accuracy and cost",
        "Classes",
        "Worst images",
        "Hours",
    ):
        assert heading in text
    assert page.count("data:image/jpeg") == 1
    assert "14.00" in text, "an hour each"


def test_one_run_that_was_never_evaluated(command: Command, tmp_path: Path) -> None:
    make(tmp_path / "run", 0, None, "failed", message="boom")
    text = " ".join(assert_complete(page_of(command, "runs=run")).text)
    assert "boom" in text
    assert "Training loss" in text
    assert "What mattered" not in text


def test_two_hundred_runs(command: Command, tmp_path: Path) -> None:
    for number in range(200):
        make(tmp_path / f"outputs/{number}", number, number / 1000)
    page = page_of(command, "runs=outputs", 'title="Many & more"')
    assert_complete(page)
    assert page.count("<polyline") > 200
    assert len(page) < 2_000_000
    assert "<h1>Many &amp; more</h1>" in page


def test_what_only_the_ledger_of_a_sweep_knows(command: Command, tmp_path: Path) -> None:
    make(tmp_path / "sweep/aa", 1, 0.3)
    make(tmp_path / "sweep/bb", 2, 0.2, "running")
    common = {"number": 0, "overrides": ["optim.lr=9"], "metric": None, "seconds": 1800.0}
    lines = [
        {**common, "hash": "bb", "status": "failed", "reason": "signal 9"},
        {**common, "hash": "cc", "status": "failed", "reason": "no such option"},
    ]
    (tmp_path / "sweep/sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(assert_complete(page_of(command, "runs=sweep")).text)
    assert "signal 9" in text
    assert "no such option" in text
    assert "2.50" in text


def test_a_real_run(command: Command, tiny_run: list[str]) -> None:
    assert command(train.main, *tiny_run, "trainer.num_pictures=2", "hydra.run.dir=run") == 0
    page = page_of(command, "runs=run")
    result = assert_complete(page)
    assert result.addresses, "its worst images"
    assert "3.5 M" in page
    assert "crescent" in page


@pytest.mark.parametrize(("overrides", "expected"), [([], "runs must be given"), (["runs=absent"], "is no folder")])
def test_mistakes(command: Command, capfd: pytest.CaptureFixture[str], overrides: list[str], expected: str) -> None:
    assert command(report.main, *overrides) == 2
    assert expected in capfd.readouterr().err
