"""The command that looks at a data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp import train
from detr_exp.check_data import main


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data set of two training images, one box without area among its three, and one to validate on."""
    folder = tmp_path / "small" / "train"
    folder.mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 60, 3), np.uint8)).save(folder / name)
    boxes = [[10, 5, 20, 10], [5, 5, 0, 10], [30, 5, 20, 30]]
    content = {
        "images": [{"id": i, "file_name": f"{name}.png", "width": 60, "height": 40} for i, name in enumerate("ab")],
        "annotations": [{"id": 10 + i, "image_id": 0, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    other = folder.with_name("valid")
    other.mkdir()
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 60, 3), np.uint8)).save(other / "a.png")
    content |= {"images": content["images"][:1], "annotations": content["annotations"][:1]}
    (other / "_annotations.coco.json").write_text(json.dumps(content))
    return folder.parent


def test_it_says_what_is_there_and_what_is_wrong(command, small, capsys):
    overrides = [f"data.root={small}", "image_size=[64,96]", "json=found.json", "hydra.run.dir=out", "images=2"]
    assert command(main, *overrides) == 0
    printed = capsys.readouterr().out
    assert "boxes without area were dropped (1)" in printed
    assert "annotation 11: 0x10 at (5, 5) in 'a.png'" in printed
    assert "training can start" in printed
    result = json.loads(Path("found.json").read_text())
    assert result["splits"]["train"]["objects"] == 2
    assert {finding["level"] for finding in result["findings"]} == {"warning", "note"}
    assert Image.open("out/training_samples.png").width > 600


def test_errors_are_counted_and_end_with_2(command, small, capsys):
    (small / "train" / "b.png").write_bytes(b"broken")
    assert command(main, f"data.root={small}", "hydra.run.dir=out", "images=0") == 2
    printed = capsys.readouterr()
    assert "b.png is not a readable image" in printed.out
    assert "1 problem that training refuses" in printed.err
    assert "Traceback" not in printed.err


def test_it_ends_as_a_training_would(command, small, tmp_path, capsys):
    """Without a validation split and without objects both refuse, with the same message."""
    overrides = [
        "model=rtdetrv2_tiny",
        "data.num_workers=0",
        "tracker=none",
        "trainer/hardware=cpu",
        "trainer.max_steps=1",
    ]
    (small / "valid").rename(small / "away")
    path = small / "train" / "_annotations.coco.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert command(main, f"data.root={small}", "hydra.run.dir=out", "images=0") == 2
    looked = capsys.readouterr().out
    assert command(train.main, "data=auto", f"data.root={small}", f"hydra.run.dir={tmp_path / 'run'}", *overrides) == 2
    trained = capsys.readouterr().err
    for printed in (looked, trained):
        assert "the data set has no val split, only train" in printed
        assert "no object to train on" in printed
        assert "2 images, 0 annotations" in printed


def test_a_folder_of_no_layout_says_what_was_looked_for(command, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert command(main, f"data.root={tmp_path}", "hydra.run.dir=out") == 2
    assert "Looked for: train/_annotations.coco.json" in capsys.readouterr().out
