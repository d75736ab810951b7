"""Racing: after every seed, which points of a sweep need no further one.

All points see the same seeds, one after the other. A point goes when there are more points than the runs that are left
can pay for (the worst first, fewer every time; as in sequential halving, Karnin et al., ICML 2013). It goes as well,
from two seeds on, when it lies behind the leader by more than luck explains (a t-test on what points and seeds do not
explain together, corrected by Holm for the number of points; as in F-Race, Birattari et al., GECCO 2002). The last two
see all seeds, unless the test tells them apart: with fewer seeds the winner would be a matter of luck too often.
`docs/statistics.md` has how often a race misses, and what it costs.

Legend: P points, S seeds run so far.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from detr_exp.metric.verdict import holm

LAST = 2  # points that see all seeds
DECLINE = 0.7  # share of the points that is given a further seed
SPARE = 3  # runs besides, where points or seeds are few
FEWEST = 3  # seeds of a race


def budget(points: int, seeds: int, share: float = 0.6) -> int:
    """Runs that a race may spend: `share` of the full grid, or more where two points could hardly see all seeds."""
    least = points + LAST * (seeds - 1) + SPARE
    return min(points * seeds, max(least, int(share * points * seeds + 1e-9)))


def paid(left: int, rounds: int) -> int:
    """How many points can be given a further seed, if fewer and fewer of them are given the later ones.

    Args:
        left: runs that may still be spent.
        rounds: seeds that may still come, at least one.
    """

    def cost(points: int) -> int:
        return sum(max(LAST, round(points * DECLINE**place)) for place in range(rounds))

    return next((points for points in range(left, LAST, -1) if cost(points) <= left), LAST)


def survivors(values: np.ndarray, *, left: int, rounds: int, risk: float = 0.05) -> list[int]:
    """The points that are given a further seed, best first; one alone has won.

    Args:
        values: `[P, S]` results of the points still in the race, larger is better, all of the same seeds.
        left: runs that may still be spent.
        rounds: seeds that may still come.
        risk: chance of losing, by the test, a point that is in truth as good as the leader, after each seed.
    """
    points, seeds = values.shape
    means = values.mean(1)
    order = np.argsort(-means, kind="stable")
    if rounds < 1 or points == 1:
        return order[:1].tolist()
    behind = np.zeros(points, dtype=bool)
    if seeds > 1:
        freedom = (points - 1) * (seeds - 1)
        rest = values - means[:, None] - values.mean(0) + values.mean()
        deviation = np.sqrt((rest**2).sum() / freedom * 2 / seeds)  # of a difference of two means
        gaps = means[order[0]] - means[order[1:]]
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.where(gaps > 0, stats.t.sf(gaps / deviation, freedom), 0.5).tolist()
        behind[1:] = [value < risk for value in holm(p)]
    return order[~behind][: paid(left, rounds)].tolist()
