"""How much a choice flatters, told from how hard the images are."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.metric.honest import Choice, flattery


def chosen(a: np.ndarray, b: np.ndarray):
    """Of values `[n]` on both halves: flattery with each of the n as a choice of its own."""
    return flattery([Choice(*pair) for pair in zip(a, b)], [Choice(*pair) for pair in zip(b, a)])


def test_what_both_halves_choose_was_no_luck() -> None:
    found = chosen(np.array([0.1, 0.5, 0.3]), np.array([0.2, 0.4, 0.1]))
    assert found.choice == Choice(0.5, 0.4)
    assert found.luck == 0
    assert str(found).endswith("0.0000 of it was luck, and the other half is 0.1000 harder")


def test_luck_does_not_depend_on_how_hard_a_half_is() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20))
    assert chosen(a, b + 7).luck == pytest.approx(chosen(a, b).luck)
    assert chosen(a, b).luck >= 0
    assert "easier" in str(chosen(a, b + 7))


def test_its_mean_is_the_luck_and_it_scatters_less_than_the_plain_difference() -> None:
    rng = np.random.default_rng(1)
    luck, told, plain = [], [], []
    for _ in range(2000):
        truth, hard = rng.normal(size=40), rng.normal(size=2)  # of settings; of both halves, the same for all settings
        a, b = (truth + h + rng.normal(size=40) for h in hard)
        best = a.argmax()
        luck.append(a[best] - hard[0] - truth[best])
        told.append(chosen(a, b).luck)
        plain.append(a[best] - b[best])
    assert np.mean(told) == pytest.approx(np.mean(luck), abs=0.06)
    assert np.std(np.subtract(told, luck)) < 0.7 * np.std(np.subtract(plain, luck))
