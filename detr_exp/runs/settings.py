"""What differs between runs, and which of them differ by their seed alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detr_exp.config.keys import NO_NUMBER, is_under
from detr_exp.runs.past import PastRun
from detr_exp.values import Values, flat

SEED = "seed"
WORDS = {"lr": "learning rate", "amp": "mixed precision", "ema": "averaged weights"}
Point = list[PastRun]  # runs that differ by their seed alone

logger = logging.getLogger("detr_exp.runs")


class Setting(NamedTuple):
    """Something that is not the same in all runs.

    Attributes:
        key: the key or group, as on the command line.
        name: in words, as short as the settings beside it permit.
        others: further keys that change exactly when it does.
        values: one per run, as text; `-` where a run has none.
    """

    key: str
    name: str
    others: list[str]
    values: list[str]


def settings(runs: Sequence[PastRun]) -> list[Setting]:
    """What differs besides the seed, overrides first; keys that always change together are one setting."""
    found: dict[tuple[int, ...], tuple[str, list[str], list[str]]] = {}
    for key, values in _told(runs).items():
        places = {value: place for place, value in enumerate(dict.fromkeys(values))}
        pattern = tuple(places[value] for value in values)
        if pattern in found:
            found[pattern][1].append(key)
        else:
            found[pattern] = (key, [], values)
    names = in_words([key for key, *_ in found.values()])
    return [Setting(key, name, others, values) for name, (key, others, values) in zip(names, found.values())]


def in_words(keys: Sequence[str]) -> list[str]:
    """Names of keys without what is before their last parts, as far as these tell them apart."""
    names = []
    for key in keys:
        parts = re.split("[./]", key)
        for count in range(1, len(parts) + 1):
            tail = parts[-count:]
            if sum(re.split("[./]", other)[-count:] == tail for other in keys) == 1:
                break
        names.append(" ".join(WORDS.get(part, part.replace("_", " ")) for part in tail))
    return names


def _told(runs: Sequence[PastRun]) -> dict[str, list[str]]:
    """The keys whose values differ and the value of each run, overridden ones first, without the seed and what changes
    no number."""
    words = {word.partition("=")[0].lstrip("+~"): None for run in runs for word in run.record.words}
    keys = words | dict.fromkeys(key for run in runs for key in run.overridable)
    told = {}
    for key in keys:
        values = [] if key == SEED or is_under(key, NO_NUMBER) else [_value(run, key) for run in runs]
        if len(set(values)) > 1:
            told[key] = values
    return told


def points(runs: Sequence[PastRun]) -> list[Point]:
    """Runs with the same settings but for the seed together, in the order of their first."""
    told = _told(runs).values()
    groups: dict[tuple[str, ...], list[PastRun]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(tuple(values[place] for values in told), []).append(run)
    return list(groups.values())


def differing(*groups: Sequence[PastRun]) -> list[tuple[str, ...]]:
    """Keys whose values are not the same in all groups of runs, with the values in each."""

    def told(configs: Sequence[Values], key: str) -> str:
        found = (config.get(key, "-") for config in configs)
        return ", ".join(sorted({"null" if value is None else str(value) for value in found}))

    configs = [[run.overridable for run in group] for group in groups]
    keys = dict.fromkeys(key for group in configs for config in group for key in config if not is_under(key, NO_NUMBER))
    rows = [(key, *(told(group, key) for group in configs)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def in_pairs(a: list[Point], b: list[Point]) -> list[tuple[Point, Point]]:
    """What is compared with what: one point with all of the other side, or those of two sweeps with the same settings.

    Raises:
        ValueError: both sides have several points, and it is not plain which belong together.
    """
    if 1 in (len(a), len(b)):
        pairs = [(one, other) for one in a for other in b]
        return [pair for pair in pairs if len(pairs) == 1 or _folders(pair[0]) != _folders(pair[1])]
    keys = [{key for key, *_ in differing(*(point[:1] for point in side))} - {SEED} for side in (a, b)]
    shared = sorted(keys[0] & keys[1])

    def place(point: Point) -> tuple[str, ...]:
        config = flat(point[0].config)
        return tuple(str(config.get(key, "-")) for key in shared)

    places = [[place(point) for point in side] for side in (a, b)]
    pairs = [(one, b[places[1].index(at)]) for one, at in zip(a, places[0]) if at in places[1]]
    if not pairs or any(len(set(found)) < len(found) for found in places):
        raise ValueError(
            f"a has runs of {len(a)} settings and b of {len(b)}, and it is not plain which belong together; name the "
            f"runs of one setting: a=[{a[0][0].folder},...], or the same one twice: a={a[0][0].folder} b=<sweep>"
        )
    if left := len(a) + len(b) - 2 * len(pairs):
        logger.warning("%d settings that only one side has are left out", left)
    return pairs


def _folders(point: Point) -> set[Path]:
    return {run.folder.resolve() for run in point}


def _value(run: PastRun, key: str) -> str:
    """Of a key in the config, of a group in the tags, else of the word itself (a run that did not get far)."""
    if key in run.overridable:
        value = run.overridable[key]
        return "null" if value is None else str(value)
    said = (word.partition("=")[2] for word in run.record.words if word.partition("=")[0] == key)
    return run.record.tags.get(key) or next(said, "-")
