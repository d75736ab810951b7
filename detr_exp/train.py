"""Train a detector: `python -m detr_exp.train [group=option ...] [key=value ...]`; `--help` lists the groups."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli, launch
from detr_exp.folder import hydra_files
from detr_exp.values import values_of

USAGE = """\
Train detection transformers: RT-DETR, RT-DETRv2, D-FINE, DEIM, DEIMv2, EdgeCrafter, LW-DETR, RF-DETR.

  python -m detr_exp.train [group=option ...] [key=value ...]

Groups and their options:

{groups}

Examples:

  python -m detr_exp.train                                              a small network on synthetic shapes
  python -m detr_exp.train model=rtdetrv2 data=auto data.root=my_data   your data (COCO, YOLO or VOC)
  python -m detr_exp.train experiment=rtdetrv2_r18vd_120e_coco data.root=...   a published recipe
  python -m detr_exp.train loss=focal loss.focal_gamma=1.5 trainer.epochs=50   options and values
  python -m detr_exp.train --multirun loss=focal,vfl optim.lr=1e-4,2e-4        a sweep: every combination

All keys and their values:   --cfg job --resolve   (one group: -p loss); their meaning: comments in conf/
Custom groups and options:   --config-dir FOLDER   (laid out like conf/)
"""


def train(cfg: DictConfig) -> float | None:
    """One training in Hydra's output folder; the best value of `trainer.monitor`, for a sweeper."""
    job = HydraConfig.get()
    choices = {group: option for group, option in job.runtime.choices.items() if option and "hydra/" not in group}
    folder, overrides = Path(job.runtime.output_dir), OmegaConf.to_container(job.overrides.task, resolve=False)
    log = values_of(job.job_logging)
    return launch.train(folder, cfg, choices, cast(list[str], overrides), log, hydra_files(cfg))


def main() -> None:
    if launch.is_follower():
        launch.follow()
    else:
        cli.main(train, "config", USAGE)
        launch.release_followers()


if __name__ == "__main__":
    main()
