"""What differs between runs, and which belong together."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from detr_exp.runs.past import PastRun
from detr_exp.runs.settings import Setting, differing, in_pairs, in_words, points, settings
from detr_exp.tracker.base import RunRecord


def run(config, words=(), **tags) -> PastRun:
    return PastRun(Path("x"), RunRecord(id="i", project="p", name="n", words=list(words), tags=tags), config, [])


def test_settings_that_change_together_are_one_and_those_of_the_command_line_name_it():
    made = [
        run({"loss": {"kind": kind, "alpha": alpha}, "seed": 0, "optim": {"lr": lr}}, [f"loss={kind}"], loss=kind)
        for kind, alpha, lr in (("focal", 0.25, 1), ("vfl", 0.75, 1), ("vfl", 0.75, 2))
    ]
    assert settings(made) == [
        Setting("loss", "loss", ["loss.kind", "loss.alpha"], ["focal", "vfl", "vfl"]),
        Setting("optim.lr", "learning rate", [], ["1", "1", "2"]),
    ]
    assert settings(made[:1]) == settings([made[0], made[0]]) == []


def test_a_run_that_did_not_start_has_only_its_words():
    (setting,) = settings([run({"optim": {"lr": 1}}), run({}, ["optim.lr=9"])])
    assert setting.values == ["1", "9"]


def test_where_values_are_not_numbers_and_what_they_change():
    run_data = run({"tracker": {"run": "a"}, "model": {"weights": None}})
    other = run({"tracker": {"run": "b"}, "model": {"weights": "x.pth"}})
    assert settings([run_data, other]) == [Setting("model.weights", "weights", [], ["null", "x.pth"])]


def test_names_are_as_short_as_their_neighbours_permit():
    keys = ["optim.lr", "optim.weight_decay", "model.backbone.lr", "a.width", "b.width", "loss"]
    told = ["optim learning rate", "weight decay", "backbone learning rate", "a width", "b width", "loss"]
    assert in_words(keys) == told
    assert in_words(["optim.lr", "model/head"]) == ["learning rate", "head"]
    assert in_words(["width", "a.width"]) == ["width", "a width"]


def trained(**config) -> PastRun:
    return replace(run(config), folder=Path(str(config)))


def test_what_differs_between_groups():
    a = [trained(seed=0, optim={"lr": 1}, tracker={"run": "x"}), trained(seed=1, optim={"lr": 1})]
    b = [trained(seed=s, optim={"lr": 2, "warmup": None}) for s in (0, 1)]
    assert differing(a, b) == [("optim.lr", "1", "2"), ("optim.warmup", "-", "null")]
    assert differing(a, a, b)[0] == ("optim.lr", "1", "1", "2")


def test_runs_of_one_setting_are_one_point_whatever_else_is_written_down():
    runs = [trained(seed=seed, lr=lr, tracker={"run": str(seed)}) for seed in (0, 1) for lr in (1, 2)]
    assert points(runs) == [[runs[0], runs[2]], [runs[1], runs[3]]]
    assert points(runs[:1]) == [runs[:1]]


def test_points_of_two_sweeps_meet_by_what_both_swept(caplog):
    a = [[trained(seed=0, lr=lr, model="a")] for lr in (1, 2, 3)]
    b = [[trained(seed=0, lr=lr, model="b")] for lr in (3, 4, 1)]
    with caplog.at_level(logging.WARNING):
        assert in_pairs(a, b) == [(a[0], b[2]), (a[2], b[0])]
    assert "2 settings" in caplog.text
    assert in_pairs(a[:1], b) == [(a[0], one) for one in b], "one against all"
    assert in_pairs(a[:1], a) == [(a[0], one) for one in a[1:]], "but not against itself"
    assert in_pairs(a[:1], a[:1]) == [(a[0], a[0])]
    with pytest.raises(ValueError, match="not plain which belong together"):
        in_pairs(a, [[trained(seed=0, lr=9, size=size, model="b")] for size in (1, 2)])
