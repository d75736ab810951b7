"""Cameras and streams, with a capture that stands in for OpenCV's."""

from __future__ import annotations

import logging

import cv2
import numpy as np
import pytest

from detr_exp.inference.images import open_source
from detr_exp.inference.live import is_live, stem_of


class Capture:
    """Five frames, each of one colour: blue is its number."""

    made: list[Capture] = []  # noqa: RUF012
    broken = False

    def __init__(self, *source: object) -> None:
        self.source, self.number, self.is_released = source, -1, False
        Capture.made.append(self)

    def isOpened(self) -> bool:
        return not self.broken

    def grab(self) -> bool:
        self.number += 1
        return self.number < 5

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.full((4, 6, 3), (self.number, 0, 255), np.uint8)

    def release(self) -> None:
        self.is_released = True


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Capture]:
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    monkeypatch.setattr(Capture, "broken", False)
    Capture.made.clear()
    return Capture.made


@pytest.mark.parametrize(
    ("source", "live"),
    [
        *((word, True) for word in ("0", "12", "rtsp://h/s", "RTSPS://h", "rtmp://h/a", "udp://239.0.0.1:1")),
        *((word, False) for word in ("-1", "1.5", "0.jpg", "photos/0", "https://h/0", "rtsp", "9999")),
    ],
)
def test_what_is_live(source: str, live: bool) -> None:
    assert is_live(source) is live


@pytest.mark.parametrize(("every", "numbers"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (9, [0])])
@pytest.mark.parametrize("source", ["0", "rtsp://me:geheim@host:554/a/b?x=1"])
def test_frames_come_in_rgb_until_there_are_no_more(
    captures: list[Capture], caplog: pytest.LogCaptureFixture, source: str, every: int, numbers: list[int]
) -> None:
    items, count = open_source(source, every)
    assert count == 0, "it has no known end"
    with caplog.at_level(logging.WARNING):
        found = list(items)
    assert [item.read()[0, 0].tolist() for item in found] == [[255, 0, number] for number in numbers]
    assert [int(item.name.rpartition("#")[2]) for item in found] == numbers
    assert len({item.stem for item in found}) == len(numbers)
    assert all(item.moves for item in found)
    assert "geheim" not in "".join(item.name + item.stem for item in found) + caplog.text
    assert captures[0].is_released
    assert "no further frame after 5" in caplog.text


def test_a_user_who_stops_reading_frees_the_camera(captures: list[Capture]) -> None:
    items, _ = open_source("0")
    next(items)
    items.close()  # type: ignore[attr-defined]
    del items
    assert captures[0].is_released


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("7", r"camera 7 cannot be opened; .*source=1"),
        ("rtsp://me:geheim@h/s", r"the stream rtsp://\*\*\*@h/s cannot be"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, source: str, told: str
) -> None:
    monkeypatch.setattr(Capture, "broken", True)
    with pytest.raises(ValueError, match=told) as caught:
        open_source(source)
    assert "geheim" not in str(caught.value)


def test_a_stream_that_is_silent_is_not_waited_for_forever(captures: list[Capture]) -> None:
    next(open_source("rtsp://h/s")[0])
    _, api, settings = captures[0].source
    assert api == cv2.CAP_FFMPEG
    assert dict(zip(settings[::2], settings[1::2])) == {  # type: ignore[index]
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC: 10_000,
        cv2.CAP_PROP_READ_TIMEOUT_MSEC: 10_000,
    }


def test_a_file_named_like_a_camera_is_a_file(
    tmp_path, monkeypatch: pytest.MonkeyPatch, captures: list[Capture]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").write_bytes(b"")
    assert open_source("0")[1] == 1
    assert not captures


def test_names_of_results_are_short_and_safe() -> None:
    assert stem_of("003") == "camera3"
    stem = stem_of("rtsp://me:geheim@cam.example:554/" + "ä/../" * 50 + "?token=x")
    assert stem.startswith("cam_example_554")
    assert len(stem) <= 60
