"""The page of a report: what the template shows, gathered from run folders."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from detr_exp.runs import svg
from detr_exp.runs.analysis import FEWEST, Importance, front, importance
from detr_exp.runs.past import PastRun
from detr_exp.runs.settings import Setting, settings
from detr_exp.tracker.follower import is_image
from detr_exp.values import Values

TEMPLATE = "page.html"
COLOURS = 8
MOST_CLASS_RUNS = 6
MOST_COLUMNS = 10
IMAGE_WIDTH, IMAGE_QUALITY = 1500, 80
GOOD = ("ok",)
logger = logging.getLogger("detr_exp.tracker")
LOST = ("pruned", "oom", "nan", "failed", "killed", "unfinished")


def render(runs: Sequence[PastRun], *, title: str, about: str, now: datetime) -> str:
    """The page as HTML, complete in itself.

    Args:
        runs: at least one.
        title: of the page.
        about: what the user asked for.
        now: when it was made.
    """
    from jinja2 import Environment, PackageLoader

    ranked = sorted(runs, key=lambda run: (run.score is None, -(run.score or 0.0), run.record.name))
    differing = settings(ranked)
    template = Environment(
        loader=PackageLoader("detr_exp.runs", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template(TEMPLATE)
    best = ranked[0]
    styles = [f"c{place}" if place < COLOURS else "rest" for place in range(len(ranked))]
    return template.render(
        title=title,
        about=about,
        now=f"{now:%Y-%m-%d %H:%M}",
        monitor=best.monitor,
        best=best if best.score is not None else None,
        rows=[_row(run, place, styles[place]) for place, run in enumerate(ranked)],
        columns=differing[:MOST_COLUMNS],
        differing=differing,
        curves=_curves(ranked, styles),
        importances=_importances(differing, ranked),
        fewest=FEWEST,
        fronts=_fronts(ranked, styles),
        classes=_classes(ranked),
        image=_image(best),
        hours=_hours(ranked),
        total_hours=sum(run.hours for run in ranked),
        troubles=[run for run in ranked if run.status not in GOOD],
        code=_code(ranked),
    )


def _row(run: PastRun, place: int, style: str) -> Values:
    names = ("mAP50", "mAP_small", "mAP_medium", "mAP_large")
    prefix = run.monitor.removesuffix("mAP")
    values = [run.best.get(f"{prefix}{name}") for name in names]
    return {
        "run": run,
        "place": place,
        "style": style,
        "values": [value if value is not None and value >= 0 else None for value in values],
        "epoch": run.best.get("val/epoch"),
        "parameters": _parameters(run),
    }


def _curves(runs: Sequence[PastRun], styles: Sequence[str]) -> list[tuple[str, str]]:
    """Title and chart of the monitored metric and of the loss."""
    monitor = runs[0].monitor
    charts = []
    for name, title in ((monitor, f"{monitor} of the validation split"), ("train/loss", "Training loss")):
        series = [svg.Series(_label(run), run.curve(name), style) for run, style in zip(runs, styles)]
        if any(one.points for one in series):
            charts.append((title, svg.lines(series, "epoch", name)))
    return charts


def _importances(differing: Sequence[Setting], runs: Sequence[PastRun]) -> list[Importance]:
    found = [importance(setting, [run.score for run in runs]) for setting in differing]
    return sorted((one for one in found if one is not None), key=lambda one: -one.share)


def _fronts(runs: Sequence[PastRun], styles: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Title, chart and the runs on the front, for each cost that is known of two runs at least."""
    monitor = runs[0].monitor
    found = []
    for title, label, cost in (
        ("Accuracy against size", "parameters, millions", _parameters),
        ("Accuracy against time", "ms per image in evaluation, loading included", _milliseconds),
    ):
        known = [
            (run, style, (at, run.score))
            for run, style in zip(runs, styles)
            if run.score is not None and (at := cost(run)) is not None
        ]
        if len(known) < 2:
            continue
        best = front([point for _, _, point in known])
        series = [svg.Series(_label(run), [point], style) for run, style, point in reversed(known)]
        chart = svg.scatter(series, [known[place][2] for place in best], label, monitor)
        found.append((title, chart, [_label(known[place][0]) for place in best]))
    return found


def _parameters(run: PastRun) -> float | None:
    """Millions of them."""
    known = run.record.tags.get("parameters")
    return None if known is None else int(known) / 1e6


def _milliseconds(run: PastRun) -> float | None:
    rate = run.best.get("time/val_images_per_second")
    return None if not rate else 1000 / rate


def _classes(runs: Sequence[PastRun]) -> Values | None:
    """AP per class of the best runs that have a table, classes with the lowest AP of the best run first."""
    tables = [(run, table) for run in runs if run.score is not None and (table := run.class_table)][:MOST_CLASS_RUNS]
    if not tables:
        return None
    rows = [row for row in tables[0][1] if row["objects"]]
    others = [{row["class"]: row["AP"] for row in table} for _, table in tables]
    return {
        "runs": [_label(run) for run, _ in tables],
        "rows": [
            (row["class"], row["objects"], [other.get(row["class"]) for other in others])
            for row in sorted(rows, key=lambda row: row["AP"])
        ],
    }


def _image(run: PastRun) -> str | None:
    """The worst images of a run's best evaluation, as a data address."""
    sheets = sorted((run.folder / "worst").glob("step_*.jpg"))
    of_best = [path for path in sheets if path.stem == f"step_{run.best.get('step', 0):07d}"]
    for path in [*of_best, *reversed(sheets)]:
        if is_image(path):
            return _embedded(path)
        logger.warning("%s is damaged and is left out", path)
    return None


def _embedded(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((IMAGE_WIDTH, 4 * IMAGE_WIDTH))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=IMAGE_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _hours(runs: Sequence[PastRun]) -> list[tuple[str, int, float]]:
    """Status, number of runs and hours spent on them."""
    order = [*GOOD, *LOST]
    return [
        (status, len(group), sum(run.hours for run in group))
        for status in sorted({run.status for run in runs}, key=lambda status: order.index(status))
        if (group := [run for run in runs if run.status == status])
    ]


def _code(runs: Sequence[PastRun]) -> list[tuple[str, str]]:
    """What the runs were made with, each value once."""
    names = ("git.commit", "git.dirty", "version/detr_exp", "version/torch", "python", "hardware", "data.fingerprint")
    found = [(name, dict.fromkeys(run.record.tags[name] for run in runs if name in run.record.tags)) for name in names]
    return [(name, ", ".join(values)) for name, values in found if values]


def _label(run: PastRun) -> str:
    """A run's name as the page calls it: that of its folder, unless it was given one."""
    return run.record.name.rpartition("/")[2]
