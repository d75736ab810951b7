"""What a run prints at its end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from detr_exp.data.table import TableSplit
from detr_exp.trainer.console import Console
from detr_exp.trainer.summary import print_result


def run_in(folder: Path, image: Path | None = None, **config: object) -> SimpleNamespace:
    split = None
    if image is not None:
        split = object.__new__(TableSplit)
        split.paths = [str(image)]  # type: ignore[assignment]
    return SimpleNamespace(output_dir=folder, data=SimpleNamespace(val=split, train=None), config=config)


def row(name: str, objects: int, ap: float) -> dict[str, object]:
    return {"class": name, "objects": objects, "AP": ap, "AP50": ap, "f1": 0.5, "threshold": 0.25}


def test_all_metrics_and_classes_of_the_best_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"bbox": [row("cat", 3, 0.5), row("absent", 0, -1.0)], "segm": [row("cat", 3, 0.25)]}
    (tmp_path / "classes.json").write_text(json.dumps(tables))
    found = {"nonfinite": 0.0, "mAP": 0.5, "mAP_large": -1.0, "AP/cat": 0.5, "time/network_ms": 3.0}
    test = {"mAP": 0.25, "loss": 1.5}
    print_result(Console("none"), run_in(tmp_path), "best val/mAP 0.5 at epoch 2 of 3", {"val": found, "test": test})  # type: ignore[arg-type]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["metric", "val", "test"] in lines
    assert ["mAP", "0.5000", "0.2500"] in lines
    assert ["loss", "-", "1.5000"] in lines
    assert ["cat", "3", "0.500", "0.500", "0.500", "0.250"] in lines
    assert ["cat", "3", "0.250", "0.250", "0.500", "0.250"] in lines
    assert not [line for line in lines if line[:1] in (["absent"], ["mAP_large"], ["nonfinite"], ["time/network_ms"])]
    assert ["run", str(tmp_path)] in lines
    assert ["classes", "classes.json"] in lines
    assert ["results", "results.csv"] not in lines, "it is not there"


def test_of_many_classes_the_worst_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"c{k}", 1, k / 100) for k in reversed(range(80))]
    (tmp_path / "classes.json").write_text(json.dumps({"bbox": rows}))
    print_result(Console("none"), run_in(tmp_path), "best", {"val": {"mAP": 0.4}})  # type: ignore[arg-type]
    said = capsys.readouterr().out
    shown = [line.split()[0] for line in said.splitlines() if line.startswith("  c") and line.split()[0][1:].isdigit()]
    assert shown == [f"c{k}" for k in range(30)]
    assert "50 more classes" in said
