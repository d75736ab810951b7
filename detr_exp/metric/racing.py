"""Racing: after every seed, which points of a sweep need no further one.

All points see the same seeds, one after the other. A point goes when it lies behind the leader by more than luck
explains (a t-test on what points and seeds do not explain together, corrected by Holm for the number of points; as in
F-Race, Birattari et al., GECCO 2002), and when there are more points than the runs that are left can pay for (the
worst first, fewer from seed to seed; as in sequential halving, Karnin et al., ICML 2013). So a race never costs more
than its share of the full grid, and less where the answer is plain. `docs/statistics.md` has how often it misses.

Legend: P points, S seeds run so far.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from detr_exp.metric.verdict import holm

FEWEST = 2  # seeds that every point is given


def budget(points: int, seeds: int, share: float = 0.6) -> int:
    """Runs that a race may spend: `share` of the full grid, but no less than the seeds that every point is given."""
    return max(FEWEST * points, int(share * points * seeds + 1e-9))


def survivors(values: np.ndarray, *, left: int, rounds: int, risk: float = 0.05) -> list[int]:
    """The points that are given a further seed, best first; one alone has won.

    Args:
        values: `[P, S]` results of the points still in the race, larger is better, all of the same seeds.
        left: runs that may still be spent.
        rounds: seeds that may still come.
        risk: chance of losing, by the test, a point that is in truth as good as the leader, after each seed.

    Raises:
        ValueError: there are fewer than two seeds.
    """
    points, seeds = values.shape
    if seeds < FEWEST:
        raise ValueError(f"{seeds} seeds do not show how much seeds scatter; a race needs {FEWEST}")
    means = values.mean(1)
    order = np.argsort(-means, kind="stable")
    if rounds < 1 or points == 1:
        return order[:1].tolist()
    paid = max(1, int(2 * left / (rounds + 1)))  # fewer from round to round, down to the last one
    freedom = (points - 1) * (seeds - 1)
    rest = values - means[:, None] - values.mean(0) + values.mean()
    deviation = np.sqrt((rest**2).sum() / freedom * 2 / seeds)  # of a difference of two means
    gaps = means[order[0]] - means[order[1:]]
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(gaps > 0, stats.t.sf(gaps / deviation, freedom), 0.5).tolist()
    behind = np.array([False, *(value < risk for value in holm(p))])
    return order[~behind][:paid].tolist()
