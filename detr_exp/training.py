"""One training in a folder: from a config to a finished, recorded run."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from detr_exp.config.published import settle_published
from detr_exp.folder import exclusive_access, start_writing
from detr_exp.signals import Interrupted
from detr_exp.terminal import say
from detr_exp.trainer.run_status import status_of
from detr_exp.writing import remove_left_overs, write

if TYPE_CHECKING:
    from detr_exp.trainer.hardware import Hardware
    from detr_exp.trainer.state import Run


def train_in(
    folder: Path,
    cfg: DictConfig,
    *,
    choices: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    hydra_files: Mapping[str, str] | None = None,
) -> float | None:
    """Run one training in a folder; all ranks call this, and only rank 0 writes.

    Args:
        folder: for `config.yaml`, `metrics.jsonl`, checkpoints and figures; created if it does not exist.
        cfg: the config; read-only from here on.
        choices: the chosen option of every group, for the tracker.
        overrides: of the command line, for the tracker.
        hydra_files: files for the folder's `.hydra`: name -> content.

    Returns:
        the best value of `trainer.monitor`; None if there was no evaluation.

    Raises:
        ValueError: parts do not fit together, or the folder belongs to another run; it was not changed.
    """
    from detr_exp import build  # imports torch, which is not needed for --help and config errors
    from detr_exp.trainer import checkpoint as files
    from detr_exp.trainer.distributed import NullTracker, first_rank_first, keep_folder, on_first_rank, rank
    from detr_exp.trainer.origin import origin

    settle_published(cfg, choices or {})
    start = on_first_rank(origin, cfg.trainer.resume, folder, build.plain(cfg))
    if start.folder != folder:
        on_first_rank(_move, folder, start.folder)
    elif rank() == 0 and cfg.trainer.resume == "auto" and start.record is None:
        say("trainer.resume=auto found no unfinished run with this config; this one is new")
    folder = start.folder
    on_first_rank(keep_folder, folder)
    if cfg.seed is None:
        with open_dict(cfg):
            cfg.seed = on_first_rank(random.SystemRandom().randrange, 2**31) if start.seed is None else start.seed
    OmegaConf.set_readonly(cfg, True)
    with exclusive_access(folder) if rank() == 0 else nullcontext():
        _seed_everything(cfg.seed)
        trainer = build.trainer(cfg)
        with first_rank_first():
            run = build.run(cfg, folder, identity=start.identity, resume_from=start.checkpoint)
        if rank() > 0:
            run.tracker = NullTracker()
        state = trainer.start(run)
        on_first_rank(remove_left_overs, folder)
        on_first_rank(start_writing, folder, hydra_files or {})
        on_first_rank(write, folder / "config.yaml", yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
        run.tracker.start(
            run_dir=folder,
            config=run.config,
            choices=choices,
            overrides=overrides,
            tags=_tags(run, trainer.settings.hardware),
            resumed=start.record is not None,
        )
        if start.record is not None or start.checkpoint is not None:
            run.tracker.rewind(state.step, state.logged_lines)
        try:
            best = trainer.fit(run, state)
            run.tracker.checkpoint(folder / files.BEST_TOTAL)
        except BaseException as error:
            with suppress(OSError):  # if a full disk ended the run
                run.tracker.finish(status_of(error), str(error))
            if isinstance(error, Interrupted) and rank() == 0:
                saved = (folder / files.NEWEST).exists()
                say(
                    f"saved in {folder}; the same command with trainer.resume=auto goes on"
                    if saved
                    else f"ended before the first step; {folder} holds nothing to go on from"
                )
            raise
        run.tracker.finish()
    return best


def _tags(run: Run, hardware: Hardware) -> dict[str, str]:
    """Tags to search runs by."""
    from detr_exp.runs.next_commands import IMAGE_TAG
    from detr_exp.start import tags as start_tags
    from detr_exp.trainer.origin import IDENTITY_TAG
    from detr_exp.trainer.summary import example_image

    tags = {
        IDENTITY_TAG: run.identity,
        "data.fingerprint": run.data.fingerprint,
        "seed": str(run.seed),
        "hardware": hardware.describe(),
        "parameters": str(sum(parameter.numel() for parameter in run.network.parameters())),
    }
    if (image := example_image(run)) is not None:
        tags[IMAGE_TAG] = image
    if run.teaching is not None:
        record = run.teaching.teacher.record
        tags |= {"teacher": record["teacher"]} | ({"teacher.sha256": record["sha256"]} if "sha256" in record else {})
    return tags | start_tags(run.start) | ({} if run.resume_from is None else {"resumed.from": str(run.resume_from)})


def _move(made: Path, home: Path) -> None:
    """Report that a run resumes in the folder `home`, and remove the empty folder `made` that Hydra created."""
    say(f"resuming in {home}")
    with suppress(OSError):  # it is not empty
        made.rmdir()


def _seed_everything(seed: int) -> None:
    """Seed random numbers outside of training steps, such as initial weights."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
