"""How many planted label errors `review` finds: plant them, train one detector per fold, rank, count.

python scripts/measure_review.py --data FOLDER_OF_SETS --work FOLDER [--sets cards_voc bccd_coco] [--train-only]

In each set, 5 % of the objects get an error, a quarter of each kind: another class, a shifted box, a deleted object, an
invented object. Images are split into folds, and a detector is trained on the other folds of each: on labels with
errors, as in life. `review` ranks its suspects with these checkpoints. A suspect is right if it names an annotation
that was changed or invented, or a place where an object was deleted; each error counts once. Finished trainings are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from detr_exp.contest.sets import ImageSet, read_set
from detr_exp.data.part import restricted
from detr_exp.metric.confusion import iou
from detr_exp.trainer.checkpoint import NEWEST
from detr_exp.values import Values
from detr_exp.writing import write

KINDS = ("class", "shifted", "deleted", "invented")
SHARE, FOLDS, TRIES = 0.05, 3, 1000
FREE, SHIFTED = 0.1, (0.1, 0.5)  # IoU of an invented box with any object, and of a shifted one with its object
EPOCHS = {"cards_voc": 13, "bccd_coco": 10}
OVERRIDES = (
    *("model=rtdetrv2_tiny", "model/backbone=timm", "model.backbone.name=tf_efficientnet_lite0"),
    *("model.class_prior=auto", "model.image_size=[160,160]", "data/augment=flip", "data.augment.photometric=0.5"),
    *("optim.lr=4e-4", "optim/scheduler=cosine", "trainer.batch_size=8", "trainer.num_pictures=0", "tracker=none"),
    *("trainer/hardware=cpu", "trainer.hardware.threads=1", "trainer.hardware.amp=bf16", "trainer.progress_bar=none"),
    *("data.num_workers=0", "data.cache=ram"),
)


def planted(content: Values, seed: int) -> tuple[Values, list[Values]]:
    """A data set with label errors, and what was done.

    Args:
        content: a COCO file.
        seed: of all choices.

    Returns:
        the content, and for each error its `kind`, `image_id`, `annotation_id` and `bbox` (of a deleted or shifted
        object the true one, and the class in `category_id`).
    """
    rng = random.Random(seed)
    annotations = [dict(one) for one in content["annotations"] if not one.get("iscrowd")]
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    per_kind = round(SHARE * len(annotations) / len(KINDS))
    chosen = rng.sample(annotations, (len(KINDS) - 1) * per_kind)
    errors, deleted = [], set()
    for place, one in enumerate(chosen):
        kind = KINDS[place % (len(KINDS) - 1)]
        errors.append({"kind": kind, "annotation_id": one["id"], **{k: one[k] for k in ("image_id", "category_id")}})
        errors[-1]["bbox"] = list(one["bbox"])
        if kind == "class":
            one["category_id"] = rng.choice(
                [other["id"] for other in content["categories"] if other["id"] != one["category_id"]]
            )
        elif kind == "shifted":
            one["bbox"] = _shifted(rng, one["bbox"], sizes[one["image_id"]])
        else:
            deleted.add(one["id"])
    kept = [one for one in annotations if one["id"] not in deleted]
    for number in range(per_kind):
        made = _invented(rng, content, max(one["id"] for one in annotations) + 1 + number)
        kept.append(made)
        known = {key: made[key] for key in ("image_id", "category_id", "bbox")}
        errors.append({"kind": "invented", "annotation_id": made["id"], **known})
    return {**content, "annotations": kept}, errors


def _shifted(rng: random.Random, box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """The box, moved inside the image so that it still overlaps its object, but by less than an evaluation asks."""
    x, y, width, height = box
    for _ in range(TRIES):
        moved = [x + rng.uniform(-1, 1) * width, y + rng.uniform(-1, 1) * height, width, height]
        if _inside(moved, size) and SHIFTED[0] < iou(np.array([box]), np.array([moved]))[0, 0] < SHIFTED[1]:
            return moved
    return [x + 0.3 * width, y + 0.3 * height, 0.5 * width, 0.5 * height]  # as large as the image: a part of it


def _invented(rng: random.Random, content: Values, number: int) -> Values:
    """An object as large as another one, where there is none."""
    while True:
        like, image = rng.choice(content["annotations"]), rng.choice(content["images"])
        width, height = like["bbox"][2:]
        box = [rng.uniform(0, image["width"] - width), rng.uniform(0, image["height"] - height), width, height]
        others = [one["bbox"] for one in content["annotations"] if one["image_id"] == image["id"]]
        if _inside(box, (image["width"], image["height"])) and (
            not others or iou(np.array([box]), np.array(others)).max() < FREE
        ):
            return {**like, "id": number, "image_id": image["id"], "bbox": box, "area": width * height}


def _inside(box: Sequence[float], size: tuple[int, int]) -> bool:
    x, y, width, height = box
    return x >= 0 and y >= 0 and x + width <= size[0] and y + height <= size[1]


def trained(made: ImageSet, content: Values, root: Path, epochs: int, backbone: str, folder: Path) -> list[Path]:
    """A run for each fold, trained on the images of the others; finished ones are not repeated."""
    runs = []
    for place, fold in enumerate(made.folds):
        run = folder / f"fold{place}"
        for name, ids in (("train", fold.train), ("val", fold.held_out)):
            path = folder / f"fold{place}_{name}.json"
            write(path, json.dumps(restricted(content, ids)))
        if not (run / "done").exists():
            splits = [
                f"data.{name}.{key}={value}"
                for name in ("train", "val")
                for key, value in (("annotations", f"fold{place}_{name}.json"), ("images", "."))
            ]
            words = [*OVERRIDES, f"model.backbone.pretrained={backbone}", "data=coco", f"data.root={folder}", *splits]
            words += [f"data.source.extra_roots=[{root}]"]
            words += [f"trainer.epochs={epochs}", f"trainer.eval_interval={epochs}", "trainer.resume=auto"]
            command = [sys.executable, "-m", "detr_exp.train", *words, f"hydra.run.dir={run}"]
            subprocess.run(command, check=True)
            write(run / "done", "")
        runs.append(run / NEWEST)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the sets")
    parser.add_argument("--work", required=True, type=Path, help="folder for runs, which is used again")
    parser.add_argument("--backbone", required=True, help="file with weights of tf_efficientnet_lite0")
    parser.add_argument("--sets", nargs="+", default=list(EPOCHS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-only", action="store_true")
    given = parser.parse_args()
    for name in given.sets:
        made = read_set(name, str(given.data / name), FOLDS)
        content, errors = planted(made.content, given.seed)
        folder = given.work.resolve() / f"{name}-{given.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "errors.json", json.dumps(errors))
        write(folder / "planted.json", json.dumps(content))
        runs = trained(made, content, given.data / name, EPOCHS[name], given.backbone, folder)
        print(name, len(errors), runs)


if __name__ == "__main__":
    main()
