"""Who is ahead, from cells alone."""

from __future__ import annotations

import numpy as np
import pytest

from detr_exp.contest.cells import refuse_mixed
from detr_exp.contest.standings import LEARNED, standings
from detr_exp.values import Values

IMAGES, RESAMPLES = 200, 400


def cells(name: str, values: list[float], program: str = "a", noise: int = 0) -> list[Values]:
    """One cell per value; what images do is the same for all cells with the same `noise`."""
    images = np.random.default_rng(noise).normal(0, 0.02, RESAMPLES)
    return [
        {
            "set": "squares",
            "contender": name,
            "seed": seed,
            "mAP": value,
            "images": IMAGES,
            "drawn": (value + images).tolist(),
            "conditions": {"program": program},
        }
        for seed, value in enumerate(values)
    ]


def verdicts(*sides: list[Values], margin: float = 0.01) -> dict[str, str]:
    rows = standings([cell for side in sides for cell in side], "ours", margin)["squares"]
    return {row.name: row.beside.verdict for row in rows if row.beside is not None}


def test_a_difference_beyond_seeds_and_images_is_told() -> None:
    ours = cells("ours", [0.50, 0.51, 0.49])
    assert verdicts(ours, cells("worse", [0.30, 0.31, 0.29], "b"), cells("better", [0.70, 0.71, 0.69], "c")) == {
        "worse": "behind",
        "better": "ahead",
    }


def test_what_seeds_or_images_explain_is_not_told() -> None:
    ours = cells("ours", [0.50, 0.58, 0.42])
    assert verdicts(ours, cells("other", [0.45, 0.53, 0.37], "b")) == {"other": "unknown"}, "seeds scatter more"
    steady = cells("ours", [0.50, 0.501, 0.499])
    other = cells("other", [0.53, 0.531, 0.529], "b", noise=1)
    assert verdicts(steady, other) == {"other": "unknown"}, "other images may turn it round"


def test_seeds_of_the_same_program_are_pairs_and_those_of_others_are_not() -> None:
    ours, shifted = [0.50, 0.60, 0.40], [0.53, 0.631, 0.429]
    assert verdicts(cells("ours", ours), cells("variant", shifted)) == {"variant": "ahead"}
    assert verdicts(cells("ours", ours), cells("variant", shifted, "b")) == {"variant": "unknown"}


def test_what_differs_by_less_than_the_margin_is_equal() -> None:
    same = cells("ours", [0.50, 0.5005, 0.4995]), cells("other", [0.50, 0.5005, 0.4996], "b")
    assert verdicts(*same) == {"other": "equal"}
    assert verdicts(*same, margin=0.0001) == {"other": "unknown"}


def test_p_values_are_corrected_for_the_number_of_comparisons() -> None:
    ours, other = cells("ours", [0.50, 0.51, 0.49]), cells("other", [0.46, 0.47, 0.45], "b")
    idle = [cells(f"idle{number}", [0.50, 0.53, 0.47], "b") for number in range(20)]

    def p(*sides: list[Values]) -> float:
        rows = standings([cell for side in sides for cell in side], "ours", 0.01)["squares"]
        return next(row.beside.p for row in rows if row.name == "other" and row.beside is not None)

    assert p(ours, other, *idle) == pytest.approx(21 * p(ours, other))


def test_what_has_learned_nothing_counts_for_nobody() -> None:
    ours, idle = cells("ours", [0.50, 0.51, 0.49]), cells("idle", [LEARNED - 0.02] * 3, "b")
    assert verdicts(ours, idle) == {"idle": "nothing"}
    assert verdicts(cells("ours", [0.01, 0.02, 0.01]), cells("other", [0.5, 0.5, 0.5], "b")) == {"other": "nothing"}
    rows = standings([*ours, *idle], "ours", 0.01)["squares"]
    assert rows[1].beside is not None
    assert rows[1].beside.interval[1] < 0, "the difference is still given"


def test_one_seed_makes_no_claim() -> None:
    assert verdicts(cells("ours", [0.5]), cells("other", [0.9], "b")) == {}


def test_the_interval_of_a_mean_holds_seeds_and_images() -> None:
    (row,) = standings(cells("ours", [0.50, 0.51, 0.49]), "ours", 0.01)["squares"]
    assert row.interval is not None
    assert row.interval[1] - row.mean > 4.303 * 0.01 / 3**0.5, "wider than that of three seeds alone"
    assert row.interval[0] < 0.5 < row.interval[1]


def test_cells_of_other_conditions_are_refused_by_name() -> None:
    base = dict.fromkeys(("set", "held_out", "draws", "budget", "resolution", "batch_size", "cpu"), 1)
    base |= {"program": "a", "options": {}, "weights": None, "versions": {"torch": "1"}}
    first = {"set": "squares", "contender": "ours", "conditions": base, "file": "one.json"}
    for key, value in (("cpu", "other"), ("versions", {"torch": "2"}), ("weights", "abc"), ("budget", 2)):
        other = {**first, "conditions": base | {key: value}, "file": "two.json"}
        with pytest.raises(ValueError, match=rf"two\.json has {key}.*one\.json.*may_differ=\[{key}\]"):
            refuse_mixed([first, other])
        refuse_mixed([first, other], [key])
    another = {**first, "contender": "theirs", "conditions": base | {"versions": {"torch": "2"}}, "file": "two.json"}
    refuse_mixed([first, another])
