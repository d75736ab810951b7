"""The page of a report: what the template shows, gathered from run folders."""

from __future__ import annotations

import json
import logging
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mean, median

from detr_exp.metric.mean import Mean, mean_of
from detr_exp.runs import svg
from detr_exp.runs.analysis import Cost, effects, front, noise_of
from detr_exp.runs.chosen import honest
from detr_exp.runs.html import filled, jpeg_address
from detr_exp.runs.next_commands import commands_of
from detr_exp.runs.past import PastRun
from detr_exp.runs.settings import SEED, Setting, points, settings
from detr_exp.tracker.follower import is_image
from detr_exp.values import Values

TEMPLATE = "page.html"
COLOURS = 8  # points whose lines are drawn boldly
MOST_NAMED = 3
MOST_CLASS_RUNS = 6
MOST_COLUMNS = 10
IMAGE_WIDTH, IMAGE_QUALITY = 1500, 80
GOOD = ("ok",)
logger = logging.getLogger("detr_exp.tracker")
TIMINGS = (
    ("time/val_network_ms", "ms per image in evaluation, network and boxes"),
    ("time/val_images_per_second", "ms per image in evaluation, loading included"),
)
LOST = ("pruned", "oom", "nan", "failed", "killed", "unfinished")


@dataclass
class Ranked:
    """Runs that differ by their seed alone, best first, as the page shows them.

    Attributes:
        name: of the run, or what was set in these.
        style: class of its colour.
        given: the value of every setting that differs.
    """

    runs: list[PastRun]
    name: str = ""
    style: str = ""
    given: list[str] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        return [run.score for run in self.runs if run.score is not None]

    @property
    def result(self) -> Mean | None:
        return mean_of(self.scores) if self.scores else None

    @property
    def reached(self) -> float | None:
        """The best value so far of runs that have no result yet."""
        return max((run.reached for run in self.runs if run.reached is not None), default=None)

    @property
    def status(self) -> str:
        """`ok`, or of runs that ended differently how many ended how."""
        counts = Counter(run.status for run in self.runs)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())


def render(runs: Sequence[PastRun], *, title: str, about: str, now: datetime) -> str:
    """The page as HTML, complete in itself.

    Args:
        runs: at least one.
        title: of the page.
        about: what the user asked for.
        now: when it was made.
    """
    ranked, differing = _ranked(runs)
    ordered = [run for point in ranked for run in point.runs]
    best = ranked[0].runs[0]
    return filled(
        TEMPLATE,
        title=title,
        about=about,
        now=f"{now:%Y-%m-%d %H:%M}",
        monitor=best.monitor,
        best=best if best.score is not None else None,
        use=shlex.quote(str(best.folder)),
        commands=[shlex.join(words) for words in commands_of(best) if words[0] != "detr_exp.evaluate"],
        points=ranked,
        count=len(ordered),
        seeds=[(point, run, run.config.get(SEED)) for point in ranked if len(point.runs) > 1 for run in point.runs],
        rows=[_row(point) for point in ranked],
        columns=differing[:MOST_COLUMNS],
        named=len(differing) <= MOST_NAMED and not any(point.name == _label(point.runs[0]) for point in ranked),
        raced=_raced(ranked),
        differing=differing,
        curves=_curves(ranked),
        effects=effects(differing, [run.score for run in ordered]),
        fronts=_fronts(ranked),
        classes=_classes(ranked),
        image=_image(best),
        hours=_hours(ordered),
        total_hours=sum(run.hours for run in ordered),
        troubles=[run for run in ordered if run.status not in GOOD],
        code=_code(ordered),
        honest=honest([point.runs for point in ranked]),
    )


def _ranked(runs: Sequence[PastRun]) -> tuple[list[Ranked], list[Setting]]:
    """Points, best mean first, and what differs, with a value for each run in the order of the points."""

    def worse(run: PastRun) -> tuple[bool, float, str]:
        return run.score is None, -(run.score or run.reached or 0.0), run.record.name

    ranked = [Ranked(sorted(point, key=worse)) for point in points(runs)]
    raced = _raced(ranked)

    def order(point: Ranked) -> tuple[bool, int, float, str]:
        value = point.result.value if point.result else point.reached or 0.0
        return not point.scores, -len(point.scores) * raced, -value, point.runs[0].record.name

    ranked.sort(key=order)
    differing = settings([run for point in ranked for run in point.runs])
    start = 0
    for place, point in enumerate(ranked):
        point.style = f"c{place}" if place < COLOURS else f"c{place} rest"
        point.given = [setting.values[start] for setting in differing]
        told = [f"{setting.name} {value}" for setting, value in zip(differing[:MOST_NAMED], point.given)]
        by_setting = len(point.runs) > 1 or (told and "/" in point.runs[0].record.name)  # of a sweep, else a hash
        point.name = (", ".join(told) or "all seeds") if by_setting else _label(point.runs[0])
        start += len(point.runs)
    return ranked, differing


def _raced(ranked: Sequence[Ranked]) -> bool:
    """Whether points that fell behind have seen fewer seeds than the others, so that their means do not compare."""
    seeds = {len(point.scores) for point in ranked}
    return len(seeds) > 1 and any(run.raced for point in ranked for run in point.runs)


def _row(point: Ranked) -> Values:
    names = ("mAP50", "mAP_small", "mAP_medium", "mAP_large")
    prefix = point.runs[0].monitor.removesuffix("mAP")
    epochs = [epoch for run in point.runs if (epoch := run.best.get("val/epoch")) is not None]
    held_out = [run.choices[0].there for run in point.runs if run.choices is not None]
    return {
        "point": point,
        "values": [_mean_of(point.runs, f"{prefix}{name}") for name in names],
        "epoch": mean(epochs) if epochs else None,
        "held_out": mean(held_out) if held_out else None,
        "hours": sum(run.hours for run in point.runs),
        "parameters": _parameters(point.runs[0]),
    }


