"""A contender of the proof suite: `rfdetr`, trained and used as its documentation does.

Without `weights` its DINOv2 starts at random: its own weights are on the network. Then the file of its best epoch is
used; the only epoch that is evaluated is the last, on a few training images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rfdetr
import torch
from rfdetr.models.backbone import dinov2

from detr_exp.contest.job import Facts, Job, cpu_seconds, run
from detr_exp.values import Values

BEST, LAST = "checkpoint_best_total.pth", "last.ckpt"


def contend(job: Job) -> tuple[list[Values], Facts]:
    """Train and predict; `options` has `network` (name of its class) and `training` (for its `train`)."""
    from pytorch_lightning import seed_everything  # of the extra

    torch.set_num_threads(1)
    seed_everything(job.seed)
    if job.weights is None:
        backbone: Any = dinov2.WindowedDinov2WithRegistersBackbone
        backbone.from_pretrained = _at_random
    output = Path(job.folder) / "run"
    size: Values = {"resolution": job.resolution, "device": "cpu"}
    make = getattr(rfdetr, job.options["network"])
    detector = make(pretrain_weights=job.weights, **size)
    before = cpu_seconds()
    detector.train(
        dataset_dir=job.root,
        output_dir=str(output),
        epochs=job.epochs,
        batch_size=job.batch_size,
        eval_interval=job.epochs,
        seed=job.seed,
        num_workers=0,
        tensorboard=False,
        progress_bar=None,
        device="cpu",
        **job.options["training"],
    )
    spent = cpu_seconds() - before
    steps = torch.load(output / LAST, map_location="cpu", weights_only=False)["global_step"]  # written just now
    trained = make(pretrain_weights=str(output / BEST), **size)
    parameters = sum(one.numel() for one in detector.model.model.parameters())
    return _predictions(job, trained), Facts(spent, steps, parameters)


def _at_random(name: str, config: Any) -> Any:
    return dinov2.WindowedDinov2WithRegistersBackbone(config)


def _predictions(job: Job, detector: Any) -> list[Values]:
    number_of = {category["name"]: category["id"] for category in job.content("train")["categories"]}
    found: list[Values] = []
    for image, path in job.images("held_out"):
        best = detector.predict(str(path), threshold=0.0, include_source_image=False)
        rows = zip(best.xyxy.tolist(), best.confidence.tolist(), best.data["class_name"].tolist())
        for (x0, y0, x1, y1), score, name in rows:
            if name in number_of:  # it has one logit more than there are classes
                box = [x0, y0, x1 - x0, y1 - y0]
                found.append({"image_id": image["id"], "category_id": number_of[name], "bbox": box, "score": score})
    return found


if __name__ == "__main__":
    run(contend)
