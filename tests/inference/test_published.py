"""A row of the table of weights as the teacher: stand-in weights in the layout of their authors."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.model.pretrained_rtdetr import to_official
from detr_exp.published import table
from detr_exp.teacher.detector import DetectorTeacher
from detr_exp.trainer.teaching import connected

SMALL = (
    "model.hidden_dim=32 model.dim_feedforward=32 model.neck.hidden_dim=32 model.neck.dim_feedforward=32 "
    "model.backbone.widths=[8,16,24,32] model.image_size=[64,64] model.num_queries=20"
)
ROWS = {
    "stand_in_coco": {"kind": "detector", "classes": "80", "data": "COCO"},
    "stand_in_obj365": {"kind": "detector", "classes": "366", "data": "Objects365"},
    "stand_in_backbone": {"kind": "backbone", "classes": "", "data": "ImageNet"},
}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Any]]:
    """Writes the file of `stand_in_coco` for a number of classes, and returns the network that it is of."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("DETR_EXP_OFFLINE", "DETR_EXP_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DETR_EXP_WEIGHTS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open(table.TABLE, encoding="utf-8", newline="") as file:
        header = csv.DictReader(file).fieldnames or []
    with open(tmp_path / "table.csv", "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, header, restval="")
        writer.writeheader()
        for name, row in ROWS.items():
            fixed = {"model": "rtdetrv2_tiny", "backbone": f"tiny {SMALL}", "url": f"https://localhost:9/{name}.pth"}
            writer.writerow({"name": name, **fixed, "hash": "unknown", "size": "unknown", **row})
    monkeypatch.setattr(table, "TABLE", tmp_path / "table.csv")
    for cached in (table.table, table.names):
        cached.cache_clear()

    def write(classes: int = 80) -> Any:
        torch.manual_seed(3)
        words = ["model=rtdetrv2_tiny", *SMALL.split(), f"data.num_classes={classes}"]
        network = build.network(compose(words)).eval()
        shapes = [(64 // stride, 64 // stride) for stride in (8, 16, 32)]
        state = to_official(network.state_dict(), num_points=[4, 4, 4], spatial_shapes=shapes, version=2)
        torch.save({"ema": {"module": state}}, folder / "stand_in_coco.pth")
        return network

    yield write
    for cached in (table.table, table.names):
        cached.cache_clear()


@pytest.fixture
def words(tmp_path: Path, tiny_run: list[str]) -> Callable[..., list[str]]:
    """Overrides of a run on images of dogs and persons, in that order, which the row teaches."""

    def make(*more: str) -> list[str]:
        generator = np.random.default_rng(0)
        for split in ("train", "valid"):
            folder = tmp_path / "data" / split
            folder.mkdir(parents=True, exist_ok=True)
            boxes = [{"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [8, 8, 20, 30]} for i in range(2)]
            for i in range(2):
                Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / f"{i}.png")
            images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(2)]
            content = {
                "images": images,
                "annotations": [{**box, "area": 600, "iscrowd": 0} for box in boxes],
                "categories": [
                    {"id": 1 + i, "name": name, "supercategory": ""} for i, name in enumerate(("Dog", "person"))
                ],
            }
            (folder / "_annotations.coco.json").write_text(json.dumps(content))
        rest = [word for word in tiny_run if not word.startswith(("data", "model=", "trainer.max"))]
        data = [
            *("data=coco", f"data.root={tmp_path / 'data'}", "data.num_workers=0", "data/augment=none"),
            *(
                f"data.{split}.{part}"
                for split, folder in (("train", "train"), ("val", "valid"))
                for part in (f"annotations={folder}/_annotations.coco.json", f"images={folder}")
            ),
        ]
        small = [word for word in SMALL.split() if not word.startswith("model.image")]
        model = ["model=rtdetrv2_tiny", *small, "trainer.max_steps=1", "trainer.num_pictures=0"]
        return [*rest, *data, *model, "teacher=run", "loss/teacher=detr", "teacher.checkpoint=stand_in_coco", *more]

    return make


def test_it_teaches_the_classes_of_the_data_by_name(
    weights: Callable[..., Any], words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = weights()
    trainer, run = build.trainer(cfg := compose(words("teacher.threshold=0.01"))), build.run(cfg, tmp_path / "run")
    teaching = run.teaching
    assert teaching is not None
    assert teaching.columns == [16, 0]
    assert teaching.teacher.classes[16] == "dog"
    assert teaching.teacher.record["teacher"] == "stand_in_coco"
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        seen = teaching.teacher(images, None, detects=True).prediction
        wanted = published(images).pred
    assert seen is not None
    torch.testing.assert_close(seen.logits, wanted.logits)
    torch.testing.assert_close(seen.boxes, wanted.boxes)
    state = trainer.start(run)
    assert "stand_in_coco" in capsys.readouterr().out
    state.network.train()
    state.loader.batch_sampler.set_epoch(0)
    terms, skipped = trainer.train_step(run, state, [next(iter(state.loader))])
    assert not skipped
    assert dict(zip(state.term_names, terms.tolist()))["loss_teacher_class"] > 0
    with pytest.raises(ValueError, match=r"the data have platelet as well.*loss/teacher=maps"):
        connected(teaching.teacher, run.network, ["Dog", "platelet"], run.criterion, teaching.caching)


@pytest.mark.parametrize(
    ("word", "weights_of", "message"),
    [
        ("stand_in_coc", None, "did you mean teacher.checkpoint=stand_in_coco"),
        ("stand_in_backbone", None, "weights of a backbone, which detects nothing"),
        ("stand_in_coco", "ema", "stand_in_coco is one kind of weights: teacher.weights=null"),
        ("stand_in_obj365", None, r"names of the 366 classes .* are not known here"),
    ],
)
def test_mistakes(weights: Callable[..., Any], word: str, weights_of: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorTeacher(checkpoint=word, weights=weights_of, threshold=0.3)


def test_a_file_that_leaves_weights_random_is_refused(weights: Callable[..., Any]) -> None:
    weights(7)
    with pytest.raises(ValueError, match=r"stand_in_coco.pth is to be .*, but holds .*new: .* class tensors"):
        DetectorTeacher(checkpoint="stand_in_coco", weights=None, threshold=0.3)


def test_an_absent_file_is_reported_before_torch_is_needed(
    weights: Callable[..., Any], words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from detr_exp.config.published import refuse_absent_weights

    monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"stand_in_coco is not on this machine") as caught:
        refuse_absent_weights(compose(words()))
    assert "model.weights" not in str(caught.value)
