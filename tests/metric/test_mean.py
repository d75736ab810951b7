"""The mean of a few seeds: how often its interval leaves out where the mean of all seeds lies."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.metric.mean import mean_of


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_its_interval_holds_the_truth_as_often_as_it_says(seeds: int, heavy: bool) -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_t(3, (1500, seeds)) if heavy else generator.normal(size=(1500, seeds))
    held = np.mean([low <= 0 <= high for low, high in (mean_of(row.tolist()).interval for row in values)])
    assert held + 0.013 >= 0.94
    assert held <= 0.97 + 0.013  # each with three deviations of 1500 trials


def test_one_result_has_no_interval() -> None:
    assert mean_of([0.4]) == (0.4, None, None, 1)
    low, high = mean_of([0.4, 0.6], level=0.5).interval
    assert (low, high) == pytest.approx((0.4, 0.6)), "Cauchy's quartiles"