def _mean_of(runs: Sequence[PastRun], name: str) -> float | None:
    """Over the runs that have a value; -1 is none."""
    known = [value for run in runs if (value := run.best.get(name)) is not None and value >= 0]
    return mean(known) if known else None


def _curves(ranked: Sequence[Ranked]) -> list[tuple[str, str]]:
    """Title and chart of the monitored metric and of the loss, a line for each run in the colour of its point."""
    monitor = ranked[0].runs[0].monitor
    charts = []
    for name, title in ((monitor, f"{monitor} of the validation split"), ("train/loss", "Training loss")):
        series = [svg.Series(_label(run), run.curve(name), point.style) for point in ranked for run in point.runs]
        if any(one.points for one in series):
            charts.append((title, svg.lines(series, "epoch", name)))
    return charts


def _fronts(ranked: Sequence[Ranked]) -> list[tuple[str, str, str]]:
    """Title, chart and what is on the front, for each cost that is known of two different networks at least."""
    scored = [point for point in ranked if point.scores]
    sized = [(point, size) for point in scored if (size := _parameters(point.runs[0])) is not None]
    found = []
    if len({size for _, size in sized}) > 1:
        costs = [Cost(size, 0.0, mean(point.scores)) for point, size in sized]
        chart, names = _front([point for point, _ in sized], costs, "parameters, millions", front(costs))
        found.append(("Accuracy against size", chart, names))
    for name, label in TIMINGS:
        timed = [(point, times) for point in scored if (times := _times(point.runs, name))]
        if len({_network(point.runs[0]) for point, _ in timed}) > 1:
            return [*found, ("Accuracy against time", *_against_time(timed, label))]
    return found


def _against_time(timed: Sequence[tuple[Ranked, list[float]]], label: str) -> tuple[str, str]:
    """Chart and words on points and the times of their runs, all times of equal networks taken together."""
    networks: dict[str, list[float]] = {}
    for point, times in timed:
        networks.setdefault(_network(point.runs[0]), []).extend(times)
    noise = noise_of(list(networks.values()))
    share = noise.share if noise else 0.0
    at = {
        network: Cost(mean(times), share * mean(times) / len(times) ** 0.5, 0.0) for network, times in networks.items()
    }
    costs = [at[_network(point.runs[0])]._replace(gain=mean(point.scores)) for point, _ in timed]
    machines = {run.record.tags.get("hardware") for point, _ in timed for run in point.runs}
    shown = [point for point, _ in timed]
    if noise is None or len(machines) > 1:
        why = "runs were timed on different hardware"
        if noise is None:
            why = "no network was timed in two runs, which would show how much timings scatter (two seeds of one do)"
        return _front(shown, costs, label, [])[0], f"No front: {why}."
    chart, names = _front(shown, costs, label, front(costs, noise.freedom))
    scatter = f"Timings of one network scatter by {noise.share:.1%} from run to run"
    return chart, f"{names} {scatter}; what lies within that is not told apart, nor are equal networks."


def _front(shown: Sequence[Ranked], costs: Sequence[Cost], label: str, best: Sequence[int]) -> tuple[str, str]:
    """Chart of points and costs, and the names of the best."""
    series = [svg.Series(point.name, [(cost.cost, cost.gain)], point.style) for point, cost in zip(shown, costs)]
    stairs = [(costs[place].cost, costs[place].gain) for place in best]
    names = "; ".join(shown[place].name for place in best)
    chart = svg.scatter(series[::-1], stairs, label, shown[0].runs[0].monitor)
    return chart, f"On the front: {names}." if names else ""


def _times(runs: Sequence[PastRun], name: str) -> list[float]:
    """Milliseconds in each run: the median of its evaluations but the first, which warms up, unless it is the only."""
    each = [[line[name] for line in run.lines if line.get(name)] for run in runs]
    found = [median(values[1:] or values) for values in each if values]
    return [1000 / value for value in found] if name.endswith("per_second") else found


def _network(run: PastRun) -> str:
    """The same for runs whose networks take the same time."""
    return json.dumps([run.config.get("model"), run.record.tags.get("parameters")], sort_keys=True, default=str)


def _parameters(run: PastRun) -> float | None:
    """Millions of them."""
    known = run.record.tags.get("parameters")
    return None if known is None else int(known) / 1e6


def _classes(ranked: Sequence[Ranked]) -> Values | None:
    """AP per class of the best run of each of the best points that have a table, the hardest class first."""
    runs = [(point, point.runs[0]) for point in ranked if point.scores]
    tables = [(point, table) for point, run in runs if (table := run.class_table)][:MOST_CLASS_RUNS]
    if not tables:
        return None
    rows = [row for row in tables[0][1] if row["objects"]]
    others = [{row["class"]: row["AP"] for row in table} for _, table in tables]
    return {
        "runs": [point.name for point, _ in tables],
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
        return jpeg_address(image, IMAGE_QUALITY)


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
    code = ("git.commit", "git.dirty", "version/detr_exp", "version/torch", "python", "hardware", "data.fingerprint")
    names = (*code, "weights", "weights.sha256", "backbone", "backbone.sha256")
    found = [(name, dict.fromkeys(run.record.tags[name] for run in runs if name in run.record.tags)) for name in names]
    return [(name, ", ".join(values)) for name, values in found if values]


def _label(run: PastRun) -> str:
    """A run's name as the page calls it: that of its folder, unless it was given one."""
    return run.record.name.rpartition("/")[2]
