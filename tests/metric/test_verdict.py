"""Claims about few runs: how often they are wrong when nothing differs, and whether they find what does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from detr_exp.metric.verdict import (
    Difference,
    Need,
    Term,
    difference,
    equivalence_p,
    error,
    holm,
    interval,
    need,
    p_value,
    verdict,
)

IMAGES, DRAWS = 80, 120
TIMES = np.random.default_rng(1).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=DRAWS).T / IMAGES


def sides(
    generator: np.random.Generator, counts: tuple[int, int], ratio: float, heavy: bool = False, shared: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Results of two equal sides and their draws: means over images that one setting does better and another worse.

    Args:
        generator: of everything.
        counts: runs of each side.
        ratio: deviation of seeds / deviation that the images give the difference.
        heavy: Student's t of three degrees of freedom in place of normal noise.
        shared: correlation of runs of the same place on both sides.
    """

    def noise(*shape: int) -> np.ndarray:
        return generator.standard_t(3, shape) / np.sqrt(3) if heavy else generator.normal(size=shape)

    common = noise(max(counts))
    found = []
    for count in counts:
        per_image = noise(IMAGES) + 0.7 * noise(count, IMAGES)  # of the setting, and of each run
        seeds = np.sqrt(1 - shared) * noise(count) + np.sqrt(shared) * common[:count]
        seeds = ratio * np.sqrt(2 / IMAGES) * seeds
        found.append((per_image.mean(1) + seeds, per_image @ TIMES + seeds[:, None]))
    (a, drawn_a), (b, drawn_b) = found
    return a, b, drawn_a, drawn_b


def shares_wrong(counts: tuple[int, int], ratio: float, heavy: bool, paired: bool, trials: int = 600) -> float:
    """Share of comparisons of equal sides that say one is better."""
    generator = np.random.default_rng(7)
    wrong = 0
    for _ in range(trials):
        found = difference(*sides(generator, counts, ratio, heavy), images=IMAGES, paired=paired)
        wrong += p_value(found) < 0.05
    return wrong / trials


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize(
    ("counts", "paired"), [((2, 2), False), ((2, 2), True), ((3, 3), True), ((2, 5), False), ((1, 3), False)]
)
def test_equal_sides_are_seldom_said_to_differ(counts: tuple[int, int], paired: bool, heavy: bool) -> None:
    assert shares_wrong(counts, 2.0, heavy, paired) <= 0.077  # 0.05 and three deviations of 600 trials


def test_small_p_values_of_two_pairs_are_not_smaller_than_they_say() -> None:
    """Many classes are corrected by asking for small ones: there, luck of a small scatter would be all that is left."""
    generator, wrong = np.random.default_rng(9), 0
    for _ in range(2000):
        found = difference(*sides(generator, (2, 2), 2.0), images=IMAGES, paired=True)
        low, high = interval(found, 0.995)
        wrong += low > 0 or high < 0
    assert wrong / 2000 <= 0.01


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_from_ten_seeds_on_the_error_is_what_it_says(ratio: float) -> None:
    """What the draws and the scatter of the runs have in common is not counted twice."""
    assert 0.03 <= shares_wrong((10, 10), ratio, False, False) <= 0.077


def test_one_run_a_side_speaks_of_the_images_alone() -> None:
    assert 0.03 <= shares_wrong((1, 1), 0.0, False, False) <= 0.077
    assert not difference(*sides(np.random.default_rng(0), (1, 1), 1.0), images=IMAGES, paired=False).about_runs
    assert difference(*sides(np.random.default_rng(0), (1, 2), 1.0), images=IMAGES, paired=False).about_runs


def test_pairs_find_what_the_scatter_of_seeds_hides() -> None:
    generator = np.random.default_rng(3)
    found = {True: 0, False: 0}
    for _ in range(60):
        a, b, drawn_a, drawn_b = sides(generator, (5, 5), 4.0, shared=0.95)
        step = 4 * np.sqrt(2 / IMAGES)
        for paired in found:
            made = difference(a, b + step, drawn_a, drawn_b + step, images=IMAGES, paired=paired)
            found[paired] += p_value(made) < 0.05
    assert found[True] > 40 > 20 > found[False]


