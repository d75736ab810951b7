"""The model card: what is known, nothing else, in the form that the hub reads; and its snippet runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from omegaconf import OmegaConf
from PIL import Image

from detr_exp.export_weights import export_weights_in
from detr_exp.model_card import model_card, refuse_licence
from detr_exp.published.table import table
from detr_exp.tracker.base import RunRecord

CONFIG = {"architectures": ["RTDetrV2ForObjectDetection"], "model_type": "rt_detr_v2"}
METRICS = {"mAP": 0.51239, "mAP50": 0.75, "mAP_small": -1.0, "mAR": float("nan"), "AP/ape": 0.4, "AP/bee": 0.6}


def state(**changes: Any) -> dict[str, Any]:
    """What is read of a checkpoint."""
    known = {
        "config": {"data": {"root": "/home/jane/secret/cells"}, "model": {"backbone": {"pretrained": False}}},
        "classes": ["ape", "bee"],
        "metrics": METRICS,
        "operating_points": {"bbox": [{"threshold": 0.3}, {"threshold": 0.45}]},
        "data_fingerprint": "abc123",
        "weights": "ema",
        "epoch": 7,
    }
    return known | changes


def card(folder: Path, licence: str | None = None, repo: str | None = None, at: str = "", **changes: Any) -> str:
    facts = dict(threshold=0.41234, network=SimpleNamespace(image_size=(96, 128)), at=at, measured_at="")
    detector: Any = SimpleNamespace(path=folder / "checkpoint_best_total.pth", **facts)
    return model_card(state(**changes), detector, CONFIG, licence, repo)


def read(text: str, folder: Path) -> Any:
    """As the hub's client reads it."""
    (folder / "README.md").write_text(text, encoding="utf-8")
    assert metadata_load(folder / "README.md")
    return ModelCard.load(folder / "README.md").data


def test_the_hub_reads_metrics_and_licence(tmp_path: Path) -> None:
    data = read(card(tmp_path, "Apache-2.0", "jane/cells-detector"), tmp_path)
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "object-detection")
    assert data.model_name == "cells-detector"
    found = {(one.metric_type, one.metric_value, one.dataset_name, one.dataset_split) for one in data.eval_results}
    assert found == {("mAP", 0.5124, "cells", "val"), ("mAP50", 0.75, "cells", "val")}
    assert {one.task_type for one in data.eval_results} == {"object-detection"}


def test_what_is_unknown_is_said_to_be_unknown(tmp_path: Path) -> None:
    text = card(tmp_path, metrics={}, operating_points={}, data_fingerprint=None)
    data = read(text, tmp_path)
    assert data.license is None
    assert data.eval_results is None
    assert data.base_model is None
    for said in (
        "Unknown: the checkpoint has not been evaluated.",
        "The command is unknown: no record of the run lies beside the checkpoint.",
        "Of these weights: unknown; their author has not stated one.",
        "Of the data: unknown.",
        "They started from random weights.",
        "fingerprint of its annotations: `unknown`",
    ):
        assert said in text


def test_a_pretrained_backbone_is_named_with_its_hash_and_licence(tmp_path: Path) -> None:
    text = card(tmp_path, start={"backbone": "efficientnet_lite0", "sha256": "ab12"})
    assert "They started from a pretrained backbone: `efficientnet_lite0` (ImageNet), SHA-256 `ab12`." in text
    assert "Of what they started from: Apache-2.0 (efficientnet_lite0)." in text


