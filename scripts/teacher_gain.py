"""What a teacher gives a student in the same CPU time, its own forward passes included.

python scripts/teacher_gain.py --data FOLDER_OF_SETS --work FOLDER --backbone FILE [--minutes 150]

A small RT-DETRv2 is trained alone, and by a teacher: `size` is an RT-DETRv2 of the size of R18, `family` an RF-DETR.
Teachers are trained first, on the same images; their training does not count. A short trial tells how much of a step a
teacher costs; a student with a teacher is trained for as many whole epochs less. The measured ratio of the CPU times is
in the table. Run it again until nothing is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import ceil

from timed_trainings import BACKBONE, Place, parser, place_of, row

from detr_exp.inference.detector import load
from detr_exp.trainer.checkpoint import NEWEST
from detr_exp.values import Values

SIZE = ("model.image_size=[256,256]",)
STUDENT = ("model=rtdetrv2_tiny", *BACKBONE, *SIZE)
TEACHERS = {
    "size": ("model=rtdetrv2", *BACKBONE, *SIZE),
    "family": (
        *("model=rfdetr", *BACKBONE, *SIZE, "model.backbone.out_strides=[16]", "model/decoder=rfdetr_tiny"),
        *("model.neck.levels=[P3,P4]", "model.hidden_dim=128", "model.num_layers=3", "model.num_queries=100"),
        *("model.num_groups=4", "loss=ia_bce"),
    ),
}
TRIAL_STEPS = 30


def length(epochs: int, seed: int) -> list[str]:
    return [f"trainer.epochs={epochs}", f"trainer.eval_interval={epochs}", f"seed={seed}"]


def share_of_teacher(place: Place, run: str) -> float:
    """The last measured share of the CPU time of a step that the teacher uses."""
    lines = (place.work / "runs" / run / "metrics.jsonl").read_text("utf-8").splitlines()
    shares = [line["time/teacher_share"] for line in map(json.loads, lines) if "time/teacher_share" in line]
    return float(shares[-1])


def student(place: Place, name: str, arm: str, more: Sequence[str], epochs: int, seed: int) -> Values | None:
    """The cell of a student; None: its training is not finished."""
    run = f"{name}-{arm}-{seed}"
    seconds = place.train(run, name, [*STUDENT, *more, *length(epochs, seed)], [run])
    if seconds is None:
        return None
    known = {"arm": arm, "seed": seed, "epochs": epochs, "cpu": seconds}
    return place.cell(run, name, run, load, known)


def taught(place: Place, name: str, arm: str, given: argparse.Namespace) -> list[Values | None]:
    """A cell for each seed of the students of a teacher."""
    students = [place.path(f"{name}-{arm}-{seed}") for seed in given.seeds]
    if all(path.exists() for path in students):
        return [json.loads(path.read_text("utf-8")) for path in students]
    of_teacher = f"{name}-teacher_{arm}"
    # needed until its students are trained
    if place.train(of_teacher, name, [*TEACHERS[arm], *length(given.teacher_epochs, 0)], [""]) is None:
        return []
    more = ["teacher=run", f"teacher.checkpoint={place.work / 'runs' / of_teacher / NEWEST}"]
    trial = f"{name}-trial_{arm}"
    steps = [f"trainer.max_steps={TRIAL_STEPS}", f"trainer.log_every_steps={TRIAL_STEPS // 2}"]
    if place.train(trial, name, [*STUDENT, *more, *length(given.epochs, 0), *steps], [""]) is None:
        return []
    known = {"arm": "teacher", "teacher": arm}
    worth = place.cell(of_teacher, name, of_teacher, load, known)
    print(f"{name}: the teacher {arm} has mAP {worth['mAP']:.4f}")
    epochs = ceil(given.epochs * (1 - share_of_teacher(place, trial)))
    return [student(place, name, arm, more, epochs, seed) for seed in given.seeds]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    arguments.add_argument("--teacher-epochs", type=int, default=60)
    given = arguments.parse_args()
    place, table = place_of(given), []
    for name in given.sets:
        alone = [student(place, name, "alone", (), given.epochs, seed) for seed in given.seeds]
        for arm in given.teachers:
            ours = taught(place, name, arm, given)
            pairs = [(one, two) for one, two in zip(ours, alone) if one is not None and two is not None]
            if len(pairs) == len(given.seeds):
                ratio = sum(one["cpu"] for one, _ in pairs) / sum(two["cpu"] for _, two in pairs)
                sides = ([[one] for one in side] for side in zip(*pairs))
                table.append(row(f"{name} | {arm}", *sides, f"{ratio:.2f}"))
    print("| set | teacher | seeds | alone | taught | difference (95 %) | CPU time, taught / alone |")
    print("|---|---|--:|--:|--:|--:|--:|")
    print("\n".join(table))
    print(f"\n{place.sitting.spent / 60:.1f} CPU minutes in this sitting{', which is over' * place.sitting.is_over}")


if __name__ == "__main__":
    main()
