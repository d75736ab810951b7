"""Realistic data sets: each gives an error in a sentence, a warning, or is fine.

Each case is read, checked and loaded in a process of its own that may take little memory and few seconds: a bomb, a
named pipe or a stray vertex ends the case, not the tests.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from detr_exp.cli import report
from detr_exp.data.augment import Augment
from detr_exp.data.auto import auto

from .cases import CASES
from .conftest import data_set

resource = pytest.importorskip("resource", reason="limits of a process are set by POSIX systems only")

SECONDS, MEGABYTES = 5, 700  # of processor time and of memory beyond what the tests have


def use(root: Path, on_error: str) -> str:
    """Read, check and load everything, and say what came of it as a person would see it."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger("detr_exp").addHandler(handler)
    logging.getLogger("detr_exp").setLevel(logging.INFO)
    with contextlib.redirect_stderr(said):
        try:
            source = lambda root, places: auto(root, places, on_error=on_error)  # noqa: E731
            augment = Augment(flip=0.5, iou_crop=0.5, zoom_out=0.5)
            data = data_set(root, source, augment=augment, on_error=on_error)
            data.check(["train"])
            network = SimpleNamespace(image_size=(64, 96), stride=32)
            poses = ["keypoints"] * (data.keypoints is not None)
            for name in data.content.read:
                network.tasks = ("boxes", *["masks"] * data.split(name).has_masks, *poses)
                data.split(name).truth()
                for training in (True, False):
                    list(data.loader(name, network=network, batch_size=2, seed=0, training=training))
        except Exception as error:
            return f"status {report(error)}\n{said.getvalue()}"
    return f"status 0\n{said.getvalue()}"


def in_a_cell(do: Callable[[], str]) -> str:
    """What `do` returns, done by a process with limits; `ended by signal 9` and the like where it broke them."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 2**22
        spent = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))
        most = pages * resource.getpagesize() + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        os.close(receive)
        try:
            text = do()
        except BaseException as error:
            text = f"not caught: {error!r}"
        os.write(send, text.encode(errors="replace")[:60_000])
        os._exit(0)
    os.close(send)
    parts, deadline = [], time.monotonic() + 60  # of waiting: a process that sleeps uses no processor time
    with os.fdopen(receive, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
            part = pipe.read(65536)
            if not part:
                break
            parts.append(part)
        else:
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return b"".join(parts).decode() if parts else f"ended by signal {status & 127}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_ends_as_it_should(tmp_path, case):
    root = tmp_path / "set"
    root.mkdir()
    case.write(root)
    said = in_a_cell(lambda: use(root, case.on_error))
    assert "Traceback" not in said
    assert said.startswith("status 2" if case.outcome == "error" else "status 0"), said
    assert ("WARNING" in said) is (case.outcome == "warning") or case.outcome == "error", said
    assert re.search(case.words, said, re.DOTALL), said
    assert "\x1b" not in said


def test_there_are_enough_of_them():
    assert len({case.name for case in CASES}) == len(CASES) >= 60