@pytest.mark.parametrize(
    ("start", "hub", "said"),
    [
        ("rtdetrv2_r18vd_120e_coco", "PekingU/rtdetr_v2_r18vd", "`rtdetrv2_r18vd_120e_coco` (COCO), SHA-256 `ab12`"),
        (
            "hf:jane/first@main/model.safetensors",
            "jane/first",
            "`hf:jane/first@main/model.safetensors`, SHA-256 `ab12`",
        ),
        ("/home/jane/secret/first.pth", None, "`first.pth`, SHA-256 `ab12`"),
        ("https://host/a.pth?token=secretsecret", None, "SHA-256 `ab12`"),
    ],
)
def test_the_base_is_named_with_its_hash_and_licence(start: str, hub: str | None, said: str, tmp_path: Path) -> None:
    text = card(tmp_path, start={"weights": start, "sha256": "ab12"})
    assert read(text, tmp_path).base_model == hub
    assert f"They started from {said}" in text or said in text
    licence = f"{table()[start].licence} ({start})" if start in table() else "unknown"
    assert f"Of what they started from: {licence}." in text
    assert "secret" not in text


def test_the_command_of_the_run_without_folders_and_secrets(tmp_path: Path) -> None:
    words = [
        "experiment=rtdetrv2_r18vd_finetune",
        "data.root=/home/jane doe/cells/",
        "model.weights=~/private/first.pth",
        "data.extra=[/data/jane/a,/data/jane/b]",
        "model.image_size=[96,128]",
        "tracker.password=hunter2hunter2",
    ]
    RunRecord(id="1", project="p", name="n", tags={"version/torch": "2.15.0"}, words=words).save(tmp_path)
    text = card(tmp_path)
    (line,) = re.findall(r"python -m detr_exp\.train .*", text)
    for said in (
        "experiment=rtdetrv2_r18vd_finetune",
        "data.root=cells",
        "model.weights=first.pth",
        "[a,b]",
        "[96,128]",
    ):
        assert said in line
    assert not any(hidden in text for hidden in ("jane", "private", "hunter2"))
    assert "torch 2.15.0" in text
    assert "detr_exp unknown" in text


def test_any_name_of_a_class_stays_in_its_cell(tmp_path: Path) -> None:
    names = ["a|b", "<script>alert(1)</script>", "`tick`", "---", "no: yes\nnew", "Größe 大", " spaced "]
    text = card(tmp_path, classes=names, operating_points={}, metrics={"mAP": 0.5})
    read(text, tmp_path)
    rows = text.partition("## Classes\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(rows) == 2 + len(names)
    assert all(row.count("|") == 3 for row in rows)
    assert "<script>" not in text
    assert "`Größe 大`" in text


@pytest.mark.parametrize("name", ["yes", "123", "2026-11-28", "a: b", "-", "[x]", "Zähne"])
def test_any_name_of_data_is_valid_front_matter(name: str, tmp_path: Path) -> None:
    config = {"data": {"root": f"/d/{name}"}, "model": {}}
    data = read(card(tmp_path, config=config), tmp_path)
    assert data.eval_results[0].dataset_name == name


@pytest.mark.parametrize("licence", ["apache-2.0", "MIT", "cc-by-nc-4.0", "other", None])
def test_licences(licence: str | None) -> None:
    refuse_licence(licence)


@pytest.mark.parametrize("licence", ["", "my own", "see LICENSE", "a\nb", "#x"])
def test_no_licences(licence: str) -> None:
    with pytest.raises(ValueError, match=r"the hub needs an identifier: licence=apache-2\.0"):
        refuse_licence(licence)


def test_its_snippet_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_weights_in(
        tmp_path / "hf", OmegaConf.create({"checkpoint": str(trained), "format": "hf", "allow_targets": []})
    )
    text = (folder / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    Image.new("RGB", (80, 60), (200, 30, 30)).save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    exec(compile(snippet.replace("threshold=", "threshold=0.0 * "), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20  # queries
    assert "python -m detr_exp.train" in text or "The command is unknown" in text


def test_a_member_does_not_claim_what_the_whole_network_reached(tmp_path: Path) -> None:
    text = card(tmp_path, at="l2-q100-320")
    assert "the member `l2-q100-320` of a larger network" in text
    assert "The threshold is that of the whole network." in text
    assert "Unknown: this member has not been evaluated." in text
    assert "0.50 to 0.95" not in text
