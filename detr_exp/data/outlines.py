"""Outlines of objects as bytes, one after another, so that millions of them are one array.

An outline is a whole number of 8 bytes: their kind, then what it needs. Polygons: their number (the kind), the numbers
of their coordinates, the coordinates. A run-length code: its kind, height, width, the number of bytes or runs, these.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from detr_exp.data.content import Outline

_TEXT, _RUNS = -1, -2  # kinds of run-length codes


def packed(outline: Outline | None) -> bytes:
    """The bytes of an outline; none where there is none."""
    if outline is None:
        return b""
    if isinstance(outline, list):
        head = array("q", [len(outline), *map(len, outline)])
        return head.tobytes() + b"".join([array("d", polygon).tobytes() for polygon in outline])
    (height, width), counts = outline["size"], outline["counts"]
    if isinstance(counts, str):
        text = counts.encode("latin-1")
        return array("q", [_TEXT, height, width, len(text)]).tobytes() + text + bytes(-len(text) % 8)
    return array("q", [_RUNS, height, width, len(counts), *counts]).tobytes()


def unpacked(data: np.ndarray) -> Outline | None:
    """The outline of `[n]` uint8."""
    if not len(data):
        return None
    head = data.view(np.int64)
    kind = int(head[0])
    if kind >= 0:
        values, at = data.view(np.float64)[1 + kind :].tolist(), 0
        outline = []
        for length in head[1 : 1 + kind].tolist():
            outline.append(values[at : at + length])
            at += length
        return outline
    size, count = head[1:3].tolist(), int(head[3])
    counts = data[32 : 32 + count].tobytes().decode("latin-1") if kind == _TEXT else head[4 : 4 + count].tolist()
    return {"size": size, "counts": counts}


def reaches(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[n]` the largest distance of a coordinate from 0; 0 where there are no polygons.

    Args:
        data: `[b]` uint8 all outlines.
        starts: `[n]` the first byte of each.
        lengths: `[n]` the bytes of each.
    """
    found = np.zeros(len(starts))
    rows = np.flatnonzero(lengths)
    rows = rows[np.argsort(starts[rows])]
    kinds = data.view(np.int64)[starts[rows] // 8]
    rows, kinds = rows[kinds > 0], kinds[kinds > 0]
    bounds = np.column_stack([starts[rows] // 8 + 1 + kinds, (starts[rows] + lengths[rows]) // 8]).reshape(-1)
    if len(rows):
        with np.errstate(invalid="ignore"):  # of what lies between them
            values = data.view(np.float64)[: bounds[-1]]
            low, high = (np.asarray(of.reduceat(values, bounds[:-1]))[::2] for of in (np.minimum, np.maximum))
        found[rows] = np.maximum(-low, high)
    return found


def frames(data: bytearray, ends: Sequence[int]) -> np.ndarray:
    """`[n, 2]` (height, width) of run-length codes; -1 for other outlines.

    Args:
        data: all outlines.
        ends: `[n]` the end of each.
    """
    stops = np.asarray(ends)
    found = np.full((len(stops), 2), -1)
    rows = np.flatnonzero(np.diff(stops, prepend=0))
    words, starts = np.frombuffer(data, np.int64), np.append(0, stops)[rows] // 8
    coded = words[starts] < 0
    found[rows[coded]] = words[starts[coded, None] + (1, 2)]
    return found
