"""Label errors that detections give reason to suspect, most suspicious first.

A detector that has not seen an image contradicts its labels where they are wrong, but also where it is wrong itself.
How often it is, the same split shows: within its kind, a suspect is ranked by the score of the contradiction, and among
the kinds by the share of objects that are contradicted at least as much. No threshold has to be chosen.

Legend: n detections of an image, m labelled objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from detr_exp.metric.confusion import iou
from detr_exp.metric.errors import BACKGROUND_IOU, LEAST_IOU, Judged

KINDS = ("class", "box", "invented", "missing")
CLASS, BOX, INVENTED, MISSING = KINDS
LARGEST = 0.1  # share of objects that look as bad; above it nothing is suspicious


class Suspect(NamedTuple):
    """A label, or its absence, that may be an error.

    Attributes:
        image_id: of the image.
        kind: class: the object is found as another class; box: it is found beside its box; invented: it is not found at
            all; missing: something is found where there is no label.
        rate: share of objects that are contradicted at least as much: the lower, the more suspicious.
        object: place in `Judged.truth_labels`; -1: none.
        detection: place in `Judged.scores` of the detection that contradicts; -1: none.
    """

    image_id: int
    kind: str
    rate: float
    object: int
    detection: int


class _Evidence(NamedTuple):
    """Of one image.

    Attributes:
        own: `[m]` highest score of a detection that finds an object.
        other, beside: `[2, m]` score and place of the best detection of another class at an object, and of its class
            beside it.
        support: `[m]` highest score of any detection near an object, lowered where they overlap by less than half.
        alone: places of detections without any object, the best of each place.
    """

    own: np.ndarray
    other: np.ndarray
    beside: np.ndarray
    support: np.ndarray
    alone: np.ndarray


def suspects(images: Mapping[int, Judged]) -> list[Suspect]:
    """All suspects of a split, most suspicious first; each object and each detection is named once.

    Args:
        images: from `errors.judged`, by detectors that were not trained on these images.
    """
    seen = {number: _evidence(one) for number, one in images.items()}
    owners = [(number, place) for number, one in images.items() for place in range(len(one.truth_labels))]
    if not owners:
        return []
    own, other, beside, support = (np.concatenate([part[k] for part in seen.values()], -1) for k in range(4))
    nobody = np.full(len(own), -1)
    contradictions = (
        (CLASS, other[0] - own, other[1], other[0] > own),
        (BOX, beside[0] - own, beside[1], beside[0] > own),
        (INVENTED, -support, nobody, nobody < 0),
    )
    found = _missing(images, seen, own)
    for kind, strength, by, holds in contradictions:
        rates = (len(own) - np.searchsorted(np.sort(strength), strength, side="left")) / len(own)
        for i in np.flatnonzero(holds & (rates <= LARGEST)):
            found.append(Suspect(owners[i][0], kind, float(rates[i]), owners[i][1], int(by[i])))
    found.sort(key=lambda one: one.rate)
    named: set[tuple[int, str, int]] = set()
    first = []
    for one in found:
        names = {(one.image_id, "object", one.object), (one.image_id, "detection", one.detection)}
        names = {name for name in names if name[2] >= 0}
        if not names & named:
            first.append(one)
        named |= names
    return first


def _evidence(one: Judged) -> _Evidence:
    overlap, scores = iou(one.boxes, one.truth_boxes), one.scores[:, None]
    same, near = one.labels[:, None] == one.truth_labels, overlap >= LEAST_IOU
    is_alone = np.logical_not(near.any(1))
    beside = same & (overlap >= BACKGROUND_IOU) & is_alone[:, None]

    def best(allowed: np.ndarray) -> np.ndarray:
        if not allowed.size:
            return np.stack([np.zeros(allowed.shape[1]), np.full(allowed.shape[1], -1)])
        by = np.where(allowed, scores, -1)
        return np.stack([by.max(0).clip(0), np.where(by.max(0) < 0, -1, by.argmax(0))])

    own, by = best(same & near)[0], best(beside)
    claimed = by[1, by[0] > own].astype(int)  # contradict the place of a label, as does what overlaps them
    is_alone &= ~(iou(one.boxes, one.boxes[claimed]) >= LEAST_IOU).any(1)
    support = (scores * (overlap / LEAST_IOU).clip(0, 1) ** 2).max(0, initial=0)
    alone = _distinct(np.flatnonzero(is_alone & (one.scores > 0)), one.boxes)
    return _Evidence(own, best(~same & near), by, support, alone)


def _distinct(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of detections of the same thing, best first, the first."""
    overlap = iou(boxes[places], boxes[places]) >= LEAST_IOU
    kept: list[int] = []
    for i in range(len(places)):
        if not overlap[i, kept].any():
            kept.append(i)
    return places[kept]


def _missing(images: Mapping[int, Judged], seen: Mapping[int, _Evidence], own: np.ndarray) -> list[Suspect]:
    """Detections without an object, as far as detections with such scores are right more often than not."""
    alone = [(number, int(place)) for number, part in seen.items() for place in part.alone]
    scores = np.array([images[number].scores[place] for number, place in alone])
    result = []
    for rank, i in enumerate(np.argsort(-scores, kind="stable"), start=1):
        if rank > LARGEST * len(own) or rank > np.count_nonzero(own >= scores[i]):
            break
        result.append(Suspect(alone[i][0], MISSING, rank / len(own), -1, alone[i][1]))
    return result
