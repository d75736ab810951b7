"""Frames of cameras and of streams over a network, for as long as they come."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np

from detr_exp.tracker.secrets import masked

STREAM = re.compile(r"(rtsps?|rtmps?|srt|udp|tcp)://", re.IGNORECASE)
CAMERA = re.compile(r"\d{1,3}")
PATIENCE = 10_000  # milliseconds in which a stream must be opened, and send a frame

log = logging.getLogger("detr_exp.predict")


def is_live(source: str) -> bool:
    """Whether `source` is the number of a camera, or the address of a stream."""
    return CAMERA.fullmatch(source) is not None or STREAM.match(source) is not None


def frames(source: str, every: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """(number, read) of every n-th frame; `read` returns `[H, W, 3]` uint8 RGB.

    Args:
        source: see `is_live`.
        every: n.

    Raises:
        ValueError: it cannot be opened.
    """
    return _read(_opened(source), source, every)


def _read(capture: cv2.VideoCapture, source: str, every: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    number = 0
    try:
        while capture.grab():
            if number % every == 0:
                found, frame = capture.retrieve()
                if not found:
                    break
                yield number, partial(cv2.cvtColor, frame, cv2.COLOR_BGR2RGB)
            number += 1
    finally:
        capture.release()
    log.warning("%s sent no further frame after %d", _named(source), number)


def _opened(source: str) -> cv2.VideoCapture:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it would print is said below
    if CAMERA.fullmatch(source):
        capture = cv2.VideoCapture(int(source))
        why = "list them (Linux: ls /dev/video*), close what else uses it, or give another number: source=1"
    else:
        times = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, PATIENCE]
        capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, times)
        why = "see whether a player opens it, or give another address: source=rtsp://HOST/PATH"
    if not capture.isOpened():
        raise ValueError(f"source={masked(source)}: {_named(source)} cannot be opened; {why}")
    return capture


def _named(source: str) -> str:
    return f"camera {source}" if CAMERA.fullmatch(source) else f"the stream {masked(source)}"


def stem_of(source: str) -> str:
    """Begin of the names of its result files."""
    if CAMERA.fullmatch(source):
        return f"camera{int(source)}"
    return re.sub(r"[^A-Za-z0-9]+", "_", str(masked(source)).partition("://")[2].partition("?")[0]).strip("_")[:60]
