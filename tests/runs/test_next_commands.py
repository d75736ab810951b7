"""The commands that are named after a run, a sweep, and in a report."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path

import pytest

from detr_exp.config.compose import compose
from detr_exp.runs import next_commands as module
from detr_exp.runs.next_commands import IMAGE_TAG, SAMPLES, next_commands
from detr_exp.runs.page import render
from detr_exp.runs.past import PastRun
from hydra_plugins.detr_exp._ledger import Job
from hydra_plugins.detr_exp._table import winner
from tests.runs.test_past import make


@pytest.mark.parametrize("name", ["a.jpg", "im, 0 (x)=1.jpg", "it's ü.png"])
@pytest.mark.parametrize("allowed", [None, [], ["my_parts", "theirs"]])
def test_they_compose_as_they_are_printed(tmp_path: Path, name: str, allowed: list[str] | None) -> None:
    folder, image = tmp_path / "loss=focal,gamma=1.5-0a", tmp_path / name
    folder.mkdir()
    image.touch()
    predict, other = next_commands(folder, str(image), allowed)
    assert (predict[0], other[0]) in {("detr_exp.predict", f"detr_exp.{name}") for name in ("export", "evaluate")}
    for command, *words in (predict, other):
        cfg = compose(words, config_name=command.partition(".")[2])
        assert cfg.checkpoint == str(folder)
        assert list(cfg.allow_targets) == (allowed or [])
    assert compose(predict[1:], config_name="predict").source == str(image)


def test_without_an_image_or_onnx_evaluate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert [words[0] for words in next_commands(tmp_path, None, None)] == ["detr_exp.evaluate"]
    (tmp_path / SAMPLES).touch()
    assert f"source={tmp_path / SAMPLES}" in next_commands(tmp_path, str(tmp_path / "gone.jpg"), None)[0]


def test_a_sweep_and_a_report_name_an_image_of_the_data(tmp_path: Path) -> None:
    image = tmp_path / "a cat.jpg"
    image.touch()
    run = PastRun.load(make(tmp_path / "loss=focal-0a", tags={IMAGE_TAG: str(image)}))
    lines = winner(Job(0, ["loss=focal"], ["loss=focal"], "0a"), run.folder, "val/mAP 0.4", [])
    (use,) = [line for line in lines if line.startswith("  use")]
    words = ["-m", "detr_exp.predict", f"checkpoint={run.folder}", f"source={image}"]
    assert shlex.split(use)[2:] == words
    page = render([run], title="t", about="a", now=datetime(2026, 1, 2))
    assert shlex.join(words).replace("'", "&#39;") in page
    lines = winner(Job(0, ["seed=1", "sweep=seeds"], ["seed=1"], "0a"), run.folder, "", [])
    assert lines[-1].endswith("detr_exp.train seed=1 sweep=seeds hydra.mode=RUN")
    assert not any(line.startswith("  use") for line in winner(Job(0, [], [], "0a"), tmp_path / "gone", "", []))
