"""Races against the full grid they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.metric.racing import budget, paid, survivors


def race(values: np.ndarray, share: float = 0.6) -> tuple[int, int]:
    """The winner and the runs it took, of the full grid's results `[P, S]`."""
    points, seeds = values.shape
    alive, spent, run = list(range(points)), points, 1
    while True:
        left = budget(points, seeds, share) - spent
        alive = [alive[place] for place in survivors(values[alive, :run], left=left, rounds=seeds - run)]
        if len(alive) == 1:
            return alive[0], spent
        spent, run = spent + len(alive), run + 1


@pytest.mark.parametrize("seeds", [5, 10])
def test_the_winner_is_as_good_as_that_of_the_grid_at_sixty_percent(seeds: int) -> None:
    generator, near, spent = np.random.default_rng(0), 0, []
    for _ in range(120):
        truth = generator.normal(size=12)
        values = truth[:, None] + generator.normal(size=(12, seeds)) + generator.normal(size=seeds)
        winner, runs = race(values)
        near += truth[winner] > truth[values.mean(1).argmax()] - 0.5
        spent.append(runs / values.size)
    assert near / 120 >= 0.9
    assert max(spent) <= 0.6


def test_what_all_points_share_of_a_seed_changes_nothing() -> None:
    values = np.random.default_rng(1).normal(size=(8, 4))
    shifted = values + np.array([0.0, 50.0, -30.0, 7.0])
    assert survivors(values, left=20, rounds=4) == survivors(shifted, left=20, rounds=4)


def test_points_far_behind_go_and_equal_ones_stay() -> None:
    values = np.random.default_rng(2).normal(size=(6, 3)) * 0.01
    values[4:] -= 1
    kept = survivors(values, left=1000, rounds=5)
    assert sorted(kept) == [0, 1, 2, 3]
    assert kept[0] == values.mean(1).argmax()


def test_good_points_are_seldom_lost_by_the_test() -> None:
    generator = np.random.default_rng(3)
    lost = sum(len(survivors(generator.normal(size=(10, 3)), left=1000, rounds=5)) < 10 for _ in range(300))
    assert lost / 300 < 0.25  # the leader is the best of ten by luck


def test_the_runs_that_are_left_are_never_overspent() -> None:
    generator = np.random.default_rng(4)
    for points, seeds in ((3, 3), (5, 4), (7, 5), (24, 10), (2, 2)):
        _, spent = race(generator.normal(size=(points, seeds)) * 1e-3)
        assert spent <= budget(points, seeds)


def test_values_without_noise_leave_the_best() -> None:
    assert survivors(np.array([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]), left=100, rounds=3) == [1]
    assert survivors(np.array([[1.0, 1.0], [1.0, 1.0]]), left=100, rounds=3) == [0, 1]
    assert survivors(np.array([[1.0, 2.0]]), left=0, rounds=3) == [0]


def test_fewer_and_fewer_points_are_paid_for() -> None:
    values = np.random.default_rng(5).normal(size=(12, 2))
    assert [len(survivors(values, left=left, rounds=3)) for left in (24, 12, 6)] == [11, 5, 2]
    best = set(np.argsort(-values.mean(1))[:5].tolist())
    assert set(survivors(values, left=12, rounds=3)) == best


def test_two_points_see_all_seeds_unless_the_test_tells_them_apart() -> None:
    for points, seeds in ((3, 3), (4, 5), (6, 5), (12, 10)):
        for left in range(2 * (seeds - 1), budget(points, seeds) - points + 1):
            kept = paid(left, seeds - 1)
            assert kept >= 2
            assert left - kept >= 2 * (seeds - 2)


def test_after_one_seed_only_what_is_paid_for_decides() -> None:
    values = np.array([[0.1], [0.9], [0.2], [0.8], [0.3], [-9.0]])
    assert survivors(values, left=100, rounds=4) == [1, 3, 4, 2, 0, 5]
    assert survivors(values, left=12, rounds=4) == [1, 3, 4, 2]


@pytest.mark.parametrize(("points", "seeds"), [(6, 5), (6, 10), (12, 3), (24, 5), (40, 20)])
def test_many_points_and_seeds_cost_sixty_percent_at_most(points: int, seeds: int) -> None:
    assert budget(points, seeds) <= 0.6 * points * seeds
    assert budget(3, 3) == 9


def test_one_that_is_better_by_a_deviation_is_kept_in_nine_of_ten() -> None:
    generator, near = np.random.default_rng(6), 0
    for _ in range(400):
        truth = np.eye(6)[0]
        values = truth[:, None] + generator.normal(size=(6, 5))
        near += truth[race(values)[0]] >= truth[values.mean(1).argmax()] - 0.5
    assert near / 400 >= 0.9
