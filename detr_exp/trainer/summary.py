"""What a run prints at its start and at its end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from detr_exp.data.content import SPLITS
from detr_exp.data.fit import sizes_of
from detr_exp.data.joined import tables_of
from detr_exp.data.splits import HELD_OUT
from detr_exp.published.table import named
from detr_exp.runs.next_commands import next_commands
from detr_exp.runs.past import CLASSES
from detr_exp.terminal import counted, duration, python
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import distributed
from detr_exp.trainer.console import Console, class_table, metric_fields, number
from detr_exp.trainer.due import is_within_epoch
from detr_exp.trainer.evaluation import headline
from detr_exp.trainer.pace import Pace
from detr_exp.trainer.results import FILE as RESULTS
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import Run, State
from detr_exp.values import Values

PLACES = {  # name -> file or folder in that of the run
    "checkpoint": files.BEST_TOTAL,
    "results": RESULTS,
    "metrics": "metrics.jsonl",
    "classes": CLASSES,
    "figures": "charts",
    "predictions": "predictions",
    "most errors": "worst",
}
MOST_CLASSES = 30


def print_start(console: Console, settings: Settings, run: Run, state: State) -> None:
    """Print the network, the data, the device and the length of the run."""
    parameters = sum(p.numel() for p in state.network.parameters())
    beside = 0 if run.teaching is None else sum(p.numel() for p in run.teaching.parameters)
    trained = sum(p.numel() for p in state.parameters) - beside
    shown = ", ".join(f"{height} x {width}" for height, width in sizes_of(state.network) or [state.network.image_size])
    ranks = distributed.world_size()
    splits = [(name, getattr(run.data, name)) for name in (*SPLITS, HELD_OUT)]
    sizes = ", ".join(f"{len(split)} {name}" for name, split in splits if split is not None)
    names = ", ".join(run.data.classes[:8]) + (", ..." if len(run.data.classes) > 8 else "")
    console.summary(
        f"training {run.config['model']['_target_'].rpartition('.')[2]}",
        {
            "network": f"{parameters:,} parameters ({trained:,} trained), {shown} px",
            "start": _start(run),
            **({} if run.teaching is None else {"teacher": _teacher(run.teaching.teacher.record, beside)}),
            "data": f"{run.data.content.origin}: {sizes} images",
            "classes": f"{run.data.num_classes}: {names}",
            "device": settings.hardware.describe(),
            "batch": f"{counted(state.batch_size * state.grad_accum_steps * ranks, 'image')} a step "
            f"({state.batch_size} x {state.grad_accum_steps} accumulated{f' x {ranks} ranks' if ranks > 1 else ''})",
            "length": f"{counted(settings.epochs, 'epoch')}, {counted(state.total_steps, 'step')}, seed {run.seed}",
            "folder": str(run.output_dir),
        },
    )


def print_epoch(
    console: Console, settings: Settings, state: State, pace: Pace, found: Mapping[str, dict[str, float]]
) -> None:
    """Print a line about an epoch: loss, validation loss and metrics if evaluated, rate, speed, memory, time left.

    Args:
        found: `ema`, `raw` or both -> their metrics on the validation split; a further line each if there are both.
    """
    count = len(str(settings.epochs))
    loss = [f"loss {means['loss']:.4f}"] if (means := pace.means()) else []
    metrics = metric_fields(_shown(next(iter(found.values())))) if len(found) == 1 else []
    left = [f"{duration(pace.seconds_left)} left"] if state.step < state.total_steps else []
    title = f"epoch {state.epoch_number:>{count}}/{settings.epochs}"
    if is_within_epoch(settings, state):
        title += f", step {state.step}"
    console.fields(title, [*loss, *metrics, *pace.resources(), *left])
    for which, values in found.items() if len(found) > 1 else ():
        console.metrics(f"  {which:>3} weights", _shown(values))


def _shown(values: dict[str, float]) -> dict[str, float]:
    """The main metrics, after the validation loss if it was computed."""
    loss = {"val loss": values["loss"]} if "loss" in values else {}
    return loss | {name: value for name, value in headline(values).items() if name != "loss"}


def _start(run: Run) -> str:
    """What the weights are that training begins with."""
    if run.resume_from is not None:
        return f"the checkpoint {run.resume_from}"
    if run.start is None:
        return "random weights"
    word = run.start.get("weights") or run.start["backbone"]
    entry = named(word)
    file = f"{word if entry is None else entry.title}, sha256 {run.start['sha256'][:12]}"
    return f"{file}, {run.share}" if "weights" in run.start else f"random weights, the backbone from {file}"


def _teacher(record: Mapping[str, str], beside: int) -> str:
    sha256 = f", sha256 {record['sha256'][:12]}" if "sha256" in record else ""
    return record["teacher"] + sha256 + (f", {beside:,} parameters between both encoders are trained" if beside else "")


def print_result(console: Console, run: Run, result: str, tables: Mapping[str, Mapping[str, float]]) -> None:
    """Print how a run ended: all metrics of the best epoch, its classes, where everything is, and what to do next.

    Args:
        result: a sentence about the best.
        tables: split -> metrics of the best weights on it; empty where nothing was evaluated.
    """
    console.line(f"\n{result}\n")
    if rows := _metric_rows(tables):
        console.table(rows)
    for kind, classes in _class_rows(run, tables.get("val", {})):
        console.table(class_table(kind, classes[:MOST_CLASSES]))
        if len(classes) > MOST_CLASSES:
            console.line(f"  ... and {len(classes) - MOST_CLASSES} more classes, in {run.output_dir / CLASSES}\n")
    there = {name: file for name, file in PLACES.items() if (run.output_dir / file).exists()}
    console.table([[name, file] for name, file in {"run": str(run.output_dir), **there}.items()], left=2)
    console.line("next:")
    for words in next_commands(run.output_dir, example_image(run), run.config.get("allow_targets")):
        console.line(f"  {shlex.join([python(), '-m', *words])}")
    console.line("")


def _metric_rows(tables: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A row per metric that has a value on any split, and a column per split."""
    names = dict.fromkeys(
        name for found in tables.values() for name in found if "/" not in name and name != "nonfinite"
    )
    rows = [[name, *(number(found.get(name), 4) for found in tables.values())] for name in names]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    return [["metric", *tables], *rows] if rows else []


def _class_rows(run: Run, found: Mapping[str, float]) -> list[tuple[str, list[Values]]]:
    """Kinds of evaluation with a row per class that has objects; those with the lowest AP if there are many."""
    path = run.output_dir / CLASSES
    tables = json.loads(path.read_text(encoding="utf-8")) if found and path.exists() else {}
    kinds = []
    for kind, rows in tables.items():
        rows = [row for row in rows if row["objects"]]
        kinds.append((kind, sorted(rows, key=lambda row: row["AP"]) if len(rows) > MOST_CLASSES else rows))
    return [(kind, rows) for kind, rows in kinds if rows]


def example_image(run: Run) -> str | None:
    """An image of the data; None: they have no files."""
    splits = [split for name in ("val", "train") if (split := getattr(run.data, name)) is not None]
    tables = (table for split in splits for table in tables_of(split).values())
    return next((str(Path(table.paths[0]).absolute()) for table in tables), None)
