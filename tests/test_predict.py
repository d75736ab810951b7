"""The predict command: a file for programs, drawings for people."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp import predict
from detr_exp.trainer import checkpoint as files

Command = Callable[..., int]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(["b.png", "a.jpg", "below/b.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image")
    return folder


def output() -> tuple[Path, dict[str, Any]]:
    (path,) = Path("outputs/predict").glob("*/*/detections.json")
    return path.parent, json.loads(path.read_text())


def test_a_folder(command: Command, trained: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(predict.main, f"checkpoint={trained}", f"source={photos}", "threshold=0.0", "batch_size=2") == 1
    folder, result = output()
    assert [Path(image["file_name"]).relative_to(photos).as_posix() for image in result["images"]] == [
        "a.jpg",
        "b.png",
        "below/b.png",
    ]
    assert {image["width"] for image in result["images"]} == {60}
    assert [category["name"] for category in result["categories"]][:2] == ["arrow", "kite"]
    drawn = sorted(path.relative_to(folder / "drawings").as_posix() for path in folder.glob("drawings/**/*.jpg"))
    assert drawn == ["a.jpg", "b.jpg", "below/b.jpg"]
    known = {category["id"] for category in result["categories"]}
    for entry in result["annotations"]:
        x, y, width, height = entry["bbox"]
        assert -1e-3 <= x <= x + width <= 60 + 1e-3
        assert -1e-3 <= y <= y + height <= 42 + 1e-3
        assert entry["category_id"] in known
        assert 0 < entry["score"] <= 1
    assert {entry["image_id"] for entry in result["annotations"]} == {1, 2, 3}
    assert "1 of 4 could not be read" in (message := capfd.readouterr().err)
    assert "broken.jpg" in message


def test_nothing_is_overwritten(command: Command, trained: Path, photos: Path) -> None:
    overrides = [f"checkpoint={trained}", f"source={photos}/*.png", "hydra.run.dir=mine"]
    for _ in range(2):
        assert command(predict.main, *overrides) == 0
    assert {path.name for path in Path("mine").glob("*.json")} == {"detections.json", "detections_2.json"}
    assert [path.name for path in Path("mine").glob("drawings*/*")] == ["b.jpg", "b.jpg"]


def test_an_image_from_standard_input(
    command: Command, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open(photos / "a.jpg", "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        assert command(predict.main, f"checkpoint={trained}", "source=-", "threshold=0.0") == 0
    folder, result = output()
    assert result["images"] == [{"id": 1, "file_name": "-", "width": 60, "height": 41}]
    assert (folder / "drawings" / "stdin.jpg").exists()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"no image")))
    assert command(predict.main, f"checkpoint={trained}", "source=-") == 2
    assert "standard input" in capfd.readouterr().err


def test_every_other_frame_of_a_video(command: Command, trained: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "video.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for level in (0, 80, 160, 240, 40):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    overrides = [f"checkpoint={trained}", f"source={tmp_path / 'video.mp4'}", "every=2", "output=csv", "threshold=0.0"]
    assert command(predict.main, *overrides) == 0
    (path,) = Path("outputs/predict").glob("*/*/detections.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(Path(row["image"]).name for row in rows)) == [f"video.mp4#{i}" for i in (0, 2, 4)]
    assert sorted(p.name for p in (path.parent / "drawings").iterdir())[1] == "video_000002.jpg"
    Path("torn.mp4").write_bytes(b"no video")
    assert command(predict.main, f"checkpoint={trained}", "source=torn.mp4") == 2


def test_one_image_without_drawing(command: Command, trained: Path, photos: Path) -> None:
    overrides = [f"checkpoint={trained}", f"source={photos / 'a.jpg'}", "draw=false", "trainer/hardware=cpu"]
    assert command(predict.main, *overrides, "threshold=0.99") == 0
    folder, result = output()
    assert len(result["images"]) == 1
    assert result["annotations"] == []
    assert not (folder / "drawings").exists()


def test_a_video_that_is_truncated(
    command: Command, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "video.mp4"), "w", options={"movflags": "faststart"}) as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for level in range(20):
            pixels = np.random.default_rng(level).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        video.mux(stream.encode())
    whole = (tmp_path / "video.mp4").read_bytes()
    overrides = [f"checkpoint={trained}", "source=video.mp4", "draw=false"]
    assert command(predict.main, *overrides, "hydra.run.dir=whole") == 0
    half = len(whole) // 2
    for number, content in enumerate((whole[:half], whole[:half] + bytes(len(whole) - half))):
        (tmp_path / "video.mp4").write_bytes(content)
        assert command(predict.main, *overrides, f"hydra.run.dir=half{number}") == 1
        assert "video.mp4 after" in capfd.readouterr().err
        frames = json.loads((tmp_path / f"half{number}" / "detections.json").read_text())["images"]
        assert 0 < len(frames) < 20


def test_a_signal_keeps_the_detections(
    command: Command, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn_and_ended(*_: object) -> Image.Image:
        os.kill(os.getpid(), signal.SIGTERM)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(predict, "drawn", drawn_and_ended)
    assert command(predict.main, f"checkpoint={trained}", f"source={photos}", "batch_size=1") == 143
    assert [Path(image["file_name"]).name for image in output()[1]["images"]] == ["a.jpg"]


def test_a_fault_keeps_the_detections(
    command: Command, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = iter([Image.new("RGB", (8, 8))])

    def fails_later(*_: object) -> Image.Image:
        if (drawing := next(drawings, None)) is None:
            raise MemoryError
        return drawing

    monkeypatch.setattr(predict, "drawn", fails_later)
    assert command(predict.main, f"checkpoint={trained}", f"source={photos}", "batch_size=1") == 1
    assert [Path(image["file_name"]).name for image in output()[1]["images"]] == ["a.jpg", "b.png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "does not exist"),
        ("empty", "holds no image"),
        ("photos/*.gif", "matches no image"),
        ("photos/broken.jpg", "none of 1 images"),
    ],
)
def test_sources_without_images(
    command: Command, trained: Path, photos: Path, capfd: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    Path("empty").mkdir()
    assert command(predict.main, f"checkpoint={trained}", f"source={source}") == 2
    assert message in capfd.readouterr().err


def test_a_checkpoint_of_tiles_may_find_in_whole_images(
    command: Command, trained: Path, photos: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(trained / files.BEST_TOTAL, weights_only=True)
    checkpoint["config"]["data"]["tiles"] = {"size": 40, "overlap": 0.2}
    torch.save(checkpoint, tmp_path / "tiled.pt")
    found = {}
    for name, source, words in (
        ("whole", trained, []),
        ("tiled", tmp_path / "tiled.pt", []),
        ("again", tmp_path / "tiled.pt", ["tiles=whole"]),
    ):
        given = [
            f"checkpoint={source}",
            f"source={photos / 'a.jpg'}",
            "threshold=0.0",
            f"hydra.run.dir={tmp_path / name}",
        ]
        assert command(predict.main, *given, *words) == 0
        found[name] = json.loads((tmp_path / name / "detections.json").read_text("utf-8"))
    assert found["again"] == found["whole"] != found["tiled"]


@pytest.mark.parametrize("tiles", ["auto", "40", "[40,40]", "{size: 5}"])
def test_tiles_that_are_none_are_refused(
    command: Command, trained: Path, photos: Path, capsys: pytest.CaptureFixture[str], tiles: str
) -> None:
    assert command(predict.main, f"checkpoint={trained}", f"source={photos}", f"tiles={tiles}") == 2
    assert "tiles={size: 640, overlap: 0.2}" in capsys.readouterr().err


def test_a_camera(
    command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    frames = iter(np.full((3, 40, 60, 3), 90, np.uint8))

    class Capture:
        isOpened = staticmethod(lambda: True)
        release = staticmethod(lambda: None)
        frame = None

        def __init__(self, number: int) -> None:
            assert number == 0

        def grab(self) -> bool:
            self.frame = next(frames, None)
            return self.frame is not None

        def retrieve(self) -> tuple[bool, np.ndarray | None]:
            return True, self.frame

    monkeypatch.setattr("cv2.VideoCapture", Capture)
    assert command(predict.main, f"checkpoint={trained}", "source=0", "threshold=0.0") == 0
    folder, result = output()
    assert [image["file_name"] for image in result["images"]] == ["0#0", "0#1", "0#2"]
    assert len(list(folder.glob("drawings/camera0_*.jpg"))) == 3


def test_a_window_without_a_display_is_refused_before_anything_is_done(
    command: Command, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert command(predict.main, "checkpoint=absent.pth", f"source={photos}", "show=true") == 2
    assert "show=true needs a display" in capfd.readouterr().err
    assert not list(Path("outputs").rglob("*.json"))


def test_closing_the_window_ends_the_command(
    command: Command, trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    class Window:
        is_open = True

        def __init__(self, title: str) -> None: ...

        def show(self, image: Image.Image, name: str, interrupt: object) -> None:
            assert interrupt is not None, "a still image waits"
            shown.append(Path(name).name)
            self.is_open = False

        def close(self) -> None:
            shown.append("closed")

    monkeypatch.setattr("detr_exp.inference.window.Window", Window)
    words = (f"checkpoint={trained}", f"source={photos}", "show=true", "draw=false", "batch_size=1")
    assert command(predict.main, *words) == 0
    assert shown == ["a.jpg", "closed"]
    assert len(output()[1]["images"]) == 1, "what has been seen is kept"
