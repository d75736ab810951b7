"""`results.csv`."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from detr_exp.trainer.results import FILE, Results


def row(epoch: int, **values: float) -> dict[str, float]:
    return {"epoch": epoch, "step": 10 * epoch, "seconds": 1.5 * epoch, "train/loss": 1 / epoch, **values}


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / FILE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_per_epoch_with_the_columns_of_all(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(row(1))
    results.add(row(2, **{"val/mAP": 0.1, "val/mAP_large": -1.0, 'val/AP/a, "b"': 0.5, "time/val_ms": 3.0}))
    results.add(row(3, **{"val/mAP": math.nan}))
    rows = read(tmp_path)
    assert [line["epoch"] for line in rows] == ["1", "2", "3"]
    names = ["epoch", "step", "seconds", "train/loss", "val/mAP", "val/mAP_large", 'val/AP/a, "b"']
    assert list(rows[0]) == names
    assert [line["val/mAP"] for line in rows] == ["", "0.1", "nan"]
    assert {line["val/mAP_large"] for line in rows} == {""}, "a size that does not occur has no value"
    assert float(rows[2]["train/loss"]) == 1 / 3, "every digit"
    assert results.curves()["val/mAP"] == [(2, 0.1)]


@pytest.mark.parametrize("closed", [0, 10, 25, 30])
def test_a_resumed_run_writes_no_row_twice(tmp_path: Path, closed: int) -> None:
    whole = Results(tmp_path)
    for epoch in (1, 2, 3):
        whole.add(row(epoch))
    before = (tmp_path / FILE).read_bytes()
    resumed = Results(tmp_path, closed)
    assert resumed.seconds == 1.5 * (closed // 10)
    for epoch in (1, 2, 3):
        if 10 * epoch > closed:
            resumed.add(row(epoch))
    assert (tmp_path / FILE).read_bytes() == before


def test_an_epoch_that_was_cut_by_max_steps_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    Results(tmp_path).add(row(1) | {"step": 4})
    Results(tmp_path, 4).add(row(1))
    assert [line["step"] for line in read(tmp_path)] == ["10"]


def test_lines_of_somebody_else_are_dropped(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("epoch,step\n1,10\nmine\n2,x\n")
    assert [line["epoch"] for line in Results(tmp_path, 99).rows] == ["1"]
