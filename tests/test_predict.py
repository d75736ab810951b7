"""The predict command: a file for programs, pictures for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_exp import predict

Command = Callable[..., int]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(["b.png", "a.jpg", "below/b.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def output() -> tuple[Path, dict[str, Any]]:
    (path,) = Path("outputs/predict").glob("*/*/detections.json")
    return path.parent, json.loads(path.read_text())


def test_a_folder(command: Command, trained: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(predict.main, f"checkpoint={trained}", f"source={photos}", "threshold=0.0", "batch_size=2") == 0
    folder, found = output()
    assert [Path(image["file_name"]).relative_to(photos).as_posix() for image in found["images"]] == [
        "a.jpg",
        "b.png",
        "below/b.png",
    ]
    assert {image["width"] for image in found["images"]} == {60}
    assert [category["name"] for category in found["categories"]][:2] == ["arrow", "kite"]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["a.jpg", "b.jpg", "b_2.jpg"]
    known = {category["id"] for category in found["categories"]}
    for entry in found["annotations"]:
        x, y, width, height = entry["bbox"]
        assert -1e-3 <= x <= x + width <= 60 + 1e-3
        assert -1e-3 <= y <= y + height <= 42 + 1e-3
        assert entry["category_id"] in known
        assert 0 < entry["score"] <= 1
    assert {entry["image_id"] for entry in found["annotations"]} == {1, 2, 3}
    assert "broken.jpg" in capfd.readouterr().err


def test_one_picture_without_drawing(command: Command, trained: Path, photos: Path) -> None:
    words = [f"checkpoint={trained}", f"source={photos / 'a.jpg'}", "pictures=false", "trainer/hardware=cpu"]
    assert command(predict.main, *words, "threshold=0.99") == 0
    folder, found = output()
    assert len(found["images"]) == 1
    assert found["annotations"] == []
    assert not (folder / "pictures").exists()


@pytest.mark.parametrize(
    ("source", "told"),
    [("absent", "does not exist"), ("empty", "holds no picture"), ("photos/broken.jpg", "none of 1 pictures")],
)
def test_sources_without_pictures(
    command: Command, trained: Path, photos: Path, capfd: pytest.CaptureFixture[str], source: str, told: str
) -> None:
    Path("empty").mkdir()
    assert command(predict.main, f"checkpoint={trained}", f"source={source}") == 2
    assert told in capfd.readouterr().err
