"""Evaluate a checkpoint: `python -m detr_exp.evaluate checkpoint=... [data.split=test] [data=... data.root=...]`."""

from __future__ import annotations

import math
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.inference.evaluation import evaluate_in

USAGE = """\
Evaluate a checkpoint with COCO's metrics. Network, classes and, by default, data are those of the checkpoint.

  python -m detr_exp.evaluate checkpoint=RUN_FOLDER                              best weights, validation split
  python -m detr_exp.evaluate checkpoint=weights.pth data.split=test             another split
  python -m detr_exp.evaluate checkpoint=RUN_FOLDER data=coco data.root=FOLDER   other data; classes are matched by name

  checkpoint         a file, a run folder (its best checkpoint) or a run id, also MLflow's
  weights            ema or raw; null: the weights of the file
  at                 at.layers=2 at.queries=100 at.image_size=[320,320]: a smaller member of the network, without
                     training; or at.name=..., of a point that detr_exp.pareto has found
  data.split         val, train or test; held_out: the half of val that has not chosen the checkpoint
  data, data.root    another data set, or its new folder; also data.num_workers
  data.fit           stretch, letterbox or short_side; null: as in training; likewise data.tiles, or whole
  batch_size         null: as in training, which gives exactly the same numbers
  metric             pycocotools or fast; null: the checkpoint's
  trainer/hardware   auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets      custom packages that the checkpoint's config may name
"""


def evaluate(cfg: DictConfig) -> float:
    """One evaluation in Hydra's output folder; the first of its values, mAP of the boxes with ours."""
    from detr_exp.trainer.evaluation import headline

    return next(iter(headline(evaluate_in(Path(HydraConfig.get().runtime.output_dir), cfg)).values()), math.nan)


def main() -> None:
    cli.main(evaluate, "evaluate", USAGE)


if __name__ == "__main__":
    main()
