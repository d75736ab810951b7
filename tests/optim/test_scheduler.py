"""Schedules against the closed forms of the recipes they come from."""

import math
import warnings
from functools import partial

import pytest

from detr_exp.optim.scheduler import build_schedule, constant, cosine, flat_cosine, multistep, step


def build(shape, *, epochs=10, steps_per_epoch=20, warmup=0.0, warmup_unit="steps", warmup_shape="linear"):
    return build_schedule(
        shape,
        steps_per_epoch=steps_per_epoch,
        total_steps=epochs * steps_per_epoch,
        warmup=warmup,
        warmup_unit=warmup_unit,
        warmup_shape=warmup_shape,
    )


def test_rt_detr_warms_up_linearly_from_the_first_step():
    schedule = build(constant, warmup=50)
    for k in range(200):
        assert schedule(k) == min(1.0, (k + 1) / 50)


@pytest.mark.parametrize("min_factor", [0.0, 0.1])
def test_rf_detr_cosine_with_warmup_in_epochs(min_factor):
    schedule = build(partial(cosine, min_factor=min_factor), warmup=1.5, warmup_unit="epochs", warmup_shape="from_zero")
    total, length = 200, 30
    for s in range(total + 1):
        progress = (s - length) / (total - length)
        expected = (
            s / length if s < length else min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * progress))
        )
        assert schedule(s) == pytest.approx(expected, abs=1e-12)


def test_rf_detr_step_is_counted_from_the_first_step_of_the_run():
    schedule = build(partial(step, drop_epoch=7, factor=0.1))
    assert [schedule(s) for s in (0, 139, 140, 199)] == [1.0, 1.0, 0.1, 0.1]
    never = build(partial(step, drop_epoch=100, factor=0.1))
    assert {never(s) for s in range(200)} == {1.0}


def test_multistep_is_torchs():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5], gamma=0.1)
    schedule = build(partial(multistep, milestones=[3, 5], gamma=0.1))
    for epoch in range(8):
        assert schedule(epoch * 20) == pytest.approx(oracle.get_last_lr()[0])
        assert schedule(epoch * 20 + 19) == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()


def test_deim_flat_cosine():
    shape = partial(flat_cosine, flat_epochs=4, final_epochs=2, min_factor=0.5)
    schedule = build(shape, warmup=20, warmup_shape="quadratic")
    assert [schedule(k) for k in (0, 10)] == [0.0, 0.25]
    assert {schedule(k) for k in range(20, 81)} == {1.0}
    for k in range(80, 161):
        assert schedule(k) == pytest.approx(0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * (k - 80) / 80)))
    assert {schedule(k) for k in range(160, 200)} == {0.5}
    half = build(partial(flat_cosine, flat_epochs=None, final_epochs=0, min_factor=0.5))
    assert half(100) == 1.0 > half(101)


@pytest.mark.parametrize(("warmup", "unit"), [(40, "steps"), (2, "epochs"), (0.2, "fraction")])
def test_units_of_the_warmup(warmup, unit):
    schedule = build(constant, warmup=warmup, warmup_unit=unit)
    assert schedule(38) == 39 / 40 < schedule(39) == 1.0


@pytest.mark.parametrize(
    ("shape", "late"),
    [
        (partial(multistep, milestones=[3, 10, 12], gamma=0.1), "10, 12,"),
        (partial(step, drop_epoch=10, factor=0.1), "10,"),
        (partial(flat_cosine, flat_epochs=11, final_epochs=0, min_factor=0.5), "11,"),
    ],
)
def test_epochs_after_the_end_are_pointed_out(shape, late):
    with pytest.warns(UserWarning, match=f"the run has 10 epochs: it never reaches {late}"):
        build(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(shape, epochs=20)


def test_a_long_warmup_is_pointed_out():
    with pytest.warns(UserWarning, match="takes 100 of 200 steps"):
        build(constant, warmup=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_unit": "iterations"}, "use steps, epochs or fraction"),
        ({"warmup_shape": "cubic"}, "use linear, from_zero, quadratic"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(constant, **settings)
