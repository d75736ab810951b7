"""The command for published weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detr_exp import weights
from detr_exp.published.table import table

FILE = "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("DETR_EXP_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    torch.save({"w": torch.zeros(3)}, tmp_path / "weights" / FILE)
    return tmp_path / "weights"


@pytest.fixture
def run(command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        status = command(weights.main, *words)
        told = capfd.readouterr()
        return status, told.out, told.err

    return call


def test_list_shows_names_licences_and_what_is_here(run: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    status, out, _ = run("list")
    assert status == 0
    assert len(out.splitlines()) == len(table()) + 1
    status, out, _ = run("list", "r18vd", "AP 48.1")
    (heading, line) = out.splitlines()
    assert heading.split() == ["NAME", "DATA", "PUBLISHED", "LICENCE", "HERE"]
    assert line.startswith("rtdetrv2_r18vd_120e_coco ")
    assert "Apache-2.0" in line
    assert line.endswith(FILE)
    assert run("list", "nothing like it")[0] == 2


def test_json_has_every_column(run: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = run("list", "rfdetr_nano", "--json")
    (row,) = json.loads(out)
    assert row["hash"] == "md5:fb6504cce7fbdc783f7a46991f07639f"
    assert row["network"] == "experiment=rfdetr_nano_coco"
    assert row["url"].startswith("https://")


def test_path_fetch_and_verify_a_file_that_is_here(run: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    status, out, _ = run("path", "rtdetrv2_r18vd_120e_coco")
    assert (status, out.strip()) == (0, str(folder / FILE))
    status, out, _ = run("fetch", "experiment=rtdetrv2_r18vd_finetune")
    assert status == 0
    assert str(folder / FILE) in out
    status, out, _ = run("verify")
    assert status == 0
    assert "as at first use" in out
    torch.save({"w": torch.ones(3)}, folder / FILE)
    status, out, err = run("verify")
    assert status == 2
    assert "another file" in out
    assert f"{folder / FILE} is another file" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command is given"),
        (["lst"], "lst is no command"),
        (["list", "--jsn"], "--jsn is no option"),
        (["list", "--all"], "--all belongs to fetch"),
        (["fetch"], "fetch what?"),
        (["path"], "the path of what?"),
        (["path", "rfdetr_nano_coco"], "is not on this machine; fetch it"),
        (["fetch", "rfdetr_nanno_coco"], "did you mean rfdetr_nano_coco"),
        (["fetch", "rfdetr_nano_coco", "rfdetr_small_coco"], "rfdetr_small_coco is not on this machine"),
        (["fetch", "experiment=rtdetrv2_r18vd_120e_coco"], "resnet18_vd is not on this machine"),
        (["fetch", "experiment=rfdetr_seg_nano_coco"], "dinov2_small is not on this machine"),
        (["fetch", "experiment=demo"], "starts from random weights"),
        (["fetch", "experiment=rfdetr_nano_coco", "--all"], "rfdetr_nano_coco is not on this machine.*dinov2_small is"),
    ],
)
def test_mistakes_end_with_status_2_and_a_message(
    words: list[str], message: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    import re

    status, _, err = run(*words)
    assert status == 2
    assert re.search(message, err), err
    assert "Traceback" not in err


def test_help(run: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "python -m detr_exp.weights list" in out
