"""Evaluate a checkpoint: `python -m detr_exp.evaluate checkpoint=... [data.split=test] [data=... data.root=...]`."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.writing import write

USAGE = """\
Evaluate a checkpoint with COCO's metrics. Network, classes and, by default, data are those of the checkpoint.

  python -m detr_exp.evaluate checkpoint=RUN_FOLDER                              best weights, validation split
  python -m detr_exp.evaluate checkpoint=weights.pth data.split=test             another split
  python -m detr_exp.evaluate checkpoint=RUN_FOLDER data=coco data.root=FOLDER   other data; classes are matched by name

  checkpoint         a file, a run folder (its best checkpoint) or a run id, also MLflow's
  weights            ema or raw; null: the weights of the file
  data.split         val, train or test; held_out: the half of val that has not chosen the checkpoint
  data, data.root    another data set, or its new folder; also data.num_workers
  batch_size         null: as in training, which gives exactly the same numbers
  metric             pycocotools or fast; null: the checkpoint's
  trainer/hardware   auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets      custom packages that the checkpoint's config may name
"""


def evaluate(cfg: DictConfig) -> float:
    """One evaluation in Hydra's output folder; the first of its values, mAP of the boxes with ours."""
    from detr_exp.trainer.evaluation import headline

    return next(iter(headline(evaluate_in(Path(HydraConfig.get().runtime.output_dir), cfg)).values()), math.nan)


def evaluate_in(folder: Path, cfg: DictConfig) -> dict[str, float]:
    """Evaluate and write `metrics.json`, and as far as the metric has them `classes.json` and charts, into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/evaluate.yaml`.

    Returns:
        all metrics; see `metric.coco.CocoMetric.compute`, or that of a custom metric. Of the half that has chosen the
        checkpoint, where there is one, those of the other half as `held_out/<name>` besides.

    Raises:
        ValueError: checkpoint or data cannot be read, or they have no class in common.
    """
    from detr_exp.data.splits import HELD_OUT
    from detr_exp.inference.on_data import on_data, open_detector
    from detr_exp.metric.backend import CocoEvaluation
    from detr_exp.metric.charts import save_charts
    from detr_exp.protocols import Metric, PerClass
    from detr_exp.trainer.console import Console, class_table
    from detr_exp.trainer.evaluation import headline

    detector = open_detector(cfg, compiled=True)
    opened = on_data(detector, cfg)
    console = Console("rich")

    def evaluated(split: str) -> tuple[Metric, dict[str, float]]:
        metric, loader = opened.metric(split), opened.loader(split, cfg.batch_size)
        with console.progress(f"evaluating {split}", len(loader)) as meter:
            values = opened.evaluate(loader, metric, on_batch=lambda batch, detections: meter())
        console.metrics(f"{detector.path}  {split}", headline(values))
        return metric, values

    metric, values = evaluated(cfg.data.split)
    if cfg.data.split == "val" and opened.data.held_out is not None:
        console.line("val is the half of the validation images that has chosen this checkpoint; on the other half:")
        values |= {f"{HELD_OUT}/{name}": value for name, value in evaluated(HELD_OUT)[1].items()}
    plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
    rows_of = {kind: metric.table(kind) for kind in metric.iou_types} if isinstance(metric, PerClass) else {}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "metrics.json", json.dumps(plain, indent=1) + "\n")
    if rows_of:
        write(folder / "classes.json", json.dumps(rows_of, indent=1, ensure_ascii=False) + "\n")
    if isinstance(metric, CocoEvaluation):
        save_charts(metric, folder)
    for iou_type, rows in rows_of.items():
        console.table(class_table(iou_type, rows))
    console.line(f"written to {folder}")
    return values


def main() -> None:
    cli.main(evaluate, "evaluate", USAGE)


if __name__ == "__main__":
    main()
