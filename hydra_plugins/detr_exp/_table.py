"""The summary of a sweep: all runs, best first, and the deviation over seeds."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.conf import ConfigSourceInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detr_exp.metric.mean import mean_of
from detr_exp.runs.next_commands import commands_of
from detr_exp.runs.past import PastRun
from detr_exp.runs.swept import alone
from detr_exp.terminal import counted, duration, printable, python
from detr_exp.tracker.secrets import masked
from hydra_plugins.detr_exp._ledger import Entry, Job, best_first, by_point, score, setting_of

COLOURS = {"ok": "green", "pruned": "cyan", "killed": "yellow", "not run": "yellow", "running": "yellow"}
WIDTH_OF_FILES = 160
MOST_VALUES = 8


def show(
    jobs: Sequence[Job],
    entries: Mapping[str, Entry],
    extra: Mapping[str, Mapping[str, float]],
    metric: str,
    raced: bool = False,
) -> None:
    """Print the table of all runs; where several seeds were swept, a second one of means and deviations.

    Args:
        jobs: of the sweep.
        entries: hash -> how it ended.
        extra: hash -> further results of a run, by name.
        metric: what the results are.
        raced: see `by_point`.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    with console.capture() as printed:
        console.print(ranking(jobs, entries, extra, metric))
        seeds = over_seeds(jobs, entries, metric, raced)
        if seeds is not None:
            console.print(seeds)
        console.print(f"\nswept: {escape(printable('; '.join(values_of(jobs))))}", highlight=False)
    print("", *(line.rstrip() for line in printed.get().splitlines()), sep="\n", flush=True)


def ranking(
    jobs: Sequence[Job], entries: Mapping[str, Entry], extra: Mapping[str, Mapping[str, float]], metric: str
) -> Table:
    """One line per run: number, overrides, result, or the reason why there is none; best first."""
    keys = list(dict.fromkeys(one.partition("=")[0] for job in jobs for one in job.swept))
    title = f"{counted(len(jobs), 'run')}, best first by {metric}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("#", justify="right")
    for key in keys:
        table.add_column(key)
    table.add_column(metric, justify="right", style="bold")
    names = list(dict.fromkeys(name for values in extra.values() for name in values))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("status")
    table.add_column("time", justify="right")
    table.add_column("reason", overflow="fold", ratio=1)
    for job, entry in best_first(jobs, entries):
        swept = dict(one.split("=", 1) for one in job.swept)
        status = "not run" if entry is None else entry.status
        value = "-" if entry is None or entry.metric is None else f"{entry.metric:.4f}"
        table.add_row(
            str(job.number),
            *(escape(printable(masked(swept.get(key, ""), key))) for key in keys),
            value,
            *(f"{extra[job.hash][name]:.6g}" if name in extra.get(job.hash, {}) else "" for name in names),
            f"[{COLOURS.get(status, 'red')}]{status}[/]",
            "" if entry is None else duration(entry.seconds),
            escape(printable((entry.reason if entry is not None else None) or "")),
        )
    return table


def values_of(jobs: Sequence[Job]) -> list[str]:
    """What was swept: `loss: focal, vfl`; of many values their number and the first and last."""
    values: dict[str, dict[str, None]] = {}
    for job in jobs:
        for key, _, value in (one.partition("=") for one in job.swept):
            values.setdefault(key, {})[str(masked(value, key))] = None
    shown = {key: list(found) for key, found in values.items()}
    return [
        f"{key}: {', '.join(found)}"
        if len(found) <= MOST_VALUES
        else f"{key}: {len(found)} values, {found[0]} to {found[-1]}"
        for key, found in shown.items()
    ] or ["nothing"]


def over_seeds(jobs: Sequence[Job], entries: Mapping[str, Entry], metric: str, raced: bool = False) -> Table | None:
    """Mean, deviation and 95 % interval of the mean of the runs that differ only in their seed, best mean first; None
    if no seeds were swept."""
    found = [entry for job in jobs if (entry := entries.get(job.hash)) is not None]
    groups = by_point(found, raced)
    if not any(len(group) > 1 for group in groups):
        return None
    title = f"\nmeans of {metric} over seeds, best first" + (
        ": who stayed in the race, then who left it" if raced else ""
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.caption_justify = "left"
    if len(groups) > 1:
        table.caption = (
            "Each interval is of its row alone; the best of several looks better than it is. Whether two differ: "
            "python -m detr_exp.compare"
        )
    table.add_column("setting")
    for name in ("mean", "deviation", "95 % interval", "seeds"):
        table.add_column(name, justify="right")
    for group in groups:
        of = mean_of([score(entry) for entry in group])
        spread = "-" if of.deviation is None else f"{of.deviation:.4f}"
        between = "-" if of.interval is None else "{:.4f} .. {:.4f}".format(*of.interval)
        setting = escape(printable(setting_of(group[0]))) or "all runs"
        table.add_row(setting, f"{of.value:.4f}", spread, between, str(of.runs))
    return table


def winner(best: Job, folder: Path, result: str, sources: Sequence[ConfigSourceInfo]) -> list[str]:
    """Lines that say which run was the best, where it is, and how it is used and repeated."""
    custom = [word for one in sources if one.provider == "command-line" for word in ("--config-dir", one.path)]
    return [
        f"best run of the best setting: {' '.join(best.swept)} ({result})",
        f"  folder  {folder}",
        *_use(folder),
        f"  repeat  {python()} -m detr_exp.train {shlex.join([*custom, *alone(best.overrides)])}",
    ]


def _use(folder: Path) -> list[str]:
    """A line with a command for a run; none where its files are damaged or not there."""
    try:
        (words, *_) = commands_of(PastRun.load(folder))
    except ValueError:
        return []
    return [f"  use     {python()} -m {shlex.join(words)}"]
