"""One page about a sweep or any runs: `python -m detr_exp.report runs=<sweep, folders or ids>`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.runs.page import render
from detr_exp.runs.past import find, load_all
from detr_exp.terminal import say
from detr_exp.writing import write

USAGE = """\
Write one self-contained HTML page about runs: it can be mailed and opened offline.

  python -m detr_exp.report runs=outputs/sweeps/<sweep>
  python -m detr_exp.report runs=[outputs/<day>/<run>,outputs/<day>/<run>]

  runs     a sweep folder, run folders, ids of runs or of a sweep in MLflow; one or a list
  title    of the page
  root     folder that is searched for ids
"""


def report(cfg: DictConfig) -> None:
    """`report.html` in Hydra's output folder."""
    report_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def report_in(folder: Path, cfg: DictConfig) -> Path:
    """Write `report.html` into a folder, made if absent.

    Raises:
        ValueError: `cfg.runs` names something that is no run.
    """
    names = cast("str | list[str]", OmegaConf.to_container(cfg.runs) if OmegaConf.is_list(cfg.runs) else str(cfg.runs))
    runs = load_all(find(names, cfg.root), names)
    about = names if isinstance(names, str) else " ".join(map(str, names))
    title = cfg.title or (f"{len(runs)} runs" if len(runs) > 1 else runs[0].record.name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write(path, render(runs, title=title, about=about, now=datetime.now()))
    say(f"written to {path}")
    return path


def main() -> None:
    cli.main(report, "report", USAGE)


if __name__ == "__main__":
    main()
