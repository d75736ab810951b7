"""A part of an image that a network sees as an image."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Where a part of an image lies.

    Attributes:
        x, y: its top left corner, in pixels of the image.
        size: (height, width) of the part.
        whole: (height, width) of the image.
        total: parts of the image, which follow each other.
    """

    x: int
    y: int
    size: tuple[int, int]
    whole: tuple[int, int]
    total: int
