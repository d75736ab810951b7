"""Evaluate a checkpoint: `python -m detr_exp.evaluate checkpoint=... [data.split=test] [data=... data.root=...]`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.stored import literal
from detr_exp.terminal import say
from detr_exp.writing import write

USAGE = """\
Evaluate a checkpoint by the COCO protocol. Network, classes and, unless told otherwise, data are the checkpoint's.

  python -m detr_exp.evaluate checkpoint=RUN_FOLDER                              its best weights, its validation split
  python -m detr_exp.evaluate checkpoint=weights.pth data.split=test             another split
  python -m detr_exp.evaluate checkpoint=RUN_FOLDER data=coco data.root=FOLDER   other data; classes are matched by name

  checkpoint         a file, the folder of a run (its best), or the id of a run, ours or MLflow's
  weights            ema or raw; null: those of the file
  data.split         val, train or test
  data, data.root    another data set, or another place of the same; also data.num_workers
  batch_size         null: as in training, which gives the same numbers to the last digit
  metric             pycocotools or fast; null: the checkpoint's
  trainer/hardware   auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets      packages of your own that the checkpoint's config names
"""

if TYPE_CHECKING:
    from detr_exp.detector import Detector


def evaluate(cfg: DictConfig) -> float:
    """One evaluation in Hydra's output folder; mAP of the boxes."""
    return evaluate_in(Path(HydraConfig.get().runtime.output_dir), cfg)["mAP"]


def evaluate_in(folder: Path, cfg: DictConfig) -> dict[str, float]:
    """Evaluate and write `metrics.json`, `classes.json` and pictures of curves and confusions into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/evaluate.yaml`.

    Returns:
        all metrics; see `metric.coco.CocoMetric.compute`.

    Raises:
        ValueError: checkpoint and data cannot be read or have nothing in common.
    """
    from detr_exp import build
    from detr_exp.detector import load, of_this_version
    from detr_exp.metric.charts import save_charts
    from detr_exp.trainer.console import Console
    from detr_exp.trainer.evaluation import evaluate as run_evaluation
    from detr_exp.trainer.evaluation import headline

    hardware = build.hardware(cfg) if OmegaConf.select(cfg, "trainer.hardware") is not None else None
    detector = load(
        cfg.checkpoint, hardware=hardware, allow_targets=cfg.allow_targets, weights=cfg.weights, compiled=True
    )
    told = combined(detector.cfg, cfg)
    with of_this_version(detector.path):
        data = build.data(told)
    metric = build.metric(told, data, detector.network, category_ids_by_name(detector, data))(cfg.data.split)
    loader = data.loader(
        cfg.data.split,
        network=detector.network,
        batch_size=cfg.batch_size or detector.batch_size,
        seed=told.seed,
    )
    console = Console("rich")
    with console.progress(f"evaluating {cfg.data.split}", len(loader)) as meter:
        found = run_evaluation(
            detector.network, loader, metric, detector.precision, on_batch=lambda batch, detections: meter()
        )
    plain = {name: value if math.isfinite(value) else None for name, value in found.items()}
    tables = {iou_type: metric.table(iou_type) for iou_type in metric.iou_types}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "metrics.json", json.dumps(plain, indent=1) + "\n")
    write(folder / "classes.json", json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
    save_charts(metric, folder)
    console.metrics(f"{detector.path}  {cfg.data.split}", headline(found))
    for iou_type, rows in tables.items():
        console.line(per_class(iou_type, rows))
    console.line(f"written to {folder}")
    return found


def combined(trained: DictConfig, cfg: DictConfig) -> DictConfig:
    """The config of the checkpoint with what the command line says about data and metric."""
    told = trained.copy()
    said = literal(OmegaConf.to_container(cfg.data, resolve=True))
    del said["split"]
    if "_target_" in said:
        told.data = said
    else:
        # the number of classes is that of the data, which may be others than those trained on
        given = {name: value for name, value in said.items() if value is not None}
        told.data = OmegaConf.merge(told.data, given, {"num_classes": None})
    if OmegaConf.select(cfg, "metric") is not None:
        told.metric = cfg.metric
    return told


def category_ids_by_name(detector: Detector, data: Any) -> list[int]:
    """The data set's category id for every label of the network, by the names of the classes.

    Labels that the data do not have get ids that do not occur; classes that the network does not know are left out
    of the evaluation, which is said.

    Raises:
        ValueError: no class has the same name.
    """
    if detector.classes == data.classes:
        return list(data.category_ids)
    id_of = {name.casefold(): number for name, number in zip(data.classes, data.category_ids)}
    shared = [name for name in detector.classes if name.casefold() in id_of]
    if not shared:
        raise ValueError(
            f"{detector.path} knows {_some(detector.classes)}, but the data set has {_some(data.classes)}: no name in "
            "common; evaluate data with the same classes: data=... data.root=..."
        )
    known = {name.casefold() for name in shared}
    unknown = [name for name in data.classes if name.casefold() not in known]
    say(f"classes are matched by name: {_some(shared)}" + (f"; left out: {_some(unknown)}" if unknown else ""))
    unused = max(data.category_ids) + 1
    return [id_of.get(name.casefold(), unused + label) for label, name in enumerate(detector.classes)]


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def per_class(iou_type: str, rows: Sequence[dict[str, Any]]) -> str:
    """A line per class that has objects: AP, and the threshold with its best F1."""
    width = max(len(row["class"]) for row in rows)
    lines = [f"{iou_type:<{width}}  objects     AP   AP50     F1  precision  recall  threshold"]
    for row in rows:
        if row["objects"]:
            lines.append(
                f"{row['class']:<{width}}  {row['objects']:>7}  {row['AP']:.3f}  {row['AP50']:.3f}  {row['f1']:.3f}"
                f"      {row['precision']:.3f}   {row['recall']:.3f}      {row['threshold']:.3f}"
            )
    return "\n".join(lines)


def main() -> None:
    cli.main(evaluate, "evaluate", USAGE)


if __name__ == "__main__":
    main()
