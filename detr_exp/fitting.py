"""A training from Python, with the words of the command, and mistakes as exceptions."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from detr_exp.config.compose import composition, config_loader, refuse_unready
from detr_exp.config.mistakes import ConfigError
from detr_exp.folder import remove_empty_folders
from detr_exp.signals import Interrupted
from detr_exp.trained import Detector, load, new_folder, words_of
from detr_exp.values import Values, measured

if TYPE_CHECKING:
    import pandas as pd

LOGGING: Values = {"version": 1, "disable_existing_loggers": False}  # of ranks: as in the process that starts them


@dataclass(frozen=True)
class Fitted:
    """A finished training.

    Attributes:
        folder: of the run, as the command writes it.
        metrics: of the best checkpoint on the validation split, by plain names (`mAP`, `AP/<class>`); those of other
            splits with the split before them (`test/mAP`). What could not be measured is absent.
    """

    folder: Path
    metrics: dict[str, float] = field(repr=False)

    @cached_property
    def detector(self) -> Detector:
        """The best checkpoint, on the device of the training; opened when it is first asked for."""
        return load(self.folder)

    def to_pandas(self) -> pd.DataFrame:
        """The lines of `metrics.jsonl`: a row per logged step, a column per metric."""
        import pandas as pd

        from detr_exp.runs.past import PastRun

        return pd.DataFrame(PastRun.load(self.folder).lines)


def fit(
    overrides: Sequence[str] = (), *, folder: str | Path | None = None, config_dir: str | Path | None = None
) -> Fitted:
    """Train, as `python -m detr_exp.train` does.

    May be called several times, in any thread, and in notebooks. Signals are handled as by the command while it runs in
    the main thread, and as before afterwards.

    Args:
        overrides: as on the command line: `["model=rtdetrv2", "data=auto", f"data.root={root}"]`.
        folder: of the run; None: a new one in `outputs/<day>/`.
        config_dir: a folder with user-defined groups and options, structured like `conf/`.

    Raises:
        ValueError: a mistake in the settings or the data, with the override that mends it.
        RuntimeError: the training failed.
        KeyboardInterrupt: the run was interrupted and has saved its state; go on by `trainer.resume=auto`.
        Interrupted: likewise, by another signal.
    """
    started = time.time()
    from detr_exp import launch
    from detr_exp.config.published import refuse_absent_weights

    words, folder = words_of(overrides, folder)
    composed = composition(config_loader(config_dir), "config", words)
    if (sweep := composed.choices.get("sweep")) is not None:
        raise ConfigError(
            f"sweep={sweep} defines several runs, and fit() trains one; use the command: python -m detr_exp.train "
            f"sweep={sweep}"
        )
    refuse_unready(composed.cfg)
    refuse_absent_weights(composed.cfg)
    choices = {group: option for group, option in composed.choices.items() if option and "hydra/" not in group}
    made = new_folder(Path("outputs"), f"-{choices['model']}-{choices['data']}") if folder is None else folder
    from detr_exp import build
    from detr_exp.trainer import distributed
    from detr_exp.trainer.origin import origin

    try:
        if distributed.started_as_rank():
            raise ConfigError(
                "torchrun has started this process, and fit() starts its ranks itself; use python instead of torchrun, "
                "and trainer.hardware.devices=auto"
            )
        found = origin(composed.cfg.trainer.resume, made, build.plain(composed.cfg)).folder
        launch.train(made, composed.cfg, choices, words, LOGGING)
    except Interrupted as error:
        if error.number != signal.SIGINT:
            raise
        raise KeyboardInterrupt(f"{error}; {found} is saved: trainer.resume=auto") from error
    finally:
        remove_empty_folders(made, started)
    return Fitted(found, _metrics_of(found))


def _metrics_of(folder: Path) -> dict[str, float]:
    """See `Fitted.metrics`."""
    from detr_exp.data.splits import HELD_OUT
    from detr_exp.runs.past import PastRun
    from detr_exp.trainer import checkpoint as files

    state = files.load(folder / files.BEST_TOTAL)
    beside = {f"{HELD_OUT}/{name}": value for name, value in state.get(HELD_OUT, {}).items()}
    for line in PastRun.load(folder).lines:
        beside |= {name: value for name, value in line.items() if name.startswith("test/")}
    return measured(state.get("metrics", {}) | beside)
