"""Train a detector: `python -m detr_exp.train [group=option ...] [key=value ...]`; `--help` lists the groups."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli


def train(cfg: DictConfig) -> float | None:
    """One training in Hydra's output folder.

    Returns:
        the best value of `trainer.monitor`, for a sweeper; None if nothing was evaluated.
    """
    from detr_exp import build  # loads torch, which --help and mistakes do not wait for

    job = HydraConfig.get().runtime
    return build.train(cfg, Path(job.output_dir), dict(job.choices))


def main() -> None:
    cli.main(train, "config")


if __name__ == "__main__":
    main()
