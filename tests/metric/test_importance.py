"""What mattered in a sweep: seldom noise, mostly what was planted, and never more than the runs can say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations, product

import numpy as np
import pytest

from detr_exp.metric import importance
from detr_exp.metric.importance import importances

ALPHA = 0.05


def grid(*levels: int, seeds: int = 1) -> dict[str, list[str]]:
    points = [point for point in product(*(range(count) for count in levels)) for _ in range(seeds)]
    return {f"s{place}": [str(point[place]) for point in points] for place in range(len(levels))}


def numbers(values: Sequence[str]) -> np.ndarray:
    return np.array([float(value) for value in values])


def told(settings: Mapping[str, Sequence[str]], results: np.ndarray, deals: int = 199) -> set[tuple[str, ...]]:
    found = importances(settings, results.tolist(), deals=deals)
    return {one.names for one in found if one.p < ALPHA}


@pytest.mark.parametrize("levels", [(2, 2, 3), (2, 6), (3, 3)])
def test_noise_is_seldom_said_to_matter(levels: tuple[int, ...]) -> None:
    generator, settings = np.random.default_rng(0), grid(*levels, seeds=2)
    count = len(settings["s0"])
    wrong = sum(bool(told(settings, generator.standard_t(3, count))) for _ in range(200))
    assert wrong / 200 <= 0.095  # 0.05 and three deviations


def test_a_setting_of_two_deviations_is_found_with_twelve_runs() -> None:
    generator, settings = np.random.default_rng(1), grid(2, seeds=6)
    found = sum(
        ("s0",) in told(settings, 2 * numbers(settings["s0"]) + generator.normal(size=12), 499) for _ in range(200)
    )
    assert found / 200 > 0.8


def test_another_setting_that_matters_much_does_not_hide_it() -> None:
    generator, settings, found = np.random.default_rng(2), grid(2, 3, seeds=3), 0
    for _ in range(60):
        results = 3 * numbers(settings["s0"]) + 20 * numbers(settings["s1"]) + generator.normal(size=18)
        found += {("s0",), ("s1",)} <= told(settings, results)
    assert found > 50


def test_two_settings_that_only_matter_together_are_told_as_a_pair() -> None:
    generator, settings = np.random.default_rng(3), grid(2, 2, seeds=6)
    signs = (2 * numbers(settings["s0"]) - 1) * (2 * numbers(settings["s1"]) - 1)
    found = importances(settings, 2 * signs + generator.normal(size=24))
    assert found[0].names == ("s0", "s1")
    assert found[0].p < ALPHA
    assert found[0].share > 0.5
    assert all(one.p > ALPHA for one in found[1:])


def test_many_settings_are_corrected_for_their_number() -> None:
    generator, wrong = np.random.default_rng(7), 0
    for _ in range(150):
        settings = {f"s{place}": [str(x) for x in generator.permutation([0, 1] * 10)] for place in range(6)}
        wrong += bool(told(settings, generator.normal(size=20)))
    assert wrong / 150 <= 0.1  # each by itself: 0.26


def test_pairs_have_a_tenth_of_the_error_where_they_can_be_told() -> None:
    few, enough = grid(2, 2, seeds=2), grid(2, 2, seeds=6)
    found = importances(few, np.arange(8.0).tolist())
    assert [one.names for one in found] == [("s1",), ("s0",)] or [one.names for one in found] == [("s0",), ("s1",)]
    assert found[0].least == pytest.approx(2 * 2 / 70)  # nothing is kept for a pair that eight runs cannot tell
    clear = numbers(enough["s0"]) * numbers(enough["s1"]) * 50 + np.random.default_rng(8).normal(size=24)
    pair = next(one for one in importances(enough, clear.tolist(), deals=999) if len(one.names) == 2)
    assert pair.p == pytest.approx(10 / 1000)


@pytest.mark.parametrize(("levels", "seeds"), [((2, 2), 1), ((2, 3), 1), ((2,), 3)])
def test_few_runs_say_that_they_are_too_few(levels: tuple[int, ...], seeds: int) -> None:
    settings = grid(*levels, seeds=seeds)
    clear = sum(100 * numbers(values) for values in settings.values())
    found = importances(settings, clear + np.random.default_rng(0).normal(size=len(clear)))
    two = [one for one in found if len(set(settings[one.names[0]])) == 2]
    assert two
    assert all(one.least >= ALPHA and one.p >= ALPHA for one in two)


def test_the_p_value_is_that_of_all_orders() -> None:
    settings, results = grid(2, seeds=4), [0.1, 0.5, 0.2, 0.35, 0.6, 0.4, 0.9, 0.7]
    means = [abs(np.mean(order[:4]) - np.mean(order[4:])) for order in permutations(results)]
    exact = np.mean(np.array(means) >= means[0] - 1e-12)
    (found,) = importances(settings, results)
    assert found.p == pytest.approx(exact, abs=0.02)
    assert found.least == pytest.approx(2 / 70)


def test_seeds_of_points_that_are_no_grid_are_no_points_of_their_own() -> None:
    """Five points whose other setting scatters them, each with four seeds alike: not twenty observations."""
    generator, wrong = np.random.default_rng(4), 0
    for _ in range(100):
        other, level = generator.normal(size=6), ["0", "0", "0", "1", "1", "1"]
        settings = {"s0": [x for x in level for _ in range(4)], "lr": [f"{x:.6f}" for x in other for _ in range(4)]}
        results = np.repeat(generator.normal(size=6), 4) + 0.01 * generator.normal(size=24)
        wrong += bool(told(settings, results))
    assert wrong <= 14


def test_the_best_in_the_middle_of_numbers_is_found() -> None:
    generator = np.random.default_rng(5)
    values = np.exp(generator.uniform(-9, -3, size=20))
    results = -((np.log(values) + 6) ** 2) + generator.normal(size=20)
    found = importances({"lr": [f"{value:.8f}" for value in values]}, results.tolist())
    assert found[0].p < 0.01
    assert found[0].share > 0.5


def test_what_says_nothing_is_left_out_or_certain_of_nothing() -> None:
    assert importances({}, []) == []
    assert importances({"name": ["a", "b", "c", "d"]}, [1, 2, 3, 4]) == []
    assert importances({"one": ["a", "a", "a", "a"]}, [1, 2, 3, 4]) == []
    (same,) = importances({"x": ["a", "a", "b", "b"]}, [0.3] * 4)
    assert same.p == 1
    assert same.share == 0


def test_runs_that_failed_leave_the_rest_to_judge_by() -> None:
    generator, settings = np.random.default_rng(6), grid(2, 3, seeds=4)
    kept = [place for place in range(24) if place not in (0, 5, 6, 17)]
    settings = {name: [values[place] for place in kept] for name, values in settings.items()}
    results = 4 * numbers(settings["s0"]) + generator.normal(size=20)
    assert told(settings, results) == {("s0",)}


def test_numbers_that_are_all_different_can_be_judged_from_five_on() -> None:
    """Of their orders one and its reverse explain as much; the least p is a share of all orders, not 1."""
    numbers = ["1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]
    (found,) = importances({"lr": numbers}, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert found.least == pytest.approx(2 / 120)
    assert found.p == pytest.approx(2 / 120, abs=0.006)
    (few,) = importances({"lr": numbers[:4]}, [0.1, 0.2, 0.3, 0.4])
    assert few.least > ALPHA


def test_what_is_dealt_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = grid(2, 3, seeds=4)
    results = np.random.default_rng(5).normal(size=24).tolist()
    expected = importances(settings, results)
    monkeypatch.setattr(importance, "BLOCK", 24 * 7)
    assert importances(settings, results) == expected


def test_thousands_of_values_stand_by_their_rank_or_not_at_all() -> None:
    count = importance.MOST_KINDS + 1
    settings = {"lr": [str(value) for value in range(count)] * 2, "name": [f"n{value}" for value in range(count)] * 2}
    (found,) = importances(settings, [*range(count)] * 2, deals=19)
    assert found.names == ("lr",)
    assert found.share > 0.99
    assert found.p == found.least == 1 / 20
