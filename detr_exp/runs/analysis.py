"""What several runs say together: which settings mattered, which points are on the front of accuracy and cost.

Legend: n runs with a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from detr_exp.metric.importance import importances
from detr_exp.runs.settings import Setting

ALPHA = 0.05
BINS = 4


class Effect(NamedTuple):
    """What a setting did to the results, or two settings together.

    Attributes:
        name: of the setting, or of both.
        share: of the variance of the results that goes with it, 0..1, as far as others do not explain it.
        p: how often noise alone explains as much, corrected for the number of settings.
        verdict: in words.
        trend: Spearman's rank correlation with the result, -1..1; None where its values are no numbers or only two.
        means: its values (or ranges of them) with the mean result of each, best first.
    """

    name: str
    share: float
    p: float
    verdict: str
    trend: float | None
    means: list[tuple[str, float]]


class Cost(NamedTuple):
    """What a point costs and reaches.

    Attributes:
        cost: less is better.
        noise: standard error of `cost`.
        gain: more is better.
    """

    cost: float
    noise: float
    gain: float


def effects(settings: Sequence[Setting], scores: Sequence[float | None]) -> list[Effect]:
    """What mattered, surest first; see `metric.importance`.

    Args:
        settings: without seeds.
        scores: of every run; None or not finite where there is no result.
    """
    scored = [(place, score) for place, score in enumerate(scores) if score is not None and math.isfinite(score)]
    known, results = [place for place, _ in scored], [score for _, score in scored]
    values = {setting.name: [setting.values[place] for place in known] for setting in settings}
    found = []
    for one in importances(values, results, alpha=ALPHA):
        of_one = values[one.names[0]] if len(one.names) == 1 else None
        numbers = _numbers(of_one or [])
        trend = None
        if len(set(numbers)) > 2 and len(set(results)) > 1:
            trend = float(stats.spearmanr(numbers, results).statistic)
        labels = of_one or [" / ".join(pair) for pair in zip(*(values[name] for name in one.names))]
        means = _means(labels, numbers, np.array(results, dtype=float))
        verdict = _verdict(one.p, one.least)
        found.append(Effect(" x ".join(one.names), one.share, one.p, verdict, trend, means))
    return found


def _verdict(p: float, least: float) -> str:
    if least >= ALPHA:
        return "too few runs to tell"
    return "mattered" if p < ALPHA else "no significant effect"


def _means(labels: list[str], numbers: Sequence[float], results: np.ndarray) -> list[tuple[str, float]]:
    """Values, or quarters of numbers that are nearly all different, with the mean result of each, best first."""
    if len(set(labels)) > len(labels) / 2 and numbers and len(labels) >= 2 * BINS:
        labels = _quarters(np.array(numbers, dtype=float))
    groups: dict[str, list[float]] = {}
    for label, result in zip(labels, results):
        groups.setdefault(label, []).append(result)
    return sorted(((label, float(np.mean(group))) for label, group in groups.items()), key=lambda pair: -pair[1])


class Noise(NamedTuple):
    """How much the cost of one network scatters from run to run.

    Attributes:
        share: standard deviation, as a share of the cost.
        freedom: degrees of freedom of the estimate.
    """

    share: float
    freedom: int


def front(points: Sequence[Cost], freedom: float = math.inf) -> list[int]:
    """Places of the points that no other beats, cheapest first.

    One beats another by a higher gain where its cost cannot be told to be higher, or by a cost that is surely lower
    where its gain is no lower. `docs/statistics.md` has how often equal networks get several places.

    Args:
        points: of one kind of cost.
        freedom: degrees of freedom of the noise of all costs.
    """
    sure = float(stats.t.ppf(1 - ALPHA / 2, freedom))
    gains: dict[tuple[float, float], float] = {}  # the highest at every cost: no other there beats more
    for point in points:
        gains[point.cost, point.noise] = max(point.gain, gains.get((point.cost, point.noise), -math.inf))
    cost, noise, gain = np.array([(*known, most) for known, most in gains.items()], dtype=float).reshape(-1, 3).T

    def is_beaten(point: Cost) -> bool:
        unsure = sure * np.hypot(noise, point.noise)
        higher = (gain > point.gain) & (cost <= point.cost + unsure)
        return bool((higher | (gain == point.gain) & (cost < point.cost - unsure)).any())

    kept = [place for place, point in enumerate(points) if not is_beaten(point)]
    return sorted(kept, key=lambda place: (points[place].cost, points[place].gain))


def told_apart(points: Sequence[Cost], spread: np.ndarray, freedom: float = math.inf) -> list[int]:
    """Places of the points of a front whose gains and costs can be told apart, cheapest first.

    From the best gain down: of the points that cannot be told to gain less than the best one, those that cannot be
    told to cost more than the cheapest of them, and of these the one that gains most; then the same among the points
    that surely cost less. A chance winner of many is so replaced by what is as good and cheaper.

    Args:
        points: of one kind of cost.
        spread: `[n, n]` standard errors of the differences of gains; zero where they are exact.
        freedom: degrees of freedom of the noise of all costs.
    """
    sure, sure_gain = float(stats.t.ppf(1 - ALPHA / 2, freedom)), float(stats.norm.ppf(1 - ALPHA / 2))
    left, kept = list(range(len(points))), []

    def surely_cheaper(one: int, other: int) -> bool:
        apart = sure * math.hypot(points[one].noise, points[other].noise)
        return points[one].cost < points[other].cost - apart

    while left:
        best = max(left, key=lambda place: (points[place].gain, -points[place].cost))
        alike = [one for one in left if points[best].gain - points[one].gain <= sure_gain * spread[best, one]]
        cheapest = min(alike, key=lambda place: points[place].cost)
        level = [one for one in alike if not surely_cheaper(cheapest, one)]
        chosen = max(level, key=lambda place: (points[place].gain, -points[place].cost))
        kept.append(chosen)
        left = [one for one in left if surely_cheaper(one, chosen)]
    return kept[::-1]


def noise_of(costs: Sequence[Sequence[float]]) -> Noise | None:
    """How much the cost of one run scatters around that of its network.

    Args:
        costs: of every network, one of each run, > 0. Several measurements in one run share what else its machine did,
            and are one.

    Returns:
        None where no network was measured in more than one run.
    """
    freedom = sum(len(one) - 1 for one in costs)
    if freedom < 1:
        return None
    squares = sum(float(((np.array(one) / np.mean(one) - 1) ** 2).sum()) for one in costs)
    return Noise(math.sqrt(squares / freedom), freedom)


def _numbers(texts: Sequence[str]) -> list[float]:
    """Empty where any of them is none."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []


def _quarters(numbers: np.ndarray) -> list[str]:
    """For each number the range of its quarter."""
    edges = np.quantile(numbers, np.linspace(0, 1, BINS + 1))
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, BINS - 1)
    return [f"{edges[i]:.3g} .. {edges[i + 1]:.3g}" for i in place]
