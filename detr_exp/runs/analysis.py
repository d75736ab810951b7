"""What several runs say together: which settings differ, which of them mattered, which runs are on the front.

Legend: n runs with a result, g different values of a setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detr_exp.runs.settings import Setting

BINS = 4
FEWEST = 4  # runs with a result, to speak of importance


class Importance(NamedTuple):
    """How much of the differences between results goes with one setting.

    Attributes:
        name: of the setting.
        share: of the variance of the results that its values explain, 0..1, corrected for their number.
        trend: Spearman's rank correlation with the result, -1..1; None where its values are no numbers or only two.
        means: its values (or ranges of them) with the mean result of each, best first.
    """

    name: str
    share: float
    trend: float | None
    means: list[tuple[str, float]]


def importance(setting: Setting, scores: Sequence[float | None]) -> Importance | None:
    """How much a setting mattered by itself; None where there are too few results to say.

    The share is epsilon squared: 1 - (variance within its values / variance of all), each with its degrees of
    freedom. Numbers that are nearly all different are put into quarters first.
    """
    pairs = [(value, score) for value, score in zip(setting.values, scores) if score is not None]
    if len(pairs) < FEWEST:
        return None
    results = np.array([score for _, score in pairs])
    numbers = [_number(value) for value, _ in pairs]
    labels = [value for value, _ in pairs]
    if len(set(labels)) > len(labels) / 2:
        if None in numbers or len(labels) < 2 * BINS:
            return None
        labels = _quarters(np.array(numbers, dtype=float))
    groups = {label: results[[other == label for other in labels]] for label in dict.fromkeys(labels)}
    within = sum(((group - group.mean()) ** 2).sum() for group in groups.values())
    total = ((results - results.mean()) ** 2).sum()
    share = 0.0
    if total > 0 and 1 < len(groups) < len(results):
        share = 1 - (within / (len(results) - len(groups))) / (total / (len(results) - 1))
    trend = None
    if None not in numbers and len(set(numbers)) > 2 and total > 0:
        trend = float(np.corrcoef(_ranks(np.array(numbers, dtype=float)), _ranks(results))[0, 1])
    means = sorted(((label, float(group.mean())) for label, group in groups.items()), key=lambda pair: -pair[1])
    return Importance(setting.name, float(min(1.0, max(0.0, share))), trend, means)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats.

    Args:
        points: (cost, gain) each.
    """
    best, kept = float("-inf"), []
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1])):
        if points[place][1] > best:
            best = points[place][1]
            kept.append(place)
    return kept


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _quarters(numbers: np.ndarray) -> list[str]:
    """For each number the range of its quarter."""
    edges = np.quantile(numbers, np.linspace(0, 1, BINS + 1))
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, BINS - 1)
    return [f"{edges[i]:.3g} .. {edges[i + 1]:.3g}" for i in place]


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Ranks, the mean of them for equal numbers."""
    _, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]
