"""Synthetic shapes that load slowly while a file exists, so that there is time to interrupt a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from detr_exp.data import shapes
from detr_exp.data.content import Content

NAP = 0.2  # seconds for an image


def slow(root: None, places: Mapping[str, int], *, size: int, seed: int, hold: str) -> Content:
    """
    Args:
        root, places, size, seed: see `detr_exp.data.shapes.shapes`.
        hold: the file.
    """
    content = shapes.shapes(root, places, size=size, seed=seed)
    content.read = {name: partial(_slow, read, Path(hold)) for name, read in content.read.items()}
    return content


def _slow(read: Callable[[], Any], hold: Path) -> Any:
    split = read()
    image = split.image

    def after_a_nap(*arguments: Any) -> Any:
        if hold.exists():
            time.sleep(NAP)
        return image(*arguments)

    split.image = after_a_nap
    return split
