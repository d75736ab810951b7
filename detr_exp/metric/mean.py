"""The mean of a few results, and where it would lie with other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple


class Mean(NamedTuple):
    """The mean of several results.

    Attributes:
        value: the mean.
        deviation: standard deviation of one result; None of a single one.
        interval: where the mean of further results lies in `level` of such intervals (Student's t); likewise.
        runs: how many there are.
    """

    value: float
    deviation: float | None
    interval: tuple[float, float] | None
    runs: int


def mean_of(results: Sequence[float], level: float = 0.95) -> Mean:
    """The mean of results of different seeds, at least one."""
    value, count = mean(results), len(results)
    if count < 2:
        return Mean(value, None, None, count)
    deviation = stdev(results)
    from scipy.special import stdtrit  # loads numpy, for which help and plans do not wait

    half = float(stdtrit(count - 1, (1 + level) / 2)) * deviation / count**0.5
    return Mean(value, deviation, (value - half, value + half), count)
