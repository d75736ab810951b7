"""The page to look at the mistakes of a detector: what its script shows, gathered from detections and labels."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime

import numpy as np
from PIL import Image

from detr_exp.metric.errors import KINDS, Judged
from detr_exp.metric.suspects import Suspect
from detr_exp.ops.draw import shown
from detr_exp.runs.html import filled, jpeg_address
from detr_exp.values import Values

TEMPLATE = "review.html"
LEAST_SCORE = 0.05  # of detections on the page, or half of the threshold where that is lower
SIDES, QUALITY = (1280, 960, 720, 560, 440, 340, 260, 200, 150), 80


def image_entry(
    number: int,
    name: str,
    size: tuple[int, int],
    one: Judged,
    least: float,
    *,
    annotations: Sequence[int | None],
    outlines: tuple[Sequence[str], Sequence[str]],
    **facts: object,
) -> Values:
    """What the page knows of an image.

    Args:
        number: its id.
        name: as it is shown, and exported.
        size: (height, width) in pixels.
        one: its detections and objects.
        least: lowest score of detections on the page.
        annotations: the number of each object in its file; None: not known.
        outlines: a path of SVG, or "", for each object and for each of those detections.
        **facts: further values.
    """
    height, width = size
    kept = one.scores >= least
    columns = one.labels[kept], one.scores[kept], one.boxes[kept], one.kinds[kept], one.objects[kept]
    return {
        "id": number,
        "name": name,
        "size": [width, height],
        "objects": [
            [int(label), *_rounded(box), annotation, path]
            for label, box, annotation, path in zip(one.truth_labels, one.truth_boxes, annotations, outlines[0])
        ],
        "found": [
            [int(label), round(float(score), 3), *_rounded(box), KINDS[kind], int(owner), path]
            for label, score, box, kind, owner, path in zip(*columns, outlines[1])
        ],
        **facts,
    }


def thumbnail(pixels: np.ndarray, most_bytes: float) -> str:
    """An image as a data address, as large as fits into so many bytes, but no larger than it is."""
    image = Image.fromarray(shown(pixels))
    address = ""
    for side in SIDES:
        if side >= 2 * max(image.size) and side != SIDES[-1]:
            continue
        small = image.copy()
        small.thumbnail((side, side))
        address = jpeg_address(small, QUALITY)
        if len(address) <= most_bytes:
            break
    return address


def render(images: Sequence[Values], suspects: Sequence[Suspect], facts: Values, now: datetime) -> str:
    """The page as HTML, complete in itself.

    Args:
        images: from `image_entry`, with their `pixels`.
        suspects: of these images, most suspicious first.
        facts: `title`, `about` (what was asked for), `classes` as [name, category id], `threshold`, `least`, `ap50` and
            `costs` of `errors.costs`, `values` of the metric, `notes`: sentences for the reader; `all_images`.
        now: when it was made.
    """
    place_of = {image["id"]: place for place, image in enumerate(images)}
    rows = [[place_of[one.image_id], one.kind, round(one.rate, 4), one.object, one.detection] for one in suspects]
    content: Values = {**facts, "images": images, "suspects": rows}
    shown = json.dumps({**content, "images": [{**image, "pixels": ""} for image in images]}, sort_keys=True)
    content["mark"] = hashlib.sha256(shown.encode()).hexdigest()[:16]  # keeps what was marked on another page apart
    return filled(
        TEMPLATE, title=facts["title"], about=facts["about"], now=f"{now:%Y-%m-%d %H:%M}", content=_plain(content)
    )


def places(suspects: Sequence[Suspect], images: Mapping[int, Judged], threshold: float, most: int) -> list[int]:
    """The ids of the images to show where there are too many: those of suspects, then those with most errors."""
    by_errors = sorted(images, key=lambda number: -_errors(images[number], threshold))
    return list(dict.fromkeys([*(one.image_id for one in suspects), *by_errors]))[:most]


def _errors(one: Judged, threshold: float) -> int:
    false = (one.scores >= threshold) & (one.kinds != KINDS.index("hit")) & (one.kinds != KINDS.index("ignored"))
    return int(one.missed.sum() + false.sum())


def _rounded(box: np.ndarray) -> list[float]:
    return [round(float(number), 2) for number in box]


def _plain(value: object) -> object:
    """Numbers that JSON has not are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
