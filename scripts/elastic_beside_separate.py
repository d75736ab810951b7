"""One elastic training beside three separate ones: what its members lose, and at what share of their CPU time.

python scripts/elastic_beside_separate.py --data FOLDER_OF_SETS --work FOLDER --backbone FILE [--minutes 150]

Three detectors, small, middle and large, are trained separately, and one of the size of the large one is trained
elastically and read as all three. An arm is a way to do the latter: `plain` samples one member for each step;
`wholes` samples whole depth, queries and size twice as often; `deep` samples queries and size only, as the losses after
each layer train all depths; `sandwich` computes the largest and the smallest one, too; `distilled` lets the largest
teach the others besides; `norms` are the members of `plain` with batch norms that are estimated anew. Run it again
until nothing is missing: finished trainings and cells are read, and the table is printed as far as all seeds of a set
are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from timed_trainings import BACKBONE, Place, parser, place_of, row

from detr_exp import build
from detr_exp.inference.detector import Detector, load
from detr_exp.model.member import Member
from detr_exp.trainer.norms import reestimate
from detr_exp.values import Values

NETWORK = ("model=rtdetrv2_tiny", *BACKBONE)
MEMBERS = {"small": Member(1, 25, (192, 192)), "middle": Member(2, 50, (224, 224)), "large": Member(3, 100, (256, 256))}


def sampled(layers: str, queries: str, image_size: str) -> tuple[str, ...]:
    """Overrides of an elastic training with these shares."""
    shares = {"layers": layers, "queries": queries, "image_size": image_size}
    return ("trainer/elastic=full", *(f"trainer.elastic.{axis}=[{values}]" for axis, values in shares.items()))


ELASTIC = sampled("0.34,0.67,1.0", "0.25,0.5,1.0", "0.75,0.875,1.0")
WHOLES = sampled("0.34,0.67,1.0,1.0", "0.25,0.5,1.0,1.0", "0.75,0.875,1.0,1.0")
DEEP = sampled("1.0", "0.25,0.5,1.0", "0.75,0.875,1.0")
# arm -> its overrides, and its epochs as a multiple of those of a separate training: for 45 % of the time of all three
ARMS: dict[str, tuple[tuple[str, ...], float]] = {
    "plain": (ELASTIC, 1.2),
    "wholes": (WHOLES, 1.08),
    "deep": (DEEP, 1.2),
    "sandwich": ((*ELASTIC, "trainer.elastic.sandwich=true"), 0.43),
    "distilled": ((*ELASTIC, "trainer.elastic.sandwich=true", "teacher=largest"), 0.42),
}
NORM_BATCHES, NORM_BATCH_SIZE = 20, 8


def words(member: Member, epochs: int, seed: int) -> list[str]:
    """Overrides of a training of one size."""
    extent = [
        f"model.num_layers={member.layers}",
        f"model.num_queries={member.queries}",
        f"model.image_size={list(member.image_size or ())}".replace(" ", ""),
    ]
    return [*NETWORK, *extent, f"trainer.epochs={epochs}", f"trainer.eval_interval={epochs}", f"seed={seed}"]


def as_trained(checkpoint: Path, member: Member) -> Detector:
    """A member of a trained network."""
    return load(checkpoint, at=member)


def with_new_norms(checkpoint: Path, member: Member) -> Detector:
    """A member whose batch norms are estimated anew on training images."""
    detector = load(checkpoint, at=member)
    data = build.data(detector.cfg)
    loader = data.loader("train", network=detector.network, batch_size=NORM_BATCH_SIZE, seed=0)
    reestimate(detector.network, loader, detector.precision, NORM_BATCHES)
    return detector


def separate(place: Place, name: str, seeds: Sequence[int], epochs: int) -> tuple[dict[str, list[Values]], float]:
    """Member -> a cell for each seed, and the CPU time of all; cells of unfinished trainings are missing."""
    cells: dict[str, list[Values]] = {member: [] for member in MEMBERS}
    spent = 0.0
    for seed in seeds:
        for size, member in MEMBERS.items():
            run = f"{name}-{size}-{seed}"
            seconds = place.train(run, name, words(member, epochs, seed), [run])
            if seconds is not None:
                spent += seconds
                known = {"arm": "separate", "member": size, "seed": seed, "cpu": seconds}
                cells[size].append(place.cell(run, name, run, load, known))
    return cells, spent


def elastic(
    place: Place, name: str, arm: str, seeds: Sequence[int], epochs: int
) -> tuple[dict[str, dict[str, list[Values]]], float]:
    """Arm -> member -> a cell for each seed, and the CPU time of the trainings."""
    more, factor = ARMS[arm]
    kinds = {arm: as_trained} | ({"norms": with_new_norms} if arm == "plain" else {})
    cells = {kind: {member: list[Values]() for member in MEMBERS} for kind in kinds}
    spent = 0.0
    for seed in seeds:
        run = f"{name}-{arm}-{seed}"
        made = {(kind, size): f"{name}-{kind}-{size}-{seed}" for kind in kinds for size in MEMBERS}
        overrides = [*words(MEMBERS["large"], max(1, round(factor * epochs)), seed), *more]
        seconds = place.train(run, name, overrides, list(made.values()))
        if seconds is None:
            continue
        spent += seconds
        for (kind, size), cell in made.items():
            known = {"arm": kind, "member": size, "seed": seed, "cpu": seconds}
            make = partial(kinds[kind], member=MEMBERS[size])
            cells[kind][size].append(place.cell(cell, name, run, make, known))
    return cells, spent


def rows(place: Place, name: str, given: argparse.Namespace) -> list[str]:
    """The rows of a set, as far as all seeds are there."""
    alone, time_alone = separate(place, name, given.seeds, given.epochs)
    found = []
    for arm in given.arms:
        arms, time = elastic(place, name, arm, given.seeds, given.epochs)
        for kind, cells in arms.items():
            if any(len(part[size]) < len(given.seeds) for part in (alone, cells) for size in MEMBERS):
                continue
            share = f"{time / time_alone:.0%}"
            for size in MEMBERS:
                pairs = [[cell] for cell in cells[size]], [[cell] for cell in alone[size]]
                found.append(row(f"{name} | {kind} | {size}", *pairs, share))
            means = ([list(seed) for seed in zip(*(part[size] for size in MEMBERS))] for part in (cells, alone))
            found.append(row(f"{name} | {kind} | mean", *means, share))
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    given = arguments.parse_args()
    place = place_of(given)
    table = [line for name in given.sets for line in rows(place, name, given)]
    print("| set | arm | member | seeds | separate | elastic | difference (95 %) | CPU time of the three |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    print("\n".join(table))
    print(f"\n{place.sitting.spent / 60:.1f} CPU minutes in this sitting{', which is over' * place.sitting.is_over}")


if __name__ == "__main__":
    main()
