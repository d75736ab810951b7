"""What two sides of runs say of each other, as numbers and in words; `metric.verdict` has the statistics.

Legend: n runs of a side, B draws of the images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from textwrap import wrap
from typing import NamedTuple

import numpy as np

from detr_exp.metric import verdict as statistics
from detr_exp.metric.bootstrap import kind_of
from detr_exp.metric.verdict import FEWEST_DRAWS, Difference
from detr_exp.runs.past import PastRun
from detr_exp.runs.settings import points
from detr_exp.values import Values

POWER = 0.8
MOST_RUNS = 4  # folders named in a line


class Scores(NamedTuple):
    """What the runs of a side reach by one metric, or with one class.

    Attributes:
        values: `[n]`; NaN where the truth holds nothing to be found.
        drawn: `[n, B]` the same on draws of the images; None where an evaluator says nothing of single images.
        images: that show what is to be found.
    """

    values: np.ndarray
    drawn: np.ndarray | None
    images: int


class Side(NamedTuple):
    """Runs that differ by their seed alone, and what they reach.

    Attributes:
        runs: at least one.
        metrics: by name.
        classes: each class by `of_classes`, the first of the metrics that is a mean over classes.
        of_classes: its name; empty where there is none.
    """

    runs: Sequence[PastRun]
    metrics: dict[str, Scores]
    classes: dict[str, Scores]
    of_classes: str = ""

    @property
    def seeds(self) -> list[int | None]:
        return [run.config.get("seed") for run in self.runs]

    def in_order(self, order: Sequence[int]) -> Side:
        """The same with its runs in another order, or fewer of them."""

        def sorted_of(found: dict[str, Scores]) -> dict[str, Scores]:
            at = list(order)
            return {
                name: Scores(one.values[at], None if one.drawn is None else one.drawn[at], one.images)
                for name, one in found.items()
            }

        return Side(
            [self.runs[place] for place in order], sorted_of(self.metrics), sorted_of(self.classes), self.of_classes
        )


def copies(side: Side) -> list[int]:
    """Places of runs whose settings, seed and results are to the last digit those of an earlier one: no second look."""
    setting = {run.folder: place for place, point in enumerate(points(side.runs)) for run in point}
    known: list[tuple[object, ...]] = []
    for place, (run, seed) in enumerate(zip(side.runs, side.seeds)):
        rows = [one.values[place : place + 1] for one in side.metrics.values()]
        rows += [one.drawn[place] for one in side.metrics.values() if one.drawn is not None]
        known.append((setting[run.folder], seed, np.concatenate(rows).tobytes()))
    return [place for place, mark in enumerate(known) if mark in known[:place]]


def compared(pairs: Sequence[tuple[Side, Side]], *, level: float, margin: float | None) -> list[Values]:
    """A verdict for each pair of sides by each metric and class, corrected for how many of them there are.

    Args:
        pairs: of a and b, all with the same metrics.
        level: of the intervals; a claim is wrong in 1 - level of the cases at most.
        margin: differences below it do not matter; None: no claim that sides are equal.

    Returns:
        per pair the runs and seeds of both sides and their values by each metric, a row for each of `metrics` (with
        what it `says`) and `classes`, and the fields of the first metric's row besides.
    """
    found: list[Values] = []
    for a, b in pairs:
        paired = len(a.runs) > 1 and None not in a.seeds and len(set(a.seeds)) == len(a.runs)
        paired = paired and set(a.seeds) == set(b.seeds) and len(a.runs) == len(b.runs)
        if paired:
            b = b.in_order([b.seeds.index(seed) for seed in a.seeds])
        about = {"paired": paired, "counts": [len(a.runs), len(b.runs)]}
        about["same_runs"] = [run.folder for run in a.runs] == [run.folder for run in b.runs]
        metrics = [_row("metric", name, a.metrics[name], b.metrics[name], about, level, margin) for name in a.metrics]
        classes = [_row("class", name, a.classes[name], b.classes[name], about, level, margin) for name in a.classes]
        classes = [row for row in classes if row["images"]]
        rows = {"metrics": metrics, "classes": classes, "of_classes": a.of_classes}
        found.append({"a": _told(a), "b": _told(b), **about, **rows})
    for kind in ("metrics", "classes"):
        _judge([row for one in found for row in one[kind]], level, margin)
    for one in found:
        one["classes"].sort(key=lambda row: -abs(row["difference"] or 0))
        for row in one["metrics"]:
            row["says"] = sentence(row, one, level, margin)
        first = one["metrics"][0]
        one |= {name: value for name, value in first.items() if name not in ("a", "b")}
    return found


def _told(side: Side) -> Values:
    values = {name: [_known(value) for value in one.values.tolist()] for name, one in side.metrics.items()}
    return {"runs": [str(run.folder) for run in side.runs], "seeds": side.seeds, **values}


def _row(kind: str, name: str, a: Scores, b: Scores, about: Values, level: float, margin: float | None) -> Values:
    """Difference, interval and p-values of one metric or class, not yet corrected."""
    found = _difference(a, b, about["paired"], about["same_runs"])
    speaks = not math.isnan(found.images.variance) and (found.about_runs or a.drawn is not None)
    unknown = float("nan")
    effect = max(abs(found.value), margin or 0.0)
    need = statistics.need(found, effect, level=level, power=POWER) if speaks else statistics.Need(None, unknown)
    low, high = statistics.interval(found, level) if speaks else (unknown, unknown)
    return {
        kind: name,
        "a": _known(float(a.values.mean())),
        "b": _known(float(b.values.mean())),
        "difference": _known(found.value),
        "interval": [_known(low), _known(high)],
        "p": statistics.p_value(found) if speaks else unknown,
        "equivalence_p": statistics.equivalence_p(found, margin) if speaks and margin is not None else unknown,
        "images": a.images,
        "images_drawn": a.drawn is not None,
        "about": "settings" if found.about_runs else "checkpoints",
        "to_tell": {"effect": _known(effect), "seeds": need.seeds, "images": _known(need.images)},
    }


def _difference(a: Scores, b: Scores, paired: bool, same_runs: bool) -> Difference:
    if a.drawn is None or b.drawn is None:  # images are taken as they are
        same = [np.repeat(one.values[:, None], FEWEST_DRAWS, axis=1) for one in (a, b)]
        return statistics.difference(a.values, b.values, *same, images=FEWEST_DRAWS, paired=paired)
    drawn = [a.drawn, b.drawn]
    if not same_runs and all(np.nanmax(one, initial=-np.inf) <= np.nanmin(one, initial=np.inf) for one in drawn):
        drawn = [
            np.full_like(one, np.nan) for one in drawn
        ]  # all found or nothing: draws show no scatter that is there
    return statistics.difference(a.values, b.values, *drawn, images=a.images, paired=paired)


def _judge(rows: Sequence[Values], level: float, margin: float | None) -> None:
    """Correct the p-values of rows for their number, and say what follows."""
    for name in ("p", "equivalence_p"):
        for row, corrected in zip(rows, statistics.holm([row[name] for row in rows])):
            row[f"{name}_corrected"] = corrected
    told = sum(not math.isnan(row["p"]) for row in rows)
    for row in rows:
        value, equal = row["difference"] or 0.0, None if margin is None else row["equivalence_p_corrected"]
        row["verdict"] = statistics.verdict(row["p_corrected"], equal, value, 1 - level)
        row["corrected_for"] = told
        for name in ("p", "equivalence_p", "p_corrected", "equivalence_p_corrected"):
            row[name] = _known(row[name])


def _known(value: float) -> float | None:
    """As JSON takes it."""
    return value if math.isfinite(value) else None


def sentence(row: Values, about: Values, level: float, margin: float | None) -> str:
    """The verdict on a metric in words that can stand alone: what is claimed, of what, and how sure it is."""
    name, difference = row["metric"], row["difference"]
    if difference is None:
        return f"{name} is undefined: the ground truth of this split has no such objects."
    ahead = "better" if kind_of(name) else "higher"
    fixed = row["about"] == "checkpoints"
    if row["verdict"] in ("a", "b"):
        best, other = ("a", "b") if row["verdict"] == "a" else ("b", "a")
        claim = f"{best} is {ahead} than {other}"
        if fixed:
            claim = f"the checkpoint of {best} is {ahead} than that of {other} on images like these"
    elif row["verdict"] == "equal":
        claim = f"{'on images like these the checkpoints' if fixed else 'a and b'} differ by less than {margin:g}"
        claim += f" ({100 * level:g} %)"
    elif row["a"] == row["b"] and row["interval"] == [0, 0]:
        claim = "both sides gave the same results"
    elif fixed:
        claim = f"it cannot be told which of the two checkpoints is {ahead} on images like these"
    else:
        claim = f"it cannot be told whether a or b is {ahead}"
    return f"{claim}: {', '.join(_measured(row, level))}. {' '.join(_scope(row, about))}".strip()


def _measured(row: Values, level: float) -> Iterator[str]:
    yield f"{row['metric']} b - a {_signed(row['difference'])}"
    low, high = row["interval"]
    if low is None:
        return
    yield f"{100 * level:g} % interval {_signed(low)} .. {_signed(high)}"
    corrected = f" corrected for {row['corrected_for']} comparisons (Holm)" if row["corrected_for"] > 1 else ""
    if row["verdict"] == "equal":
        yield f"p {_p(row['equivalence_p_corrected'])} of the equivalence test{corrected}"
    else:
        yield f"p {_p(row['p_corrected'])}{corrected}"


def _scope(row: Values, about: Values) -> Iterator[str]:
    """What the claim is about, and what would tell where it cannot be told."""
    if row["about"] == "checkpoints":
        drawn = (
            "images were resampled, both checkpoints are fixed" if row["images_drawn"] else "both checkpoints are fixed"
        )
        yield f"One run a side: {drawn}, so nothing is claimed about their settings (two seeds a side would)."
    elif 1 in about["counts"]:
        yield "The side of one run is taken to scatter as the other does."
    if not row["images_drawn"] and row["about"] == "checkpoints":
        yield "It cannot be resampled by image, so it has no interval."
    elif not row["images_drawn"]:
        yield "It cannot be resampled by image, so the interval covers seeds on these images alone."
    if row["verdict"] != "unknown":
        return
    if row["interval"][0] is None:
        if row["images_drawn"]:
            shown = f"Too little to say: it is shown in {_count(row['images'], 'image')}, or in too few of the draws."
            yield "Neither side has found anything." if row["a"] == row["b"] == 0 else shown
        return
    need = row["to_tell"]
    if need["effect"]:
        yield from _needed(need, row["about"])


def _needed(need: Values, about: str) -> Iterator[str]:
    aim = f"a difference of {need['effect']:.4f}"
    if need["images"] is not None and need["images"] > 1:
        cause = "No number of seeds tells" if about == "settings" else "These images do not tell"
        yield f"{cause} {aim} here: it takes at least {need['images']:.1f} times as many images."
    elif need["seeds"] is not None:
        yield f"About {need['seeds']} seeds a side would tell {aim} ({100 * POWER:g} % power)."
    elif about == "settings":
        yield f"More than 100 seeds a side would be needed to tell {aim}."


def text(found: Values) -> str:
    """All comparisons as a person reads them.

    Args:
        found: `split`, `images`, `resamples`, `level`, and `comparisons` from `compared`, each with `config`:
            key, value in a, value in b of what differs.
    """
    drawn = any(one["images_drawn"] for one in found["comparisons"])
    draws = f", {found['resamples']} bootstrap resamples, the same for all runs" if drawn else ""
    lines = [f"\n{found['split']} split, {_count(found['images'], 'image')}{draws}"]
    for one in found["comparisons"]:
        lines += ["", *_comparison(one, found["level"])]
    return "\n".join([*lines, ""])


def _comparison(one: Values, level: float) -> Iterator[str]:
    for name in ("a", "b"):
        side, first = one[name], one["metric"]
        runs = ", ".join(side["runs"][:MOST_RUNS]) + (", ..." if len(side["runs"]) > MOST_RUNS else "")
        yield f"  {name}  {first} {spread(side[first])}  {runs}"
    if one["paired"]:
        yield f"  the same seeds on both sides, in pairs: {', '.join(map(str, one['a']['seeds']))}"
    if len(one["metrics"]) > 1:
        yield from ["", *_table(one["metrics"], "metric", level)]
    yield ""
    for row in one["metrics"]:
        yield from wrap(row["says"], 120, subsequent_indent="  ", break_on_hyphens=False)
    if one["classes"]:
        yield from [
            "",
            f"{one['of_classes']} of each class, largest difference first",
            *_table(one["classes"], "class", level),
        ]
    if one["config"]:
        width = max(len(key) for key, _, _ in one["config"])
        yield from ["", "settings that differ (a -> b)"]
        yield from [f"  {key:<{width}}  {before} -> {after}" for key, before, after in one["config"]]


def _table(rows: Sequence[Values], kind: str, level: float) -> Iterator[str]:
    width = max([len(kind), *(len(row[kind]) for row in rows)])
    corrected = rows[0]["corrected_for"]
    head = f"{100 * level:g} % interval"
    yield f"{kind:<{width}}  images       a       b    b - a  {head:<18}  p{' (Holm)' if corrected > 1 else ''}"
    for row in rows:
        low, high = row["interval"]
        between = "-" if low is None else f"{_signed(low)} .. {_signed(high)}"
        said = {"a": "a *", "b": "b *", "equal": "equal"}.get(row["verdict"], "")
        values = [f"{row[name]:.4f}" if row[name] is not None else "-" for name in ("a", "b")]
        gap = _signed(row["difference"]) if row["difference"] is not None else "-"
        line = f"{row[kind]:<{width}}  {row['images'] or '-':>6}  {values[0]:>6}  {values[1]:>6}  {gap:>7}  "
        yield f"{line}{between:<18}  {_p(row['p_corrected'])}  {said}".rstrip()
    known = [row for row in rows if row["p"] is not None]
    if known:
        many = f"; p and stars are corrected for {corrected} comparisons (Holm), intervals are not"
        of = " (of the checkpoints alone)" if known[0]["about"] == "checkpoints" else ""
        yield f"* better{of}{many if corrected > 1 else ''}"


def spread(values: Sequence[float | None]) -> str:
    """One value, or mean and standard deviation of several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.4f}"
    return f"{mean(known):.4f} +- {stdev(known):.4f} ({len(known)} runs)"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # no -0.0000


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
