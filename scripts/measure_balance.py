"""What balancing does for rare classes: a skewed copy of a set, and trainings with and without each setting.

python scripts/measure_balance.py --data FOLDER_OF_SETS/cards_voc --work FOLDER --backbone FILE [--seeds 3]

Of the training images that show a rare class only a few stay; validation images stay as they are. All trainings take
the same number of steps from the same weights. Finished trainings are not repeated, an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from detr_exp import build
from detr_exp.data.halves import shown_by
from detr_exp.data.part import restricted
from detr_exp.runs.past import CLASSES
from detr_exp.writing import write

VARIANTS = {
    "plain": (),
    "repeats": ("data.repeat_threshold=0.2",),
    "more repeats": ("data.repeat_threshold=1.0",),
    "weights": ("loss.class_weights=auto",),
    "both": ("data.repeat_threshold=0.2", "loss.class_weights=auto"),
}
OVERRIDES = (
    *("model=rtdetrv2_tiny", "model/backbone=timm", "model.backbone.name=tf_efficientnet_lite0"),
    *("model.class_prior=auto", "model.image_size=[160,160]", "data/augment=flip", "data.augment.photometric=0.5"),
    *("optim.lr=4e-4", "optim/scheduler=cosine", "trainer.batch_size=8", "trainer.num_pictures=0", "tracker=none"),
    *("trainer/hardware=cpu", "trainer.hardware.threads=1", "trainer.hardware.amp=bf16", "trainer.progress_bar=none"),
    *("data.num_workers=0", "data.cache=ram", "trainer.eval_interval=1000", "trainer.checkpoint_every_steps=50"),
)


def write_skewed(root: Path, rare: set[str], kept: int, folder: Path) -> None:
    """Write the annotations of the skewed copy, whose images stay where they are."""
    data = build.data(build.compose(["data=auto", f"data.root={json.dumps(str(root))}"]))
    number_of = dict(zip(data.classes, data.category_ids))
    if unknown := rare - number_of.keys():
        raise ValueError(f"--rare has {sorted(unknown)}, but the classes are {data.classes}; choose some of these")
    counts = dict.fromkeys((number_of[name] for name in rare), 0)
    chosen = []
    for image_id, shown in zip(data.train.image_ids, shown_by(data.train)):
        if all(counts[number] < kept for number in shown & counts.keys()):
            chosen.append(image_id)
            for number in shown & counts.keys():
                counts[number] += 1
    for name, truth in (("train", restricted(data.train.truth(), chosen)), ("val", data.split("val").truth())):
        write(folder / f"{name}.json", json.dumps(truth))


def trained(run: Path, root: Path, folder: Path, words: list[str]) -> dict[str, float]:
    """AP of each class after a training, which is not repeated."""
    if not (run / "done").exists():
        splits = [f"data.{name}.{key}" for name in ("train", "val") for key in ("annotations", "images")]
        places = ["train.json", ".", "val.json", "."]
        source = ["data=coco", f"data.root={folder}", f"data.source.extra_roots=[{root.resolve()}]"]
        source += [f"{key}={value}" for key, value in zip(splits, places)]
        command = [sys.executable, "-m", "detr_exp.train", *OVERRIDES, *source, *words, "trainer.resume=auto"]
        subprocess.run([*command, f"hydra.run.dir={run}"], check=True)
        write(run / "done", "")
    table = json.loads((run / CLASSES).read_text("utf-8"))["bbox"]
    return {row["class"]: row["AP"] for row in table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the set")
    parser.add_argument("--work", required=True, type=Path, help="folder for trainings, which is used again")
    parser.add_argument("--backbone", required=True, help="file with weights of tf_efficientnet_lite0")
    parser.add_argument("--rare", nargs="+", default=["ten", "queen"], help="classes that become rare")
    parser.add_argument("--kept", type=int, default=6, help="training images that show each of them")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    folder = given.work.resolve() / f"{'-'.join(sorted(given.rare))}-{given.kept}-{given.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    write_skewed(given.data, set(given.rare), given.kept, folder)
    print("| trained with | seeds | AP, rare classes | AP, other classes |\n|---|---|---|---|")
    for name, words in VARIANTS.items():
        rows = []
        for seed in range(given.seeds):
            length = [f"trainer.max_steps={given.steps}", "trainer.epochs=1000", f"seed={seed}"]
            words_of_run = [*words, *length, f"model.backbone.pretrained={given.backbone}"]
            found = trained(folder / f"{name.replace(' ', '_')}-{seed}", given.data, folder, words_of_run)
            rows.append(
                [np.mean([ap for c, ap in found.items() if (c in given.rare) == rare]) for rare in (True, False)]
            )
        means, spread = np.mean(rows, 0), np.std(rows, 0)
        cells = " | ".join(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in zip(means, spread))
        print(f"| {name} | {given.seeds} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
