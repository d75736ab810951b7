"""A contender of the proof suite: this project, as its commands train and predict."""

from __future__ import annotations

from pathlib import Path

from detr_exp import build
from detr_exp.contest.job import Facts, Job, cpu_seconds, run
from detr_exp.inference.detector import load
from detr_exp.trainer.checkpoint import NEWEST
from detr_exp.trainer.checkpoint import load as load_state
from detr_exp.training import train_in
from detr_exp.values import Values


def contend(job: Job) -> tuple[list[Values], Facts]:
    """Train with the overrides of the options, and predict with the averaged weights of the last step."""
    folder = Path(job.folder) / "run"
    cfg = build.compose(_overrides(job))
    before = cpu_seconds()
    train_in(folder, cfg)
    spent = cpu_seconds() - before
    detector = load(folder / NEWEST)
    found: list[Values] = []
    for image, path in job.images("held_out"):
        (detections,) = detector.predict(path, threshold=0.0)
        boxes = detections.boxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        for score, label, box in zip(detections.scores.tolist(), detections.labels.tolist(), boxes.tolist()):
            category = detector.category_ids[label]
            found.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    parameters = sum(one.numel() for one in detector.network.parameters())
    return found, Facts(spent, load_state(folder / NEWEST)["step"], parameters)


def _overrides(job: Job) -> list[str]:
    share = job.options.get("stop_share")
    return [
        "data=coco",
        *job.options["overrides"],
        *([f"model.backbone.pretrained={job.weights}"] if job.weights else []),
        f"data.root={job.root}",
        f"model.image_size=[{job.resolution},{job.resolution}]",
        f"trainer.batch_size={job.batch_size}",
        f"trainer.epochs={job.epochs}",
        *([] if share is None else [f"data.stop_epoch={round(share * job.epochs)}"]),
        f"trainer.eval_interval={job.epochs}",
        f"seed={job.seed}",
        *("data.num_workers=0", "data.cache=ram", "trainer/hardware=cpu", "trainer.hardware.threads=1"),
        *("tracker=none", "trainer.num_pictures=0", "trainer.progress_bar=none"),
    ]


if __name__ == "__main__":
    run(contend)
