"""Whether two sides differ: few runs a side (seeds), all evaluated on the same draws of the images.

A result is the mean of its side + what the images do to that side + what the seed does (alone, and with the images).
The test images are one draw that all runs share, so more runs do not average them out; what the seeds do is averaged.
The variance of a difference of means is therefore

    runs of a / n_a + runs of b / n_b + images                       (or, for the same seeds on both sides,
    runs of a - b / n + images                                        which then go in pairs)

where "runs" is the variance between runs and "images" the variance of the difference over the draws, less the part of
it that differs from run to run: the variance between runs holds that one already. The interval is Student's, with
Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946), in whose weights each variance stands at an upper
limit of what it may be: with two or three runs a variance that is small by luck would otherwise promise a certainty
that nobody has. The limit goes up with the level, because luck of that kind is what is left among the smallest
p-values. `docs/statistics.md` has what this was chosen against, and how often it is wrong.

Legend: n runs of a side, B draws of the images, I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

SMALLEST = 1e-12  # p-value that is told from 0
FEWEST_DRAWS = 20  # with a value, to speak of the images


class Term(NamedTuple):
    """An estimated variance of a difference of means, and the degrees of freedom of the estimate."""

    variance: float
    freedom: float


class Difference(NamedTuple):
    """A difference of two means (b - a) and what it may be off by.

    Attributes:
        value: b - a.
        runs: the share of its variance that further runs would make smaller, one term for each estimate of it; empty
            for one run a side, of which other runs may say anything.
        images: the share that only further images would make smaller.
        counts: runs of a and of b.
        paired: run i of a goes with run i of b.
    """

    value: float
    runs: tuple[Term, ...]
    images: Term
    counts: tuple[int, int]
    paired: bool

    @property
    def about_runs(self) -> bool:
        """Whether it speaks of other runs of these settings; else only of these two checkpoints on other images."""
        return bool(self.runs)


class Need(NamedTuple):
    """What it takes to tell an effect.

    Attributes:
        seeds: fewest runs a side; None where `most` do not suffice, or the noise of seeds is unknown.
        images: how many times as many images are needed at the very least, however many the seeds; above 1 no number
            of seeds tells it with these images.
    """

    seeds: int | None
    images: float


def difference(
    a: np.ndarray, b: np.ndarray, drawn_a: np.ndarray, drawn_b: np.ndarray, *, images: int, paired: bool
) -> Difference:
    """The difference of two sides.

    A side of one run beside one of several takes the scatter of the other.

    Args:
        a: `[n_a]` results of the runs of a.
        b: `[n_b]`
        drawn_a: `[n_a, B]` the same on draws of the images; NaN where a draw gives none.
        drawn_b: `[n_b, B]` on the same draws.
        images: that hold what is judged (for a class, those that show it).
        paired: whether run i of a and run i of b have the same seed.

    Raises:
        ValueError: shapes do not fit each other.
    """
    if drawn_a.shape[0] != len(a) or drawn_b.shape[0] != len(b) or drawn_a.shape[1] != drawn_b.shape[1]:
        raise ValueError(f"results {len(a)}, {len(b)} do not fit draws {drawn_a.shape}, {drawn_b.shape}")
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} runs make no pairs")
    value = float(np.mean(b) - np.mean(a))
    known = ~(np.isnan(drawn_a).any(0) | np.isnan(drawn_b).any(0))
    if known.sum() < FEWEST_DRAWS or images < 2:
        drawn_a, drawn_b = np.full((len(a), 2), np.nan), np.full((len(b), 2), np.nan)
    else:
        drawn_a, drawn_b = drawn_a[:, known], drawn_b[:, known]
    total = (drawn_b.mean(0) - drawn_a.mean(0)).var(ddof=1)
    if paired:
        own, runs = _between([drawn_b - drawn_a], (np.asarray(b) - np.asarray(a),))
    else:
        own, runs = _between([drawn_a, drawn_b], (np.asarray(a), np.asarray(b)))
    of_images = float(np.maximum(total - own, 0)) * images / max(1, images - 1)  # a draw scatters less than a new set
    freedom = max(1, min(images, drawn_a.shape[1]) - 1)  # few draws do not show it better than few images
    return Difference(value, runs, Term(of_images, freedom), (len(a), len(b)), paired)


def _between(drawn: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> tuple[float, tuple[Term, ...]]:
    """The variance of the means over the draws that differs from run to run, and the terms of the runs."""
    several = [side for side in range(len(results)) if len(results[side]) > 1]
    own, terms = 0.0, []
    for side in several:
        alone = [other for other in range(len(results)) if len(results[other]) == 1]
        count = len(results[side])
        weight = 1 / count + len(alone)
        apart = drawn[side] - drawn[side].mean(0)
        own += float(apart.var(axis=1, ddof=1).sum() / (count - 1)) * weight
        terms.append(Term(float(results[side].var(ddof=1)) * weight, count - 1))
    return own, tuple(terms)


def error(found: Difference, alpha: float) -> tuple[float, float]:
    """Standard error of a difference, and its degrees of freedom for an interval of level 1 - alpha."""
    variances, freedoms = np.array([*found.runs, found.images], dtype=float).T
    deviation = float(np.sqrt(variances.sum()))
    if not deviation > 0:
        return deviation, 1.0
    lucky = min(0.5, alpha**0.5)  # how often an estimate may be so small that the variance is above its limit
    upper = variances * freedoms / special.chdtri(freedoms, 1 - lucky)
    return deviation, float(upper.sum() ** 2 / (upper**2 / freedoms).sum())


def interval(found: Difference, level: float = 0.95) -> tuple[float, float]:
    """Where the true difference lies in `level` of such intervals; it leaves out 0 where `p_value` < 1 - level."""
    deviation, freedom = error(found, 1 - level)
    half = float(special.stdtrit(freedom, (1 + level) / 2)) * deviation
    return found.value - half, found.value + half


def p_value(found: Difference) -> float:
    """How often equal sides would differ as much, two-sided."""
    return _two_sided(found, abs(found.value))


def equivalence_p(found: Difference, margin: float) -> float:
    """How often sides that differ by `margin` or more would look as equal: the larger of two one-sided tests.

    Below 0.05 "they differ by less than the margin" is wrong in at most 5 of 100 such claims; that is where the 90 %
    interval lies within the margin (Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987).
    """
    distance = margin - abs(found.value)
    p = _two_sided(found, abs(distance)) / 2
    return p if distance >= 0 else 1 - p


def _two_sided(found: Difference, distance: float) -> float:
    """1 - the level of the interval that just reaches as far as `distance` to both sides."""

    def excess(alpha: float) -> float:
        deviation, freedom = error(found, alpha)
        return 2 * float(special.stdtr(freedom, -distance / deviation)) - alpha

    deviation = error(found, 1.0)[0]
    if not deviation > 0:
        return deviation if np.isnan(deviation) else float(distance == 0)
    return SMALLEST if excess(SMALLEST) <= 0 else float(optimize.brentq(excess, SMALLEST, 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scand. J. of Statistics 6, 1979); NaN ones do not count."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]
    adjusted = np.full(len(values), np.nan)
    steps = values[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


def verdict(p: float, equivalence: float | None, value: float, alpha: float = 0.05) -> str:
    """`b`, `a` (that side is better), `equal` (they differ by less than the margin) or `unknown`.

    Args:
        p: of the difference, corrected where there are several.
        equivalence: p of the equivalence, likewise; None without a margin.
        value: b - a.
        alpha: how often a claim may be wrong.
    """
    if p < alpha:
        return "b" if value > 0 else "a"
    return "equal" if equivalence is not None and equivalence < alpha else "unknown"


def need(found: Difference, effect: float, *, level: float = 0.95, power: float = 0.8, most: int = 100) -> Need:
    """What it takes to tell a true difference of `effect` with a chance of `power`, if the noise is as it was seen."""
    alpha, effect = 1 - level, abs(effect)
    if not effect > 0 or np.isnan(found.images.variance):
        return Need(None, float("inf"))
    least = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    images = float(found.images.variance * (least / effect) ** 2)
    if not found.about_runs:
        return Need(None, images)
    for count in range(2, most + 1):
        deviation, freedom = error(_with(found, count), alpha)
        if deviation == 0:
            return Need(count, images)
        edge, shift = stats.t.ppf(1 - alpha / 2, freedom), effect / deviation
        if stats.nct.sf(edge, freedom, shift) + stats.nct.cdf(-edge, freedom, shift) >= power:
            return Need(count, images)
    return Need(None, images)


def _with(found: Difference, count: int) -> Difference:
    """The same with `count` runs a side."""
    if found.paired or 1 not in found.counts:
        sizes = (found.counts[0],) if found.paired else found.counts
        runs = tuple(Term(term.variance * size / count, count - 1) for term, size in zip(found.runs, sizes))
    else:  # one term for both sides
        term, several = found.runs[0], max(found.counts)
        one = term.variance / (1 + 1 / several) / count
        runs = (Term(one, count - 1), Term(one, count - 1))
    return found._replace(runs=runs, counts=(count, count))
