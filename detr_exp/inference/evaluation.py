"""One evaluation of a checkpoint, with its files: for the command and for Python."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from detr_exp.values import measured
from detr_exp.writing import write

if TYPE_CHECKING:
    from detr_exp.inference.detector import Detector


def evaluate_in(folder: Path, cfg: DictConfig, detector: Detector | None = None) -> dict[str, float]:
    """Evaluate and write `metrics.json`, and as far as the metric has them `classes.json` and charts, into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/evaluate.yaml`.
        detector: to evaluate; None: that of `cfg.checkpoint`.

    Returns:
        all metrics that were measured; see `metric.coco.CocoMetric.compute`, or that of a custom metric. Of the half
        that has chosen the checkpoint, where there is one, those of the other half as `held_out/<name>` besides.

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
    from detr_exp.trainer.norms import reestimate

    detector = open_detector(cfg, compiled=True) if detector is None else detector
    if cfg.norm_batches:
        detector = replace(detector, network=deepcopy(detector.network))  # the given one stays as it is
    opened = on_data(detector, cfg)
    console = Console("rich")
    if cfg.norm_batches:
        reestimate(detector.network, opened.loader("train", cfg.batch_size), detector.precision, cfg.norm_batches)

    def evaluated(split: str) -> tuple[Metric, dict[str, float]]:
        metric, loader = opened.metric(split), opened.loader(split, cfg.batch_size)
        with console.progress(f"evaluating {split}", len(loader)) as meter:
            parts = opened.parts(split)
            values = opened.evaluate(loader, metric, on_batch=lambda batch, detections: meter(), parts=parts)
        console.metrics(f"{detector.title}  {split}", headline(values))
        for name in parts:
            own = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
            console.metrics(f"{detector.title}  {split}, images of {name}", own)
        return metric, values

    metric, values = evaluated(cfg.data.split)
    if cfg.data.split == "val" and opened.data.held_out is not None:
        console.line("val is the half of the validation images that has chosen this checkpoint; on the other half:")
        values |= {f"{HELD_OUT}/{name}": value for name, value in evaluated(HELD_OUT)[1].items()}
    values = measured(values)
    plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
    rows_of = {kind: metric.table(kind) for kind in metric.iou_types} if isinstance(metric, PerClass) else {}
    folder.mkdir(parents=True, exist_ok=True)
    member = {"member": detector.at} if detector.at else {}
    write(folder / "metrics.json", json.dumps(member | plain, indent=1) + "\n")
    if rows_of:
        write(folder / "classes.json", json.dumps(rows_of, indent=1, ensure_ascii=False) + "\n")
    if isinstance(metric, CocoEvaluation):
        save_charts(metric, folder)
    for iou_type, rows in rows_of.items():
        console.table(class_table(iou_type, rows))
    console.line(f"written to {folder}")
    return values
