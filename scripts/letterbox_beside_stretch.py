"""How much `data.fit=letterbox` changes: the same network on the same images, stretched and with their proportions.

python scripts/letterbox_beside_stretch.py --data FOLDER_OF_SETS --work FOLDER --backbone FILE [--sets cards bccd]

Each set is made a mixture of wide and tall images first: by turns the largest part of each image that is twice as wide
as tall, or twice as tall as wide, around one of its objects. An object stays if half of its box does. Both ways to fit
the images then get the same CPU time for each training, on one thread; every detector is scored on the held-out images.
Finished trainings are not repeated, so a run that was stopped goes on where it was. Written: `<work>/cells/*.json`, a
file for each training, and at the end a table with the differences and their 95 % interval over the images.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from detr_exp.contest.cells import Contender, finished, in_order, make, refuse_mixed
from detr_exp.contest.sets import ImageSet, read_set
from detr_exp.data.image import read_image
from detr_exp.values import Values
from detr_exp.writing import write

ROOTS = {"cards": "cards_voc", "bccd": "bccd_coco", "cats": "cats_coco"}
FOLDS = {"cats": 5}
FITS = ("stretch", "letterbox")
RATIO, STAYS, QUALITY, RESAMPLES = 2.0, 0.5, 95, 1000
OVERRIDES = (
    *("model=rtdetrv2_tiny", "model/backbone=timm", "model.backbone.name=tf_efficientnet_lite0"),
    *("model.class_prior=auto", "data/augment=flip", "data.augment.photometric=0.5"),
    *("optim.lr=4e-4", "optim/scheduler=cosine"),
)


def mixture(made: ImageSet, folder: Path) -> ImageSet:
    """A set of wide and tall images, written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    objects: defaultdict[int, list[Values]] = defaultdict(list)
    for one in made.content["annotations"]:
        objects[one["image_id"]].append(one)
    rng, images, annotations = random.Random(0), [], []
    for place, image in enumerate(made.content["images"]):
        own = objects[image["id"]]
        middle = rng.choice(own)["bbox"] if own else [0, 0, image["width"], image["height"]]
        left, top, width, height = part_around(middle, (image["width"], image["height"]), is_wide=place % 2 == 0)
        path = folder / f"{image['id']:06d}.jpg"
        if not path.exists():
            pixels = read_image(Path(image["file_name"]))[top : top + height, left : left + width]
            write(path, lambda file, pixels=pixels: Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY))
        images.append({**image, "width": width, "height": height, "file_name": str(path.resolve())})
        annotations += [moved for one in own if (moved := inside(one, (left, top, width, height))) is not None]
    content = {**made.content, "images": images, "annotations": annotations}
    return replace(made, name=f"{made.name}_mixed", content=content, fingerprint=f"{made.fingerprint}-{RATIO}")


def part_around(box: Sequence[float], size: tuple[int, int], *, is_wide: bool) -> tuple[int, int, int, int]:
    """Left, top, width and height of the largest part of an image of (width, height) with its middle near a box's."""
    width, height = size
    ratio = RATIO if is_wide else 1 / RATIO
    part = (width, round(width / ratio)) if width / ratio <= height else (round(height * ratio), height)
    centre = box[0] + box[2] / 2, box[1] + box[3] / 2
    left, top = (
        round(min(max(0.0, at - side / 2), whole - side)) for at, side, whole in zip(centre, part, (width, height))
    )
    return left, top, max(1, part[0]), max(1, part[1])


def inside(one: Values, part: tuple[int, int, int, int]) -> Values | None:
    """An annotation in a part of its image; None where too little of its box is there."""
    x, y, width, height = one["bbox"]
    left, top, wide, high = part
    x0, y0, x1, y1 = max(x, left), max(y, top), min(x + width, left + wide), min(y + height, top + high)
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < STAYS * width * height:
        return None
    box = [x0 - left, y0 - top, x1 - x0, y1 - y0]
    known = {key: one[key] for key in ("id", "image_id", "category_id", "iscrowd")}
    return {**known, "bbox": box, "area": box[2] * box[3]}


def table(cells: Sequence[Values]) -> str:
    """Both fits of each set beside each other."""
    by_place: defaultdict[tuple[str, str], list[Values]] = defaultdict(list)
    for cell in cells:
        by_place[cell["set"], cell["contender"]].append(cell)
    rows = ["| set | fit | epochs | CPU seconds | mAP of each seed | mAP | AP50 |", "|---|---|---|---|---|---|---|"]
    for (name, fit), found in sorted(by_place.items(), reverse=True):
        seeds = ", ".join(f"{cell['mAP']:.3f}" for cell in sorted(found, key=lambda cell: cell["seed"]))
        means = [float(np.mean([cell[key] for cell in found])) for key in ("cpu_seconds", "mAP", "AP50")]
        rows.append(
            f"| {name} | {fit} | {found[0]['epochs']} | {means[0]:.0f} | {seeds} | {means[1]:.3f} | {means[2]:.3f} |"
        )
    for name in sorted({name for name, _ in by_place}):
        sides = [
            {cell["seed"]: np.array([cell["mAP"], *cell["drawn"]]) for cell in by_place[name, fit]} for fit in FITS
        ]
        shared = sorted(set(sides[0]) & set(sides[1]))
        if shared:
            apart = np.mean([sides[1][seed] - sides[0][seed] for seed in shared], axis=0)
            low, high = np.quantile(apart[1:], [0.025, 0.975])
            rows.append(f"\n{name}: letterbox - stretch = {apart[0]:+.3f} ({low:+.3f} to {high:+.3f}), seeds {shared}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--backbone", required=True, help="weights of tf_efficientnet_lite0: a file, or a name")
    parser.add_argument("--sets", nargs="+", choices=sorted(ROOTS), default=["cards", "bccd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=240, help="seconds of CPU time for each training")
    parser.add_argument("--resolution", type=int, default=160)
    args = parser.parse_args()
    sets = [
        mixture(read_set(name, str(args.data / ROOTS[name]), FOLDS.get(name)), args.work / "images" / name)
        for name in args.sets
    ]
    contenders = [
        Contender(
            name=fit,
            program="python -m detr_exp.contest.ours",
            options={"overrides": [*OVERRIDES, f"data.fit={fit}"]},
            weights=args.backbone,
            packages=("torch", "timm"),
        )
        for fit in FITS
    ]
    settings = {"budget": args.budget, "epochs": None, "resolution": args.resolution, "resamples": RESAMPLES}
    results = args.work / "cells"
    results.mkdir(parents=True, exist_ok=True)
    for cell in in_order(sets, contenders, args.seeds, {**settings, "batch_size": {made.name: 8 for made in sets}}):
        known = finished(results)
        planned = {"set": cell.data.name, "contender": cell.contender.name, "conditions": cell.conditions}
        refuse_mixed([*known, {**planned, "file": "this command"}])
        if not (results / f"{cell.name}.json").exists():
            write(results / f"{cell.name}.json", json.dumps(make(cell, known, args.work / "trainings")) + "\n")
            print(table(finished(results)), flush=True)
    print(table(finished(results)))


if __name__ == "__main__":
    main()
