"""Synthetic shapes that hold a training up while there is a file `hold`, so that there is time to interrupt it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from detr_exp.data import shapes
from detr_exp.data.content import Content
from detr_exp.trainer import checkpoint as files

HOLD = Path("hold")  # in the current folder


def held(root: None, places: Mapping[str, int], *, size: int, seed: int) -> Content:
    """See `detr_exp.data.shapes.shapes`; a run that has saved its state reads no image until it receives a signal."""
    content = shapes.shapes(root, places, size=size, seed=seed)
    content.read = {name: partial(_held, read) for name, read in content.read.items()}
    return content


def _held(read: Callable[[], Any]) -> Any:
    split = read()
    image = split.image
    saved = Path(HydraConfig.get().runtime.output_dir) / files.NEWEST

    def when_let_go(*arguments: Any) -> Any:
        while HOLD.exists() and saved.exists() and not _is_asked_to_end():
            time.sleep(0.05)
        return image(*arguments)

    split.image = when_let_go
    return split


def _is_asked_to_end() -> bool:
    """Whether the training has received a signal."""
    return signal.getsignal(signal.SIGTERM).__self__.number is not None
