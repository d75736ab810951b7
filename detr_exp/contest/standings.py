"""Who is ahead on which set, from finished cells; `metric.verdict` has the statistics.

Legend: n seeds, B resamples of the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detr_exp.metric import verdict as statistics
from detr_exp.metric.verdict import Difference
from detr_exp.values import Values

LEARNED = 0.05  # mean mAP; what is below has learned nothing, and is no contender
LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """A contender beside the reference.

    Attributes:
        difference: of the mean mAP, contender - reference.
        interval: of it, over seeds and images.
        p: corrected for the number of comparisons (Holm); None where one of both has learned nothing.
        verdict: `behind`, `ahead`, `equal` (within the margin) or `unknown`; `nothing` where p is None.
        seeds: of each side that would probably tell; None where no number would, or one does already.
    """

    difference: float
    interval: tuple[float, float]
    p: float | None
    verdict: str
    seeds: int | None


@dataclass(frozen=True)
class Row:
    """A contender on a set.

    Attributes:
        name: of the contender.
        cells: one per seed.
        mean: mAP.
        interval: of it, over seeds and images; None with one seed.
        beside: the reference; None for itself, and where both have only one seed.
    """

    name: str
    cells: Sequence[Values]
    mean: float
    interval: tuple[float, float] | None
    beside: Comparison | None = None

    @property
    def has_learned(self) -> bool:
        return self.mean >= LEARNED


def standings(cells: Sequence[Values], reference: str, margin: float) -> dict[str, list[Row]]:
    """The rows of each set, best first.

    Args:
        cells: finished, under the same conditions.
        reference: name of a contender.
        margin: differences below it are irrelevant.
    """
    tables: dict[str, list[Row]] = {}
    for name in dict.fromkeys(cell["set"] for cell in cells):
        of_set = [cell for cell in cells if cell["set"] == name]
        contenders = dict.fromkeys(cell["contender"] for cell in of_set)
        rows = [_row(one, [cell for cell in of_set if cell["contender"] == one]) for one in contenders]
        tables[name] = sorted(rows, key=lambda row: -row.mean)
    pairs = []
    for rows in tables.values():
        first = next((row for row in rows if row.name == reference), None)
        others = [row for row in rows if row.name != reference and first is not None]
        pairs += [(first, row, _difference(first, row)) for row in others if first is not None]
    pairs = [pair for pair in pairs if pair[2].about_runs]
    counted = [found for first, row, found in pairs if first.has_learned and row.has_learned]
    judged = dict(zip(map(id, counted), _judged(counted, margin)))
    beside = {id(row): judged.get(id(found)) or _unjudged(found) for _, row, found in pairs}
    return {name: [replace(row, beside=beside.get(id(row))) for row in rows] for name, rows in tables.items()}


def _row(name: str, cells: Sequence[Values]) -> Row:
    values, drawn = _numbers(cells)
    interval = None
    if len(cells) > 1:
        nothing = np.zeros_like(values), np.zeros_like(drawn)
        images = cells[0]["images"]
        found = statistics.difference(nothing[0], values, nothing[1], drawn, images=images, paired=True)
        interval = statistics.interval(found, LEVEL)
    return Row(name, cells, float(values.mean()), interval)


def _numbers(cells: Sequence[Values]) -> tuple[np.ndarray, np.ndarray]:
    """`[n]` mAP and `[n, B]` that of the resamples."""
    return np.array([cell["mAP"] for cell in cells]), np.array([cell["drawn"] for cell in cells])


def _difference(first: Row, other: Row) -> Difference:
    """Runs go in pairs where both are the same program with the same seeds; a seed of another program is no partner."""
    seeds = [[cell["seed"] for cell in row.cells] for row in (first, other)]
    programs = {cell["conditions"]["program"] for row in (first, other) for cell in row.cells}
    a, b = _numbers(first.cells), _numbers(other.cells)
    paired = len(programs) == 1 and seeds[0] == seeds[1] and len(seeds[0]) > 1
    return statistics.difference(a[0], b[0], a[1], b[1], images=first.cells[0]["images"], paired=paired)


def _judged(found: Sequence[Difference], margin: float) -> list[Comparison]:
    p = statistics.holm([statistics.p_value(one) for one in found])
    equal = statistics.holm([statistics.equivalence_p(one, margin) for one in found])
    made = []
    for one, of_difference, of_equality in zip(found, p, equal):
        verdict = statistics.verdict(of_difference, of_equality, one.value, 1 - LEVEL)
        words = {"a": "behind", "b": "ahead"}.get(verdict, verdict)
        effect = max(abs(one.value), margin)
        seeds = statistics.need(one, effect, level=LEVEL, power=POWER).seeds if verdict == "unknown" else None
        low, high = statistics.interval(one, LEVEL)
        made.append(Comparison(one.value, (low, high), of_difference, words, seeds))
    return made


def _unjudged(found: Difference) -> Comparison:
    return Comparison(found.value, statistics.interval(found, LEVEL), None, "nothing", None)


def spread(cells: Sequence[Values]) -> float:
    """Standard deviation of mAP between seeds; NaN with one."""
    return float(np.std([cell["mAP"] for cell in cells], ddof=1)) if len(cells) > 1 else math.nan
