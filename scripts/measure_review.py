"""How many planted label errors `review` finds: plant them, train one detector per fold, rank, count.

python scripts/measure_review.py --data FOLDER_OF_SETS --work FOLDER --backbone FILE [--sets cards_voc bccd_coco]
python scripts/measure_review.py --data FOLDER_OF_SETS --proof outputs/proof     # without a training

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
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from detr_exp.contest.sets import ImageSet, read_set
from detr_exp.data.part import restricted
from detr_exp.inference.detector import load
from detr_exp.metric.confusion import iou
from detr_exp.metric.errors import Judged, judge
from detr_exp.metric.suspects import suspects
from detr_exp.trainer.checkpoint import NEWEST
from detr_exp.values import Values
from detr_exp.writing import write

PROOF_NAMES, PLANTINGS = {"cards_voc": "cards", "bccd_coco": "bccd"}, 8
KINDS = ("class", "shifted", "deleted", "invented")
SHARE, FOLDS, TRIES = 0.05, 3, 1000
FREE, SHIFTED = 0.1, (0.1, 0.5)  # IoU of an invented box with any object, and of a shifted one with its object
EPOCHS = {"cards_voc": 13, "bccd_coco": 10}
OVERRIDES = (
    *("model=rtdetrv2_tiny", "model/backbone=timm", "model.backbone.name=tf_efficientnet_lite0"),
    *("model.class_prior=0.1", "data/augment=flip", "data.augment.photometric=0.5"),
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


def trained(
    made: ImageSet, content: Values, root: Path, epochs: int, given: argparse.Namespace, folder: Path
) -> list[Path]:
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
            words = [
                *OVERRIDES,
                f"model.backbone.pretrained={given.backbone}",
                "data=coco",
                f"data.root={folder}",
                *splits,
            ]
            words += [f"data.source.extra_roots=[{root}]", f"model.image_size=[{given.size},{given.size}]"]
            words += [f"trainer.epochs={epochs}", f"trainer.eval_interval={epochs}", "trainer.resume=auto"]
            command = [sys.executable, "-m", "detr_exp.train", *words, f"hydra.run.dir={run}"]
            subprocess.run(command, check=True)
            write(run / "done", "")
        runs.append(run / NEWEST)
    return runs


def judged_by(content: Values, detections: Sequence[Values]) -> dict[int, Judged]:
    """The images of a COCO file with COCO results, by image id; objects in the order of their annotations."""
    label_of = {category["id"]: label for label, category in enumerate(content["categories"])}
    truth, found = _by_image(content["annotations"]), _by_image(detections)
    nothing = np.zeros(0, int), np.zeros((0, 4))
    images = {}
    for image in content["images"]:
        best = sorted(found.get(image["id"], []), key=lambda one: -one["score"])
        labels, boxes = _arrays(best, label_of)
        scores = np.array([one["score"] for one in best])
        images[image["id"]] = judge(scores, labels, boxes, _arrays(truth.get(image["id"], []), label_of), nothing)
    return images


def _by_image(rows: Sequence[Values]) -> dict[int, list[Values]]:
    result: dict[int, list[Values]] = {}
    for row in rows:
        result.setdefault(row["image_id"], []).append(row)
    return result


def _arrays(rows: Sequence[Values], label_of: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.array([row["bbox"] for row in rows], float).reshape(-1, 4)
    return np.array([label_of[row["category_id"]] for row in rows], int), boxes


def kinds_found(content: Values, errors: Sequence[Values], images: dict[int, Judged], first: int) -> list[str]:
    """For each of the first suspects the kind of the planted error that it names, which counts once; "" for none."""
    ids = {number: [one["id"] for one in rows] for number, rows in _by_image(content["annotations"]).items()}
    left = dict(enumerate(errors))
    result = []
    for one in suspects(images)[:first]:
        if one.object >= 0:
            named = ids[one.image_id][one.object]
            fits = (
                place for place, error in left.items() if error["kind"] != "deleted" and error["annotation_id"] == named
            )
        else:
            box = images[one.image_id].boxes[one.detection]
            here = {place: error for place, error in left.items() if error["image_id"] == one.image_id}
            fits = (
                place
                for place, error in here.items()
                if error["kind"] == "deleted" and iou(box[None], np.array([error["bbox"]]))[0, 0] >= 0.5
            )
        place = next(fits, None)
        result.append("" if place is None else left.pop(place)["kind"])
    return result


def row_of(name: str, trials: Sequence[tuple[Values, list[Values], dict[int, Judged]]]) -> str:
    """A row of the table: precision of the first N suspects, in all and how many of each kind were found."""
    hits, planted_of, found_of, chance = [], Counter[str](), Counter[str](), []
    for content, errors, images in trials:
        found = kinds_found(content, errors, images, len(errors))
        hits.append(sum(map(bool, found)) / len(errors))
        found_of.update(kind for kind in found if kind)
        planted_of.update(error["kind"] for error in errors)
        wrong = sum(error["kind"] != "deleted" for error in errors)
        chance.append(wrong / len(content["annotations"]))
    kinds = " | ".join(f"{found_of[kind]} of {planted_of[kind]}" for kind in KINDS)
    spread = f" ({min(hits):.2f} to {max(hits):.2f})" if len(hits) > 1 else ""
    sizes = f"{len(trials[0][0]['images'])} | {len(trials[0][1])} | {len(trials)}"
    return f"| {name} | {sizes} | {np.mean(hits):.2f}{spread} | {np.mean(chance):.3f} | {kinds} |"


def cross_fitted(name: str, given: argparse.Namespace) -> list[tuple[Values, list[Values], dict[int, Judged]]]:
    """A set whose images are judged by detectors that were trained on the other folds, with their errors."""
    made = read_set(name, str(given.data / name), FOLDS)
    content, errors = planted(made.content, given.seed)
    folder = given.work.resolve() / "-".join(map(str, (name, given.seed, given.epochs or EPOCHS[name], given.size)))
    folder.mkdir(parents=True, exist_ok=True)
    made = replace(made, folds=made.folds[: given.folds])
    runs = trained(made, content, given.data / name, given.epochs or EPOCHS[name], given, folder)
    shown = {number for fold in made.folds for number in fold.held_out}
    content, errors = restricted(content, shown), [error for error in errors if error["image_id"] in shown]
    detections: list[Values] = []
    for place, run in enumerate(runs):
        detections += _detections(run, folder / f"fold{place}_val.json")
    return [(content, errors, judged_by(content, detections))]


def _detections(checkpoint: Path, truth: Path) -> list[Values]:
    """COCO results of a run on its held-out images, which are not computed twice."""
    path = checkpoint.parent / "held_out.json"
    if not path.exists():
        detector, rows = load(checkpoint), []
        for image in json.loads(truth.read_text("utf-8"))["images"]:
            (found,) = detector.predict(image["file_name"], threshold=0.0)
            sizes = found.boxes[:, 2:] - found.boxes[:, :2]
            for score, label, box, size in zip(
                *(part.tolist() for part in (found.scores, found.labels, found.boxes, sizes))
            ):
                category = detector.category_ids[label]
                row = {"image_id": image["id"], "category_id": category, "bbox": [*box[:2], *size], "score": score}
                rows.append(row)
        write(path, json.dumps(rows))
    return json.loads(path.read_text("utf-8"))


def held_out(name: str, given: argparse.Namespace) -> list[tuple[Values, list[Values], dict[int, Judged]]]:
    """Held-out images of the proof suite, with errors planted there, judged by its detectors."""
    made = read_set(name, str(given.data / name), None)
    trials = []
    for path in sorted(given.proof.glob(f"{PROOF_NAMES[name]}-ours-[0-9]*/0/detections.json")):
        detections = json.loads(path.read_text("utf-8"))
        for seed in range(PLANTINGS):
            content, errors = planted(made.truth, seed)
            trials.append((content, errors, judged_by(content, detections)))
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the sets")
    parser.add_argument("--work", type=Path, help="folder for trainings, which is used again")
    parser.add_argument("--backbone", help="file with weights of tf_efficientnet_lite0")
    parser.add_argument(
        "--proof", type=Path, help="work folder of the proof suite: its detections instead of trainings"
    )
    parser.add_argument("--sets", nargs="+", default=list(EPOCHS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=FOLDS, help="judge the images of the first ones only")
    parser.add_argument("--epochs", type=int, help=f"of each training; otherwise {EPOCHS}")
    parser.add_argument("--size", type=int, default=160, help="height and width of the network's input")
    given = parser.parse_args()
    print("| set | images | N | trials | precision of the first N | any label | class | shifted | deleted | invented |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in given.sets:
        print(row_of(name, held_out(name, given) if given.proof else cross_fitted(name, given)), flush=True)


if __name__ == "__main__":
    main()
