"""`model.weights=published`: the published weights of the chosen options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from detr_exp.config.mistakes import ConfigError

PUBLISHED = "published"


def settle_published(cfg: DictConfig, choices: Mapping[str, str | None]) -> None:
    """Put the name of the weights in the place of `published`, so that what is kept of a run names them.

    Args:
        cfg: changed in place.
        choices: group -> option.

    Raises:
        ConfigError: nothing is published for them, or several files are.
    """
    if OmegaConf.select(cfg, "model.weights") == PUBLISHED and not Path(PUBLISHED).exists():
        from detr_exp.published.table import of_choices  # what most commands do without costs them no time

        try:
            cfg.model.weights = of_choices(choices).name
        except ValueError as error:
            raise ConfigError(str(error)) from None


def refuse_absent_weights(cfg: DictConfig) -> None:
    """Refuse weights that cannot be had, before torch is loaded and data are read.

    Raises:
        ValueError: they are not on this machine, and there is no network.
    """
    is_new = OmegaConf.select(cfg, "trainer.resume") is None  # else the checkpoint has all weights
    for key, kind in (("model.weights", "detector"), ("teacher.checkpoint", None)):
        word = OmegaConf.select(cfg, key)
        if (is_new or kind is None) and isinstance(word, str) and not Path(word).expanduser().exists():
            from detr_exp.published.fetch import refuse_out_of_reach

            refuse_out_of_reach(word, kind)
