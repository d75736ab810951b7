"""Synthetic shapes that load slowly while there is a file `hold`, so that there is time to interrupt a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from detr_exp.data import shapes
from detr_exp.data.content import Content

HOLD = Path("hold")  # in the current folder
NAP = 0.2  # seconds for an image


def slow(root: None, places: Mapping[str, int], *, size: int, seed: int) -> Content:
    """See `detr_exp.data.shapes.shapes`."""
    content = shapes.shapes(root, places, size=size, seed=seed)
    content.read = {name: partial(_slow, read) for name, read in content.read.items()}
    return content


def _slow(read: Callable[[], Any]) -> Any:
    split = read()
    image = split.image

    def after_a_nap(*arguments: Any) -> Any:
        if HOLD.exists():
            time.sleep(NAP)
        return image(*arguments)

    split.image = after_a_nap
    return split
