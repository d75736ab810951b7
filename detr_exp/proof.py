"""Train several programs on several sets with one budget, and compare: `python -m detr_exp.proof`."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.contest.cells import Contender, finished, in_order, make, refuse_mixed
from detr_exp.contest.page import render
from detr_exp.contest.sets import read_set
from detr_exp.folder import exclusive_access
from detr_exp.terminal import say
from detr_exp.values import Values, values_of
from detr_exp.writing import write

USAGE = """\
Train detectors of this project and of others on the same images with the same CPU time, and compare them.

  python -m detr_exp.proof                            all cells (set x contender x seed) that are not finished
  python -m detr_exp.proof only=[cats,ours]           only these sets and contenders
  python -m detr_exp.proof train=false                only write the page of the finished cells
  python -m detr_exp.proof +sets.mine.root=my_data    also these images (COCO, YOLO or VOC); +sets.mine.folds=5

A finished cell is a JSON file in `results` and is not trained again. A stopped suite resumes with the same command.
pip install -e '.[proof]' installs the other programs.

  data, sets         folder of the sets; root, folds (null) and batch_size (8) of each
  contenders         programs, their options and initial weights
  seeds, budget      seeds of each contender, and seconds of CPU time of each training
  epochs             of each training, in place of those that fit the budget
  reference          contender that the others are compared with
  results, work      folders of finished cells, and of everything else
  page               Markdown file to write
  minutes            of CPU time after which no further cell is started
  may_differ         conditions (cpu, versions, ...) in which cells may differ
"""

BATCH_SIZE = 8


def proof(cfg: DictConfig) -> None:
    """Make the missing cells, and write the page.

    Raises:
        ValueError: a set cannot be read, a program failed, or cells do not belong together.
    """
    values = values_of(cfg)
    results = Path(values["results"])
    results.mkdir(parents=True, exist_ok=True)
    if values["train"]:
        with exclusive_access(Path(values["work"])):
            _train(values, results)
    cells = finished(results)
    refuse_mixed(cells, values["may_differ"])
    write(Path(values["page"]), render(cells, values))
    say(f"{len(cells)} cells; written to {values['page']}")


def _train(values: Values, results: Path) -> None:
    chosen = {name: values["sets"][name] for name in _chosen(values, "sets")}
    sets = [read_set(name, one["root"], one.get("folds")) for name, one in chosen.items()]
    contenders = [Contender(name=name, **values["contenders"][name]) for name in _chosen(values, "contenders")]
    settings = {name: values[name] for name in ("budget", "epochs", "resolution", "resamples")}
    settings["batch_size"] = {name: one.get("batch_size", BATCH_SIZE) for name, one in chosen.items()}
    spent = 0.0
    cells = list(in_order(sets, contenders, values["seeds"], settings))
    known = finished(results)
    missing = [cell for cell in cells if not (results / f"{cell.name}.json").exists()]
    planned = [_planned(cell.data.name, cell.contender.name, cell.conditions) for cell in missing]
    refuse_mixed([*known, *planned], values["may_differ"])
    for cell in missing:
        if values["minutes"] is not None and spent >= 60 * values["minutes"]:
            say(f"{spent / 60:.0f} minutes of CPU time are used up; the same command resumes")
            return
        made = make(cell, finished(results), Path(values["work"]))
        write(results / f"{cell.name}.json", json.dumps(made) + "\n")
        spent += made["cpu_seconds"]
        say(f"{cell.name}: mAP {made['mAP']:.4f}, {made['epochs']} epochs, {made['cpu_seconds'] / 60:.1f} CPU minutes")


def _planned(data: str, contender: str, conditions: Values) -> Values:
    return {"set": data, "contender": contender, "conditions": conditions, "file": "this command"}


def _chosen(values: Values, kind: str) -> list[str]:
    """The names of sets or contenders that `only` leaves."""
    only = values["only"] or []
    unknown = [name for name in only if name not in values["sets"] and name not in values["contenders"]]
    if unknown:
        known = ", ".join([*values["sets"], *values["contenders"]])
        raise ValueError(f"only names {', '.join(unknown)}; there are {known}: only=[{next(iter(values['sets']))}]")
    return [name for name in values[kind] if name in only] or list(values[kind])


def main() -> None:
    cli.main_without_folder(proof, "proof", USAGE)


if __name__ == "__main__":
    main()