def test_the_image_term_is_that_of_the_settings_not_of_their_runs() -> None:
    generator = np.random.default_rng(5)
    several = [
        difference(*sides(generator, (4, 3), 1.0), images=IMAGES, paired=False).images.variance for _ in range(400)
    ]
    pairs = [difference(*sides(generator, (3, 3), 1.0), images=IMAGES, paired=True).images.variance for _ in range(400)]
    assert np.mean(several) == pytest.approx(2 / IMAGES, rel=0.08)
    assert np.mean(pairs) == pytest.approx(2 / IMAGES, rel=0.08)


def test_the_scatter_of_a_new_set_of_images_is_that_of_the_draws_and_a_little_more() -> None:
    """Two runs of a side that draws move apart by a pattern of their own: none of it is of the images alone."""
    common, apart = np.array([[3.0, -3.0, 3.0, -3.0] * 10, [1.0, 1.0, -1.0, -1.0] * 10])
    drawn_a, drawn_b = np.stack([common + apart, common - apart]), np.zeros((1, 40))
    images = difference(np.zeros(2), np.zeros(1), drawn_a, drawn_b, images=5, paired=False).images
    assert images == (pytest.approx(max(0, common.var(ddof=1) - apart.var(ddof=1) * 3) * 5 / 4), 4)
    alone = difference(np.zeros(1), np.zeros(1), drawn_a[:1], drawn_b, images=5, paired=False).images
    assert alone.variance == pytest.approx((common + apart).var(ddof=1) * 5 / 4)


def test_without_image_noise_it_is_as_sure_as_welch_or_less() -> None:
    a, b = np.array([0.40, 0.43, 0.41, 0.44, 0.40]), np.array([0.45, 0.46, 0.44, 0.49])
    flat_a, flat_b = np.tile(a[:, None], 50), np.tile(b[:, None], 50)
    found = difference(a, b, flat_a, flat_b, images=1000, paired=False)
    deviation, freedom = error(found, 0.05)
    welch = stats.ttest_ind(b, a, equal_var=False)
    assert found.value / deviation == pytest.approx(welch.statistic)
    assert welch.df * 0.8 < freedom <= welch.df + 0.3
    more = a + np.array([0.01, 0.03, 0.01, 0.02, -0.02])
    pairs = difference(a, more, flat_a, flat_a, images=1000, paired=True)
    assert p_value(pairs) == pytest.approx(stats.ttest_rel(a, more).pvalue)


def test_degrees_of_freedom_do_not_trust_a_variance_that_is_small_by_luck() -> None:
    alone = Difference(0.1, (Term(0.3, 4),), Term(0.0, 99), (5, 5), True)
    assert error(alone, 0.05) == pytest.approx((np.sqrt(0.3), 4))
    mixed = Difference(0.1, (Term(0.1, 1),), Term(1.0, 1e6), (2, 2), True)
    upper = 0.1 / stats.chi2.ppf(0.25, 1)  # one in four estimates is smaller, were the variance this
    assert error(mixed, 0.0625)[1] == pytest.approx((1 + upper) ** 2 / upper**2, rel=0.01)
    assert error(mixed, 0.0625)[1] < 5 < 1.1**2 / 0.1**2


@pytest.mark.parametrize("value", [0.0, 0.01, 0.03, 0.2])
def test_the_interval_leaves_out_zero_where_p_is_small(value: float) -> None:
    found = Difference(value, (Term(1e-4, 2), Term(5e-5, 2)), Term(4e-5, 90), (3, 3), False)
    p = p_value(found)
    for level in (0.5, 0.9, 1 - p - 1e-6, 1 - p + 1e-6):
        if 0 < level < 1:
            low, high = interval(found, level)
            assert (low > 0 or high < 0) == (p < 1 - level)


def test_equivalence_is_an_interval_of_ninety_percent_within_the_margin() -> None:
    found = Difference(0.004, (Term(4e-6, 4),), Term(3e-6, 90), (5, 5), True)
    low, high = interval(found, 0.9)
    edge = max(-low, high)
    assert equivalence_p(found, edge * 1.001) < 0.05 < equivalence_p(found, edge * 0.999)
    assert verdict(p_value(found), equivalence_p(found, edge * 1.001), found.value) == "equal"
    assert verdict(p_value(found), equivalence_p(found, edge * 0.999), found.value) == "unknown"
    assert verdict(0.01, None, -0.2) == "a"
    assert verdict(0.01, 0.01, 0.2) == "b"


