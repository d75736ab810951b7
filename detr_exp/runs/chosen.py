"""What became of the choice of the best among runs, where half of the validation images chose and half did not."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from detr_exp.metric.honest import Choice, Flattery, flattery
from detr_exp.runs.settings import Point


def honest(points: Sequence[Point]) -> Flattery | None:
    """What became of choosing the point with the best mean; None where a run was chosen by all validation images."""
    found = [[run.choices for run in point if run.score is not None] for point in points]
    if not any(found) or any(choices is None for of_point in found for choices in of_point):
        return None

    def of(which: int) -> list[Choice]:
        pairs = [[choices[which] for choices in of_point if choices is not None] for of_point in found if of_point]
        return [Choice(*map(mean, zip(*of_point))) for of_point in pairs]

    return flattery(of(0), of(1))
