"""A trained detector in Python: what the commands take, and mistakes as exceptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detr_exp
from detr_exp import evaluate, predict
from detr_exp.config.mistakes import ConfigError
from detr_exp.trained import Detector
from detr_exp.trainer import checkpoint as files

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return detr_exp.load(trained, hardware="cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("a.png")


@pytest.mark.parametrize(
    "source",
    [
        "a.png",
        Path("a.png"),
        "*.png",
        ".",
        ["a.png"],
        (one for one in ["a.png"]),
        PIXELS,
        PIXELS[None],
        [PIXELS],
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255,
        Image.fromarray(PIXELS),
        np.array(["a.png"]),
    ],
    ids=lambda source: f"{type(source).__name__} {str(source)[:8]}",
)
def test_all_that_holds_an_image(detector: Detector, source: object) -> None:
    expected = detector.predict([PIXELS], threshold=0)[0]
    (found,) = detector.predict(source, threshold=0)
    assert found.size == (40, 60)
    assert len(found) == len(expected) > 0
    assert torch.allclose(found.boxes, expected.boxes, atol=1e-3)


def test_contents_of_files_and_open_files(detector: Detector) -> None:
    with open("a.png", "rb") as file:
        results = detector.predict([Path("a.png").read_bytes(), file])
    assert [result.name for result in results] == ["0", "1"]


def test_films_frame_by_frame(detector: Detector, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open("film.mp4", "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 60, 40
        for packet in [*(stream.encode(av.VideoFrame.from_ndarray(PIXELS)) for _ in range(4)), stream.encode()]:
            film.mux(packet)
    stream = detector.stream("film.mp4", every=2)
    assert next(stream).name == "film.mp4#0"
    assert [result.name for result in stream] == ["film.mp4#2"]


def test_the_command_finds_the_same(
    detector: Detector, command: Callable[..., int], trained: Path, tmp_path: Path
) -> None:
    words = [f"checkpoint={trained}", "source=a.png", "threshold=0.01", "hydra.run.dir=out", "trainer/hardware=cpu"]
    assert command(predict.main, *words) == 0
    told, own = json.loads(Path("out/detections.json").read_text()), detector.predict("a.png", 0.01).to_coco()
    assert told["images"] == own["images"]
    assert told["categories"] == own["categories"]
    assert len(told["annotations"]) == len(own["annotations"]) > 0
    for left, right in zip(told["annotations"], own["annotations"]):
        assert left["bbox"] == pytest.approx(right["bbox"], abs=1e-3)
    assert command(evaluate.main, f"checkpoint={trained}", "hydra.run.dir=evaluated", "trainer/hardware=cpu") == 0
    result = detector.evaluate(folder="own")
    both = [json.loads(Path(name, "metrics.json").read_text()) for name in ("evaluated", "own")]
    plain = [name for name in result.metrics if not name.startswith("time/")]
    assert "mAP" in plain
    assert [{name: one[name] for name in plain} for one in both] == [{name: result.metrics[name] for name in plain}] * 2
    frame = result.to_pandas()
    assert frame["class"].tolist() == detector.classes
    absent = frame["objects"] == 0
    assert absent.any()
    assert frame["AP"].isna().equals(absent), "what has no objects has no AP"
    assert min(result.metrics.values()) >= 0


def test_an_export_leaves_the_detector_as_it_is(detector: Detector, tmp_path: Path) -> None:
    before = detector.predict("a.png", 0)[0]
    path = detector.export(["format=torchscript", "export.images=2", "export.max_map_drop=null"], folder="out")
    assert path == tmp_path / "out" / "model.torchscript"
    assert torch.equal(detector.predict("a.png", 0)[0].boxes, before.boxes)


def test_unreadable_images_are_skipped_where_others_were_found(
    detector: Detector, caplog: pytest.LogCaptureFixture
) -> None:
    Path("b.png").write_bytes(b"no image")
    results = detector.predict(".")
    assert [Path(result.name).name for result in results] == ["a.png"]
    assert [Path(name).name for name in results.skipped] == ["b.png"]
    assert "b.png" in caplog.text
    with pytest.raises(ValueError, match=r"b\.png"):
        detector.predict(["a.png", "b.png"])  # a result for each that was named
    Path("a.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png"):
        detector.predict(".")


@pytest.mark.parametrize("source", ["absent.png", "", 3.5, [None], [b"no image"], np.zeros(3), torch.zeros(2, 5, 5)])
def test_what_holds_no_image(detector: Detector, source: object) -> None:
    with pytest.raises(ValueError, match="image"):
        detector.predict(source)


def test_wrong_numbers(detector: Detector) -> None:
    for wrong in ({"threshold": 1.5}, {"threshold": -0.1}, {"batch_size": 0}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            detector.predict("a.png", **wrong)


def test_nothing_gives_nothing(detector: Detector) -> None:
    assert list(detector.predict([])) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint=x"], r"checkpoint=x is settled when a detector is opened: detr_exp\.load\(\.\.\., checkpoint="),
        (["weights=raw"], r"load\(\.\.\., weights="),
        (["trainer/hardware=cpu"], r"load\(\.\.\., hardware="),
        (["data.split=vall"], "vall"),
        (["data=coco", "data.root=absent"], "data.root"),
        (["--multirun"], "command line"),
        ("data.split=test", "is no list"),
    ],
)
def test_mistakes_leave_nothing(detector: Detector, words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        detector.evaluate(words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_results_do_not_go_into_the_folder_of_a_run(detector: Detector, trained: Path) -> None:
    before = sorted(trained.iterdir())
    with pytest.raises(ValueError, match="is the folder of a training"):
        detector.evaluate(folder=trained)
    assert sorted(trained.iterdir()) == before


def test_the_device_by_its_name(trained: Path) -> None:
    assert detr_exp.load(trained, hardware="cpu").opened.precision.device.type == "cpu"
    with pytest.raises(ConfigError, match="options of trainer/hardware"):
        detr_exp.load(trained, hardware="gpu")
    assert detr_exp.load(str(trained), weights="raw").path == trained / files.NEWEST
