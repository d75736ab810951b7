"""What several runs say together."""

import numpy as np
import pytest

from detr_exp.runs.analysis import Cost, effects, front, noise_of
from detr_exp.runs.settings import Setting


def setting(name, values) -> Setting:
    return Setting(f"optim.{name}", name, [], [str(value) for value in values])


def test_what_mattered_is_named_with_its_values():
    noise = np.random.default_rng(0).normal(0, 0.01, 24)
    lr, loss = np.tile([1e-4, 1e-3, 1e-2], 8), np.repeat(["focal", "vfl"], 12)
    scores = 0.3 - 0.1 * np.log10(lr) + noise
    first, *others = effects([setting("loss", loss), setting("lr", lr)], scores.tolist())
    second = next(one for one in others if one.name == "loss")
    assert first.name == "lr"
    assert first.verdict == "mattered"
    assert first.share > 0.9
    assert first.p < 0.05 < second.p
    assert first.trend == pytest.approx(-0.943, abs=0.01)
    assert second.verdict == "no significant effect"
    assert [label for label, _ in first.means] == ["0.0001", "0.001", "0.01"]
    assert second.trend is None


def test_two_settings_that_matter_together():
    a, b = np.repeat(["x", "y"], 8), np.tile(np.repeat(["p", "q"], 4), 2)
    together = [float((i == "x") == (j == "p")) for i, j in zip(a, b)] + np.random.default_rng(0).normal(0, 0.05, 16)
    best = effects([setting("a", a), setting("b", b)], together.tolist())[0]
    assert best.name == "a x b"
    assert {label for label, mean in best.means if mean > 0.5} == {"x / p", "y / q"}


def test_few_runs_tell_nothing_however_large_the_effect():
    """What a grid of 2 x 2 single runs explains may be all of the variance, by luck alone."""
    found = effects([setting("a", "xxyy"), setting("b", "pqpq")], [0.1, 0.1, 0.9, 0.9])
    assert {one.verdict for one in found} == {"too few runs to tell"}


def test_runs_without_a_result_do_not_count():
    scores = [None, 0.1, float("nan"), 0.2, 0.1, 0.2]
    found = effects([setting("a", "xxyyxy"), setting("b", "qppppp")], scores)
    assert [one.name for one in found] == ["a"]
    assert dict(found[0].means) == pytest.approx({"x": 0.1, "y": 0.2})
    assert effects([setting("a", "xy")], [None, None]) == effects([], [0.1, 0.2]) == []


def test_numbers_that_are_all_different_are_shown_in_quarters():
    numbers = np.linspace(1, 2, 20)
    (found,) = effects([setting("a", numbers)], (numbers**2).tolist())
    assert len(found.means) == 4
    assert found.verdict == "mattered"
    assert found.trend == pytest.approx(1)


def test_the_front_is_what_nothing_beats():
    generator = np.random.default_rng(0)
    points = [tuple(point) for point in generator.integers(0, 8, (40, 2)).astype(float)]
    beaten = {p for p in points for q in points if q[0] <= p[0] and q[1] >= p[1] and q != p}
    kept = [points[place] for place in front([Cost(cost, 0.0, gain) for cost, gain in points])]
    assert set(kept) == set(points) - beaten
    assert kept == sorted(kept)
    assert front([]) == []


def test_a_lower_cost_within_the_noise_earns_no_place_on_the_front():
    better, worse = Cost(10.2, 0.5, 0.5), Cost(10.0, 0.5, 0.4)
    assert front([better, worse]) == [0]
    assert front([better, worse._replace(cost=5.0)]) == [1, 0]
    assert front([better._replace(noise=0.0), worse._replace(noise=0.0)]) == [1, 0]


def test_equal_networks_seldom_have_several_places_on_the_front():
    """Four networks of one cost, each timed in two runs: seldom is one of them said to be cheaper."""
    generator, several = np.random.default_rng(0), 0
    for _ in range(300):
        costs = 10 * generator.normal(1, 0.05, (4, 2))
        noise = noise_of(costs.tolist())
        at = [Cost(one.mean(), noise.share * one.mean() / 2**0.5, gain) for gain, one in enumerate(costs)]
        several += len(front(at, noise.freedom)) > 1
    assert several / 300 <= 0.06 + 0.03


def test_the_noise_of_timings_is_that_of_networks_timed_again():
    generator = np.random.default_rng(0)
    costs = [(at * generator.normal(1, 0.1, 50)).tolist() for at in (1.0, 20.0)]
    noise = noise_of([*costs, [7.0]])
    assert noise.share == pytest.approx(0.1, rel=0.15)
    assert noise.freedom == 98
    assert noise_of([[1.0], [2.0]]) is None
