"""Label errors that detections give reason to suspect, most suspicious first.

A detector that has not seen an image contradicts its labels where they are wrong, but also where it is wrong itself.
How often it is, the same split shows: a suspect is ranked by the share of objects (or of detections) that look at least
as bad. That makes the kinds of suspects comparable, without a threshold and whatever the quality of the detector.

Legend: n detections of an image, m labelled objects. The confidence of a detection is the share of the objects of its
class that are found with a lower score: 0.5 is usual, whatever scores the class has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        rate: share of objects, or of detections, that look at least as bad: the lower, the more suspicious.
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
        own, other, loose: `[2, m]` confidence and place of the best detection of an object's class, of another class,
            and of its class beside it.
        alone: places of detections without any object.
        confidence: `[n]`.
    """

    own: np.ndarray
    other: np.ndarray
    loose: np.ndarray
    alone: np.ndarray
    confidence: np.ndarray


def suspects(images: Mapping[int, Judged]) -> list[Suspect]:
    """All suspects of a split, most suspicious first; each object and each detection is named once.

    Args:
        images: from `errors.judged`, by detectors that were not trained on these images.
    """
    usual = _usual([*images.values()])
    seen = {number: _evidence(one, usual) for number, one in images.items()}
    owners = [(number, place) for number, one in images.items() for place in range(len(one.truth_labels))]
    own, other, loose = (
        np.concatenate([np.zeros((2, 0)), *(part[which] for part in seen.values())], 1) for which in range(3)
    )
    contradicted = {CLASS: other[0] - own[0], BOX: loose[0] - own[0]}
    found: list[Suspect] = []
    for kind, evidence in (*contradicted.items(), (INVENTED, -np.maximum(np.maximum(own[0], other[0]), loose[0]))):
        rates = _share_of_higher(evidence, evidence)
        by = {CLASS: other[1], BOX: loose[1], INVENTED: np.full(len(evidence), -1)}[kind]
        for i in np.flatnonzero((rates <= LARGEST) & ((evidence > 0) | (kind == INVENTED))):
            found.append(Suspect(owners[i][0], kind, float(rates[i]), owners[i][1], int(by[i])))
    found += _missing(seen, own[0])
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


def _usual(images: Sequence[Judged]) -> dict[int, np.ndarray]:
    """For each label the scores with which its objects are found, ascending."""
    scores: dict[int, list[float]] = {}
    for one in images:
        near = (iou(one.boxes, one.truth_boxes) >= LEAST_IOU) & (one.labels[:, None] == one.truth_labels)
        best = np.where(near, one.scores[:, None], 0).max(0, initial=0)
        for label, score in zip(one.truth_labels.tolist(), best.tolist()):
            if score > 0:
                scores.setdefault(label, []).append(score)
    return {label: np.sort(of_label) for label, of_label in scores.items()}


def _evidence(one: Judged, usual: Mapping[int, np.ndarray]) -> _Evidence:
    confidence = np.zeros(len(one.scores))
    for label, scores in usual.items():
        of_class = one.labels == label
        confidence[of_class] = np.searchsorted(scores, one.scores[of_class], side="right") / len(scores)
    overlap = iou(one.boxes, one.truth_boxes)
    same, near = one.labels[:, None] == one.truth_labels, overlap >= LEAST_IOU
    is_free = ~(same & near).any(1)[:, None]
    beside = same & (overlap >= BACKGROUND_IOU) & ~near & is_free

    def best(allowed: np.ndarray) -> np.ndarray:
        if not allowed.size:
            return np.stack([np.zeros(len(one.truth_labels)), np.full(len(one.truth_labels), -1)])
        by = np.where(allowed, confidence[:, None], -1)
        return np.stack([by.max(0).clip(0), np.where(by.max(0) < 0, -1, by.argmax(0))])

    alone = np.flatnonzero(~near.any(1) & (confidence > 0))
    alone = alone[np.argsort(-confidence[alone], kind="stable")]
    return _Evidence(best(same & near), best(~same & near), best(beside), _distinct(alone, one.boxes), confidence)


def _distinct(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of detections of the same thing, the first."""
    overlap = iou(boxes[places], boxes[places]) >= LEAST_IOU
    kept: list[int] = []
    for i in range(len(places)):
        if not overlap[i, kept].any():
            kept.append(i)
    return places[kept]


def _missing(seen: Mapping[int, _Evidence], found: np.ndarray) -> list[Suspect]:
    """Detections without an object, by their share of all that are at least as confident."""
    alone = [(number, int(place)) for number, part in seen.items() for place in part.alone]
    confidence = np.array([seen[number].confidence[place] for number, place in alone])
    order = np.argsort(-confidence, kind="stable")
    among = np.searchsorted(np.sort(-found), -confidence[order], side="right")  # objects found as confidently
    ranks = np.arange(1, len(order) + 1)
    rates = np.maximum.accumulate(ranks / (ranks + among)) if len(order) else ranks
    return [
        Suspect(alone[i][0], MISSING, float(rate), -1, alone[i][1]) for i, rate in zip(order, rates) if rate <= LARGEST
    ]


def _share_of_higher(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each value the share of `among` that is at least as high."""
    return (len(among) - np.searchsorted(np.sort(among), values, side="left")) / max(1, len(among))
