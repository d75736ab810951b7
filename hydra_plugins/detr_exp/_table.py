"""The summary of a sweep: all runs, best first, and the deviation over seeds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit

from detr_exp.terminal import printable
from detr_exp.tracker.secrets import masked
from hydra_plugins.detr_exp._ledger import Entry, Job, best_first, score

COLOURS = {"ok": "green", "pruned": "cyan", "killed": "yellow", "not run": "yellow", "running": "yellow"}
WIDTH_OF_FILES = 160


def show(jobs: Sequence[Job], entries: Mapping[str, Entry], extra: Mapping[str, Mapping[str, float]]) -> None:
    """Print the table of all runs; where several seeds were swept, a second one of means and deviations.

    Args:
        jobs: of the sweep.
        entries: hash -> how it ended.
        extra: hash -> further results of a run, by name.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    with console.capture() as printed:
        console.print(ranking(jobs, entries, extra))
        seeds = over_seeds(jobs, entries)
        if seeds is not None:
            console.print(seeds)
    print("", *(line.rstrip() for line in printed.get().splitlines()), sep="\n", flush=True)


def ranking(jobs: Sequence[Job], entries: Mapping[str, Entry], extra: Mapping[str, Mapping[str, float]]) -> Table:
    """One line per run: number, overrides, result, or the reason why there is none; best first."""
    keys = list(dict.fromkeys(one.partition("=")[0] for job in jobs for one in job.swept))
    table = Table(title=f"{len(jobs)} runs, best first", title_justify="left", title_style="bold", box=None)
    table.add_column("#", justify="right")
    for key in keys:
        table.add_column(key)
    table.add_column("metric", justify="right", style="bold")
    names = list(dict.fromkeys(name for values in extra.values() for name in values))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("status")
    table.add_column("time", justify="right")
    table.add_column("reason", overflow="fold", ratio=1)
    for job, entry in best_first(jobs, entries):
        swept = dict(one.split("=", 1) for one in job.swept)
        status = "not run" if entry is None else entry.status
        metric = "-" if entry is None or entry.metric is None else f"{entry.metric:.4f}"
        table.add_row(
            str(job.number),
            *(escape(printable(masked(swept.get(key, ""), key))) for key in keys),
            metric,
            *(f"{extra[job.hash][name]:.6g}" if name in extra.get(job.hash, {}) else "" for name in names),
            f"[{COLOURS.get(status, 'red')}]{status}[/]",
            "" if entry is None else duration(entry.seconds),
            escape(printable((entry.reason if entry is not None else None) or "")),
        )
    return table


def over_seeds(jobs: Sequence[Job], entries: Mapping[str, Entry]) -> Table | None:
    """Mean, deviation and 95 % interval of the mean (Student's t) of the runs that differ only in their seed; None if
    no seeds were swept."""
    groups: dict[str, list[float]] = {}
    for job in jobs:
        others = [one for one in job.swept if not one.startswith("seed=")]
        entry = entries.get(job.hash)
        if len(others) < len(job.swept) and math.isfinite(score(entry)):
            groups.setdefault(" ".join(others), []).append(score(entry))
    if not any(len(values) > 1 for values in groups.values()):
        return None
    table = Table(title="\nover seeds", title_justify="left", title_style="bold", box=None)
    table.add_column("overrides")
    for name in ("mean", "deviation", "95 % interval", "runs"):
        table.add_column(name, justify="right")
    for overrides, values in sorted(groups.items(), key=lambda group: -mean(group[1])):
        spread, between = "-", "-"
        if len(values) > 1:
            half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5
            spread, between = f"{stdev(values):.4f}", f"{mean(values) - half:.4f} .. {mean(values) + half:.4f}"
        given = escape(printable(overrides)) or "all runs"
        table.add_row(given, f"{mean(values):.4f}", spread, between, str(len(values)))
    return table


def duration(seconds: float) -> str:
    """`8.2 s`, `3:05` or `2:10:33`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
