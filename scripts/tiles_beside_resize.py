"""What tiles do for small objects of large images: one detector in tiles, on the resized image, and on all of it.

python scripts/tiles_beside_resize.py --data FOLDER_OF_SETS/bccd_coco --work FOLDER --backbone FILE [--seeds 1]

Large images are mosaics of small ones, each resized to 160 x 120 pixels; half of the images make those for training,
the other half those for evaluation. One network is trained on tiles as large as its input and evaluated in tiles, on
the mosaic resized to its input, and on the whole mosaic in one pass, at the resolution of the tiles. Two others are
trained and evaluated on resized mosaics, and on whole ones in one pass, with as many steps. Each evaluation is a
process with one image at a time, whose peak memory is in the table. What was finished is not repeated, an interrupted
training is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from detr_exp.contest.sets import ImageSet, read_set
from detr_exp.data.image import read_image
from detr_exp.trainer.checkpoint import NEWEST
from detr_exp.values import Values
from detr_exp.writing import write

SMALL, GRID, SIDE = (160, 120), (3, 2), 160  # width and height of an image, images across and down, tile and input
WHOLE = SMALL[0] * GRID[0], SMALL[1] * GRID[1]
LARGEST_SMALL = 32**2  # of COCO
QUERIES = 150
TILES = f"data.tiles={{size: {SIDE}, overlap: 0.2}}"
UNCUT = f"data.tiles={{size: {max(WHOLE)}}}"  # one tile, which is the image
FULL = f"[{-(-WHOLE[1] // 32) * 32},{-(-WHOLE[0] // 32) * 32}]"
TRAININGS: dict[str, Sequence[str]] = {  # of whole mosaics two are about as many pixels as eight tiles
    "tiles": (f"model.image_size=[{SIDE},{SIDE}]", "trainer.batch_size=8", TILES),
    "resized": (f"model.image_size=[{SIDE},{SIDE}]", "trainer.batch_size=8"),
    "full": (f"model.image_size={FULL}", "trainer.batch_size=2"),
}
ARMS: dict[str, tuple[str, Sequence[str]]] = {  # how it is evaluated: what it was trained on, and overrides
    "tiles": ("tiles", (TILES,)),
    "resized": ("tiles", (UNCUT,)),
    "one pass": ("tiles", (UNCUT, f"at.image_size={FULL}")),
    "resized, trained so": ("resized", ()),
    "one pass, trained so": ("full", ()),
}
OVERRIDES = (
    *("model=rtdetrv2_tiny", "model/backbone=timm", "model.backbone.name=tf_efficientnet_lite0"),
    *("model.class_prior=auto", f"model.num_queries={QUERIES}", "trainer.num_pictures=0", "tracker=none"),
    *("data/augment=flip", "data.augment.photometric=0.5", "optim.lr=4e-4", "optim/scheduler=cosine"),
    *("trainer/hardware=cpu", "trainer.hardware.threads=1", "trainer.hardware.amp=bf16", "data.num_workers=0"),
    *("data.cache=ram", "trainer.eval_interval=100000", "trainer.checkpoint_every_steps=100", "trainer.epochs=100000"),
    "trainer.progress_bar=none",
)


def write_mosaics(made: ImageSet, ids: Sequence[int], folder: Path, name: str) -> int:
    """Write mosaics of some images and their objects, `<name>.json`.

    Returns:
        how many of the objects are small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_id = {image["id"]: image for image in made.content["images"]}
    objects: defaultdict[int, list[Values]] = defaultdict(list)
    for one in made.content["annotations"]:
        objects[one["image_id"]].append(one)
    images, annotations, places = [], list[Values](), [(x, y) for y in range(GRID[1]) for x in range(GRID[0])]
    for number in range(len(ids) // len(places)):
        mosaic = Image.new("RGB", WHOLE)
        for (column, row), image_id in zip(places, ids[number * len(places) :]):
            image, corner = by_id[image_id], (column * SMALL[0], row * SMALL[1])
            part = Image.fromarray(read_image(Path(image["file_name"]))).resize(SMALL, Image.Resampling.LANCZOS)
            mosaic.paste(part, corner)
            scale = np.array([SMALL[0] / image["width"], SMALL[1] / image["height"]] * 2)
            for one in objects[image_id]:
                box = (np.array(one["bbox"]) * scale + [*corner, 0, 0]).tolist()
                known = {"id": len(annotations) + 1, "image_id": number, "category_id": one["category_id"]}
                annotations.append({**known, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        path = folder / f"{name}_{number:03d}.png"
        if not path.exists():
            write(path, lambda file, mosaic=mosaic: mosaic.save(file, "PNG"))
        images.append({"id": number, "file_name": path.name, "width": WHOLE[0], "height": WHOLE[1]})
    content = {"images": images, "annotations": annotations, "categories": made.content["categories"]}
    write(folder / f"{name}.json", json.dumps(content))
    return sum(one["area"] < LARGEST_SMALL for one in annotations)


def trained(folder: Path, kind: str, seed: int, given: argparse.Namespace) -> Path:
    """A run of one of the trainings."""
    run = folder / f"{kind}-{given.steps}-{seed}"
    if not (run / "done").exists():
        splits = [f"data.{split}.{key}" for split in ("train", "val") for key in ("annotations", "images")]
        words = [f"{key}={value}" for key, value in zip(splits, ("train.json", ".", "val.json", "."))]
        words += [*OVERRIDES, "data=coco", f"data.root={folder}", f"trainer.max_steps={given.steps}", f"seed={seed}"]
        words += [f"model.backbone.pretrained={given.backbone}", *TRAININGS[kind]]
        command = [sys.executable, "-m", "detr_exp.train", *words, "trainer.resume=auto", f"hydra.run.dir={run}"]
        subprocess.run(command, check=True)
        write(run / "done", "")
    return run


def evaluated(run: Path, name: str, words: Sequence[str]) -> Values:
    """The metrics of one way, and `gigabytes`, the peak memory of the process."""
    folder = run / "evaluations" / name.replace(", ", "_").replace(" ", "_")
    if not (folder / "cell.json").exists():
        command = [sys.executable, "-m", "detr_exp.evaluate", f"checkpoint={run / NEWEST}", "batch_size=1"]
        process = subprocess.Popen([*command, *words, f"hydra.run.dir={folder}"])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # waited for here
        if process.returncode:
            raise RuntimeError(f"the evaluation of {run} as {name} ended with {process.returncode}")
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        seconds = usage.ru_utime + usage.ru_stime
        write(
            folder / "cell.json", json.dumps({**metrics, "gigabytes": usage.ru_maxrss / 2**20, "cpu_seconds": seconds})
        )
    return json.loads((folder / "cell.json").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the set")
    parser.add_argument("--work", required=True, type=Path, help="folder for all that is made, which is used again")
    parser.add_argument("--backbone", required=True, help="file with weights of tf_efficientnet_lite0")
    parser.add_argument("--steps", type=int, default=500, help="of each training")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    folder = given.work.resolve()
    made = read_set("mosaics", str(given.data), 2)
    for name, ids in (("train", made.folds[0].train), ("val", made.folds[0].held_out)):
        small = write_mosaics(made, ids, folder, name)
    print(f"{small} small objects in the mosaics for evaluation, each {WHOLE[0]} x {WHOLE[1]} pixels\n", flush=True)
    print("| evaluated | mAP of small objects | of each seed | mAP | peak memory, GB | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for name, (kind, words) in ARMS.items():
        cells = [evaluated(trained(folder, kind, seed, given), name, words) for seed in range(given.seeds)]
        small_ap, ap, peak, spent = (
            np.mean([cell[key] for cell in cells]) for key in ("mAP_small", "mAP", "gigabytes", "cpu_seconds")
        )
        each = ", ".join(f"{cell['mAP_small']:.3f}" for cell in cells)
        print(f"| {name} | {small_ap:.3f} | {each} | {ap:.3f} | {peak:.2f} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
