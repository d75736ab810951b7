"""What several runs say together."""

import numpy as np
import pytest

from detr_exp.runs.analysis import front, importance
from detr_exp.runs.settings import Setting


def test_the_share_is_what_an_analysis_of_variance_gives():
    from scipy.stats import f_oneway

    groups = [[0.1, 0.2, 0.15], [0.3, 0.35, 0.4], [0.2, 0.25, 0.1]]
    values = [name for name, group in zip("abc", groups) for _ in group]
    found = importance(Setting("s", [], values), [score for group in groups for score in group])
    f = f_oneway(*groups).statistic
    assert found.share == pytest.approx((f - 1) / (f + (9 - 3) / (3 - 1)))
    assert [label for label, _ in found.means] == ["b", "c", "a"]
    assert found.trend is None


def test_a_setting_that_does_nothing_has_no_share():
    generator = np.random.default_rng(0)
    shares = [
        importance(Setting("s", [], ["a", "b"] * 10), generator.normal(size=20).tolist()).share for _ in range(50)
    ]
    assert np.mean(shares) < 0.05


def test_the_trend_of_numbers():
    values = [str(10.0**-k) for k in range(4) for _ in range(3)]
    found = importance(Setting("s", [], values), [-k + 0.01 * j for k in range(4) for j in range(3)])
    assert found.trend == pytest.approx(0.97, abs=0.02)


def test_numbers_that_are_all_different_go_into_quarters():
    numbers = np.linspace(1, 2, 20)
    found = importance(Setting("s", [], [str(x) for x in numbers]), (numbers**2).tolist())
    assert len(found.means) == 4
    assert found.share > 0.8
    assert importance(Setting("s", [], [str(x) for x in range(6)]), [0.0] * 6) is None, "too few for quarters"


@pytest.mark.parametrize("scores", [[0.1, None, None, 0.2, 0.3], [0.1, 0.2, 0.3], []])
def test_too_few_results(scores):
    assert importance(Setting("s", [], ["a", "b", "a", "b", "a"][: len(scores)]), scores) is None


def test_equal_results_explain_nothing():
    assert importance(Setting("s", [], ["a", "a", "b", "b"]), [0.5] * 4).share == 0.0


def test_the_front_is_what_nothing_beats():
    generator = np.random.default_rng(0)
    points = [tuple(point) for point in generator.integers(0, 8, (40, 2)).astype(float)]
    beaten = {p for p in points for q in points if q[0] <= p[0] and q[1] >= p[1] and q != p}
    kept = [points[place] for place in front(points)]
    assert set(kept) == set(points) - beaten
    assert kept == sorted(kept)
    assert front([]) == []
