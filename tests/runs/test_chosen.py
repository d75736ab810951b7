"""What became of the choice of the best among runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr_exp.metric.honest import Choice
from detr_exp.runs.chosen import honest
from detr_exp.runs.past import PastRun
from detr_exp.tracker.base import RunRecord


def run(here: list[float], there: list[float] | None, monitor: str | None = None, status: str = "ok") -> PastRun:
    name = (monitor or "val/mAP").removeprefix("val/")
    lines = [{"step": step, f"val/{name}": value} for step, value in enumerate(here)]
    for line, value in zip(lines, there or []):
        line[f"held_out/{name}"] = value
    record = RunRecord(id="x", project="", name="x", words=[], status=status)
    return PastRun(Path("x"), record, {"trainer": {"monitor": monitor}}, lines)


def test_of_one_run_the_epochs_are_what_is_chosen_from() -> None:
    found = run([0.1, 0.5, 0.4], [0.1, 0.3, 0.35]).choices
    assert found == (Choice(0.5, 0.3), Choice(0.35, 0.4))
    assert honest([[run([0.1, 0.5, 0.4], [0.1, 0.3, 0.35])]]).luck == pytest.approx((0.1 + 0.05) / 2)


def test_of_a_loss_less_is_better() -> None:
    assert run([3.0, 2.0], [1.0, 2.0], "val/loss").choices == (Choice(-2.0, -2.0), Choice(-1.0, -3.0))


def test_seeds_are_averaged_and_runs_without_a_result_left_out() -> None:
    first, second = [run([0.4], [0.2]), run([0.6], [0.4])], [run([0.3], [0.9]), run([], [], status="failed")]
    found = honest([first, second, [run([], [])]])
    assert found.choice == pytest.approx(Choice(0.5, 0.3))
    assert found.luck == pytest.approx(((0.5 - 0.3) + (0.9 - 0.3)) / 2)


@pytest.mark.parametrize(
    "points", [[], [[run([], [])]], [[run([0.5], None)]], [[run([0.5], [0.4])], [run([0.6], None)]]]
)
def test_it_says_nothing_where_all_images_have_chosen(points: list[list[PastRun]]) -> None:
    assert honest(points) is None
