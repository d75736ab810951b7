"""What two sides of runs say of each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detr_exp.metric import verdict
from detr_exp.runs.comparison import Scores, Side, compared, copies, spread, text
from detr_exp.runs.past import PastRun
from detr_exp.tracker.base import RunRecord
from detr_exp.values import Values

IMAGES, DRAWS = 50, 300
SHARED = np.random.default_rng(9).normal(0, 0.1, DRAWS)


def side(*values: float, seeds: tuple[int, ...] = (), draw: int = 0, classes: int = 0, drawn: bool = True) -> Side:
    """Runs with these values, and draws that all sides share but for a little of their own."""
    own = np.random.default_rng(draw).normal(0, 0.01, (len(values), DRAWS))
    scores = Scores(np.array(values), np.array(values)[:, None] + SHARED + own if drawn else None, IMAGES)
    runs = [
        PastRun(Path(f"{draw}/{seed}"), RunRecord(id="i", project="p", name="n"), {"seed": seed}, [])
        for seed in seeds or range(len(values))
    ]
    return Side(runs, {"mAP" if drawn else "mine": scores}, {f"class{k}": scores for k in range(classes)})


def judged(a: Side, b: Side, margin: float | None = 0.01) -> Values:
    return compared([(a, b)], level=0.95, margin=margin)[0]


def test_images_that_both_saw_tell_what_each_side_alone_could_not() -> None:
    found = judged(side(0.5), side(0.55, draw=1))
    low, high = found["interval"]
    assert 0 < low < 0.05 < high < 0.1, "though every side varies by 0.1"
    assert (found["verdict"], found["about"]) == ("b", "checkpoints")


def test_one_run_a_side_says_in_its_verdict_what_it_is_about() -> None:
    told = judged(side(0.5), side(0.55, draw=1))["says"]
    assert told.startswith("the checkpoint of b is better than that of a on images like these: mAP b - a +0.0500, 95 %")
    assert "images were resampled, both checkpoints are fixed, so nothing is claimed about their settings" in told
    several = judged(side(0.5, 0.501, 0.502), side(0.55, 0.551, 0.552, draw=1))["says"]
    assert several.startswith("b is better than a")
    assert "checkpoint" not in several


def test_a_difference_that_rounds_to_nothing_has_no_minus() -> None:
    told = judged(side(0.5), side(0.49999, draw=1))["says"]
    assert "mAP b - a +0.0000" in told


def test_seeds_that_scatter_leave_it_open_and_it_is_said_how_many_would_tell() -> None:
    a, b = side(0.4, 0.5, 0.6, seeds=(0, 1, 2)), side(0.45, 0.67, 0.53, seeds=(3, 4, 5), draw=1)
    found = judged(a, b)
    assert found["verdict"] == "unknown"
    assert not found["paired"]
    assert found["interval"][0] < 0 < found["interval"][1]
    seeds = found["to_tell"]["seeds"]
    assert 3 < seeds < 100
    assert f"About {seeds} seeds a side would tell a difference of 0.0500" in found["says"]


def test_the_same_seeds_go_in_pairs_in_whatever_order() -> None:
    a, b = side(0.4, 0.5, 0.6, seeds=(0, 1, 2)), side(0.66, 0.55, 0.45, seeds=(2, 1, 0), draw=1)
    found = judged(a, b)
    assert found["paired"]
    assert found["b"]["seeds"] == [0, 1, 2]
    assert found["verdict"] == "b", "all of them gain as much, though they scatter by twice that"
    assert "in pairs: 0, 1, 2" in text(whole([found]))
    again = judged(side(0.4, 0.5, 0.6, seeds=(7, 7, 7)), side(0.45, 0.55, 0.66, seeds=(7, 7, 7), draw=1))
    assert not again["paired"], "runs of one seed make no pairs"


def whole(found: list[Values]) -> Values:
    told = {"split": "val", "images": IMAGES, "resamples": DRAWS, "level": 0.95, "margin": 0.01}
    return {**told, "comparisons": [{"config": [], **one} for one in found]}


def test_equal_sides_may_be_called_equal_unless_told_not_to() -> None:
    a, b = side(0.5, 0.5005, 0.501), side(0.5002, 0.5007, 0.5011, draw=1)
    assert judged(a, b)["verdict"] == "equal"
    assert "a and b differ by less than 0.01 (95 %)" in judged(a, b)["says"]
    assert judged(a, b, margin=None)["verdict"] == "unknown"
    assert judged(a, b, margin=0.001)["verdict"] == "unknown"
    own = judged(side(0.5), side(0.5))
    assert (own["difference"], own["interval"], own["verdict"]) == (0.0, [0.0, 0.0], "equal")
    assert judged(side(0.5), side(0.5), None)["says"].startswith("both sides gave the same results")


def test_several_verdicts_are_corrected_for_their_number() -> None:
    generator = np.random.default_rng(0)

    def noise(draw: int) -> Side:
        alike = side(0.5, classes=1, draw=draw)
        classes = {}
        for k in range(20):
            shift = generator.normal(0, 0.013)
            scores = Scores(np.array([0.5 + shift]), 0.5 + shift + generator.normal(0, 0.01, (1, DRAWS)), IMAGES)
            classes[f"class{k}"] = scores
        return alike._replace(classes=classes)

    found = judged(noise(1), noise(2), None)
    alone = [row["p"] for row in found["classes"]]
    assert [row["p_corrected"] for row in found["classes"]] == verdict.holm(alone)
    assert min(alone) < 0.05 <= min(row["p_corrected"] for row in found["classes"])
    assert {row["verdict"] for row in found["classes"]} == {"unknown"}
    assert "corrected for 20 comparisons (Holm)" in text(whole([found]))
    points = compared([(side(0.5), side(0.52, draw=k)) for k in range(1, 5)], level=0.95, margin=None)
    assert [one["p_corrected"] for one in points] == verdict.holm([one["p"] for one in points])
    assert points[0]["corrected_for"] == 4


def test_an_evaluator_that_says_nothing_of_images_is_judged_by_seeds() -> None:
    from scipy import stats

    a, b = side(1.0, 1.2, 1.1, seeds=(0, 1, 2), drawn=False), side(2.0, 2.3, 2.1, seeds=(3, 4, 5), drawn=False)
    found = judged(a, b)
    welch = stats.ttest_ind([2.0, 2.3, 2.1], [1.0, 1.2, 1.1], equal_var=False).confidence_interval()
    assert found["interval"] == pytest.approx([welch.low, welch.high], abs=0.15)
    assert found["verdict"] == "b"
    assert found["says"].startswith("b is higher than a: mine b - a +1.0333")
    assert "the interval covers seeds on these images alone" in found["says"]
    alone = judged(side(1.0, drawn=False), side(2.0, draw=1, drawn=False))
    assert (alone["difference"], alone["interval"], alone["p"], alone["verdict"]) == (
        1.0,
        [None, None],
        None,
        "unknown",
    )
    assert "cannot be told" in alone["says"]
    json.dumps(alone, allow_nan=False)


def test_what_the_truth_does_not_hold_is_no_result() -> None:
    nothing = Scores(np.array([np.nan]), np.full((1, DRAWS), np.nan), 0)
    a, b = side(0.5, classes=1), side(0.6, classes=1, draw=1)
    for one in (a, b):
        one.metrics["mAP_small"], one.classes["absent"] = nothing, nothing
    found = judged(a, b)
    assert [row["class"] for row in found["classes"]] == ["class0"]
    assert (found["metrics"][1]["difference"], found["metrics"][1]["verdict"]) == (None, "unknown")
    assert found["metrics"][0]["corrected_for"] == 1, "what says nothing is no further comparison"
    assert "mAP_small is undefined" in text(whole([found]))
    json.dumps(found, allow_nan=False)


def test_draws_that_show_no_scatter_prove_nothing() -> None:
    """A class in two images, found by one side and missed by the other, gives the same in every draw."""
    flat = [Scores(np.array([value]), np.full((1, DRAWS), value), 2) for value in (0.0, 1.0)]
    a, b = (side(0.5, draw=k)._replace(classes={"rare": one}) for k, one in enumerate(flat))
    found = judged(a, b)
    assert (found["classes"][0]["p"], found["classes"][0]["verdict"]) == (None, "unknown")
    assert " - " in text(whole([found]))


def test_runs_that_are_another_one_again_are_named() -> None:
    one = side(0.5, 0.6, seeds=(0, 1))
    assert copies(one) == []
    assert copies(one.in_order([0, 0, 1, 1])) == [1, 3]
    other = side(0.5, 0.6, seeds=(0, 0))
    assert copies(other) == [], "the same seed came to something else on this machine"


@pytest.mark.parametrize(
    ("values", "told"), [([0.5], "0.5000"), ([0.4, 0.6], "0.5000 +- 0.1414 (2 runs)"), ([None], "-")]
)
def test_mean_and_deviation(values: list[float | None], told: str) -> None:
    assert spread(values) == told
