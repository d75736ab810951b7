"""Decisions on scripted metric sequences."""

import math

import pytest

from detr_exp.trainer.selection import BestMetric, EarlyStopping


def winners(best: BestMetric, values: list[float]) -> list[int]:
    return [epoch for epoch, value in enumerate(values) if best.update(value, epoch)]


def test_best_is_strictly_better():
    assert winners(BestMetric(), [0.1, 0.1, 0.3, 0.2, 0.3, 0.4]) == [0, 2, 5]


def test_zero_can_be_the_best():
    assert winners(BestMetric(), [0.0, 0.0]) == [0]


def test_skipped_epochs_never_win():
    best = BestMetric(skip_epochs=2)
    assert winners(best, [0.9, 0.8, 0.1, 0.2]) == [2, 3]
    assert best.best_raw == 0.2


def test_smoothing_resists_one_lucky_value_and_is_bias_corrected():
    lucky = [0.30, 0.60, 0.31, 0.32, 0.33, 0.34]
    smooth = BestMetric(smooth_alpha=0.5)
    assert winners(BestMetric(), lucky) == [0, 1]
    assert winners(smooth, lucky)[0] == 0
    # closed form: the corrected mean of a constant sequence is that constant from the first value on
    constant = BestMetric(smooth_alpha=0.9)
    constant.update(0.4, 0)
    assert constant.best == pytest.approx(0.4)


def test_smoothing_may_pick_another_epoch_than_the_raw_values():
    values = [0.1, 0.5, 0.1, 0.4, 0.45, 0.46]
    assert winners(BestMetric(), values)[-1] == 1
    assert winners(BestMetric(smooth_alpha=0.6), values)[-1] == 5


def test_best_survives_a_round_trip():
    first = BestMetric(smooth_alpha=0.5)
    values = [0.1, 0.5, 0.1, 0.4, 0.45, 0.46]
    whole = winners(BestMetric(smooth_alpha=0.5), values)
    head = winners(first, values[:3])
    second = BestMetric(smooth_alpha=0.5)
    second.load_state_dict(first.state_dict())
    tail = [epoch for epoch in range(3, 6) if second.update(values[epoch], epoch)]
    assert head + tail == whole


def test_early_stopping_counts_evaluations_without_gain():
    stopping = EarlyStopping(patience=2, min_delta=0.01)
    assert [stopping.update(v, e) for e, v in enumerate([0.1, 0.105, 0.2, 0.2, 0.209])] == [
        False,
        False,
        False,
        False,
        True,
    ]


def test_early_stopping_ignores_skipped_epochs():
    stopping = EarlyStopping(patience=1, min_delta=0.0, skip_epochs=3)
    assert [stopping.update(0.0, e) for e in range(5)] == [False, False, False, False, True]


NO_NUMBERS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", NO_NUMBERS)
@pytest.mark.parametrize("smooth_alpha", [0.0, 0.6])
def test_what_is_no_number_never_wins_and_changes_nothing(bad, smooth_alpha):
    values = [0.1, 0.5, 0.3, 0.6]
    clean, disturbed = BestMetric(smooth_alpha=smooth_alpha), BestMetric(smooth_alpha=smooth_alpha)
    winning = [clean.update(value, epoch) for epoch, value in enumerate(values)]
    for epoch, value in enumerate(values):
        assert not disturbed.update(bad, epoch)
        assert disturbed.update(value, epoch) == winning[epoch]
    assert disturbed.state_dict() == clean.state_dict() | {"lost": 4}


@pytest.mark.parametrize("bad", NO_NUMBERS)
def test_what_is_no_number_is_no_gain(bad):
    stopping = EarlyStopping(patience=3, min_delta=0.0)
    assert [stopping.update(value, epoch) for epoch, value in enumerate([bad, 0.1, bad, 0.2, bad, bad])] == [False] * 6
    assert stopping.best == 0.2
    assert stopping.update(bad, 6)


def test_a_checkpoint_in_which_no_number_has_won_is_healed():
    best, stopping = BestMetric(smooth_alpha=0.5), EarlyStopping(patience=3, min_delta=0.0)
    state = {"best": math.nan, "best_raw": math.nan, "best_epoch": 3, "mean": math.nan, "count": 4}
    best.load_state_dict(state)
    stopping.load_state_dict({"best": math.nan, "waited": 1})
    assert best.best_raw is None
    assert best.update(0.25, 4)
    assert best.best == pytest.approx(0.25)
    assert not stopping.update(0.1, 4)
    assert (stopping.best, stopping.waited) == (0.1, 0)