def test_sides_as_far_apart_as_the_margin_are_seldom_called_equal() -> None:
    generator, wrong, step = np.random.default_rng(11), 0, 0.6
    for _ in range(600):
        a, b, drawn_a, drawn_b = sides(generator, (3, 3), 1.0)
        found = difference(a, b + step, drawn_a, drawn_b + step, images=IMAGES, paired=True)
        wrong += equivalence_p(found, step) < 0.05
    assert wrong / 600 <= 0.08


def test_holm_is_bonferroni_for_the_smallest_and_never_turns_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, float("nan")])[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(holm([0.2, float("nan")])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_seeds_it_asks_for_tell_the_effect_four_times_in_five() -> None:
    """The advice is given with the true noise, and then followed many times."""
    images, seeds, effect = 2 / IMAGES, 2 / IMAGES, 0.75
    own = 0.7**2 / IMAGES
    known = Difference(effect, (Term((seeds + own) / 5, 4),) * 2, Term(images, IMAGES - 1), (5, 5), False)
    count = need(known, effect).seeds
    assert count is not None
    assert 2 < count < 20
    generator, told = np.random.default_rng(2), 0
    for _ in range(400):
        a, b, drawn_a, drawn_b = sides(generator, (count, count), 1.0)
        made = difference(a, b + effect, drawn_a, drawn_b + effect, images=IMAGES, paired=False)
        told += p_value(made) < 0.05
    assert 0.74 <= told / 400 <= 0.92
    assert need(known, effect / 2).seeds is None  # the images forbid it
    assert need(known, effect / 2).images > 1 > need(known, effect).images


def test_what_cannot_be_known_is_not_advised() -> None:
    alone = difference(*sides(np.random.default_rng(0), (1, 1), 1.0), images=IMAGES, paired=False)
    assert need(alone, 100.0).seeds is None
    assert need(alone, 0.0) == Need(None, float("inf"))
    noisy = Difference(0.01, (Term(1.0, 2), Term(1.0, 2)), Term(0.0, 50), (3, 3), False)
    assert need(noisy, 0.01) == Need(None, 0.0)


def test_the_advice_does_not_depend_on_how_many_runs_gave_it() -> None:
    """Noise of the same size, once seen with three and once with six runs a side, or with one beside six."""
    three = Difference(0.1, (Term(0.02 / 3, 2),) * 2, Term(1e-4, 90), (3, 3), False)
    six = Difference(0.1, (Term(0.02 / 6, 5),) * 2, Term(1e-4, 90), (6, 6), False)
    one = Difference(0.1, (Term(0.02 * (1 + 1 / 6), 5),), Term(1e-4, 90), (1, 6), False)
    assert need(three, 0.2) == need(six, 0.2) == need(one, 0.2)


def test_nothing_is_claimed_where_the_images_say_nothing() -> None:
    a, b = np.array([0.1, 0.2]), np.array([0.5, 0.6])
    missing = np.full((2, 50), np.nan)
    found = difference(a, b, missing, missing, images=5, paired=False)
    assert np.isnan(p_value(found))
    assert np.isnan(interval(found)).all()
    assert verdict(p_value(found), equivalence_p(found, 1.0), found.value) == "unknown"
    flat = np.tile(a[:, None], 50)
    assert np.isnan(p_value(difference(a, b, flat, flat, images=1, paired=False)))


def test_equal_runs_have_no_difference_and_unequal_ones_without_scatter_a_sure_one() -> None:
    flat = np.full((3, 50), 0.4)
    same = difference(flat[:, 0], flat[:, 0], flat, flat, images=20, paired=True)
    assert p_value(same) == 1
    assert interval(same) == (0, 0)
    more = difference(flat[:, 0], flat[:, 0] + 0.25, flat, flat + 0.25, images=20, paired=True)
    assert p_value(more) < 1e-9
    assert equivalence_p(more, 0.3) < 1e-9
    assert equivalence_p(more, 0.2) > 1 - 1e-9


def test_shapes_that_do_not_fit_are_refused() -> None:
    a, b = np.zeros(2), np.zeros(3)
    with pytest.raises(ValueError, match="do not fit"):
        difference(a, b, np.zeros((2, 30)), np.zeros((3, 31)), images=9, paired=False)
    with pytest.raises(ValueError, match="no pairs"):
        difference(a, b, np.zeros((2, 30)), np.zeros((3, 30)), images=9, paired=True)
