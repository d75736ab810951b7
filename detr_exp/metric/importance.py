"""Which settings of a sweep mattered, with the chance that noise alone makes them look so.

For each setting: the residuals of the results from the other settings (main effects) are dealt out anew among the runs
many times, and the part of their variance that the setting explains is counted again (Freedman & Lane, J. of Business &
Economic Statistics 1, 1983). Runs that differ by their seed alone are dealt out one by one where every combination of
the settings was run; elsewhere they are averaged first, because what their point owes to the other settings is common
to them and not a second observation. The p-values are corrected for the number of settings (Holm). `docs/statistics.md`
has how often it is wrong, and how often it finds what is there.

Legend: n units (runs or averages of runs), m settings, g different values of a setting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from detr_exp.metric.verdict import holm

DEALS = 4999
OF_PAIRS = 0.1  # share of the permitted error that is spent on interactions, where there are any
FEWEST_WITHIN = 3  # degrees of freedom left, to test an interaction
MOST_KINDS = 256  # values that can stand for themselves: the cost of a model grows with the square of their number
BLOCK = 1 << 20  # results that are dealt out at once; thousands of runs dealt thousands of times need gigabytes


class Importance(NamedTuple):
    """What one setting, or the interplay of two, did.

    Attributes:
        names: one setting, or two.
        share: of the variance of the results (less what other settings explain) that goes with it, 0..1, corrected for
            its degrees of freedom (epsilon squared).
        p: how often noise alone explains as much; corrected for the number of settings.
        least: the smallest such p that these runs could give; from `alpha` on they are too few to tell.
    """

    names: tuple[str, ...]
    share: float
    p: float
    least: float


def importances(
    settings: Mapping[str, Sequence[str]],
    results: Sequence[float],
    *,
    alpha: float = 0.05,
    deals: int = DEALS,
    seed: int = 0,
) -> list[Importance]:
    """What every setting did, and every pair of them where all combinations were run and runs are enough to tell.

    Args:
        settings: values of each swept setting, one per run, as text; seeds are not among them.
        results: of the runs, finite.
        alpha: how often a sweep in which nothing matters may seem to say that something does.
        deals: how many times the results are dealt out.
        seed: of the deals.

    Returns:
        smallest p first. Settings of one value, or of nearly as many or more than `MOST_KINDS` that are no numbers, are
        not in it.
    """
    points = list(zip(*settings.values()))
    units, values = points, np.asarray(results, dtype=float)
    if len(set(points)) < len(points) and not _crossed(points):
        of_unit: dict[tuple[str, ...], list[float]] = {}
        for point, value in zip(points, values):
            of_unit.setdefault(point, []).append(value)
        units, values = list(of_unit), np.array([np.mean(found) for found in of_unit.values()])
    columns = {
        name: found
        for place, name in enumerate(settings)
        if (found := _columns([unit[place] for unit in units])) is not None
    }
    texts = {name: [unit[place] for unit in units] for place, name in enumerate(settings)}
    if not columns:
        return []
    singles = []
    for name, own in columns.items():
        others = [other for key, other in columns.items() if key != name]
        base = _spanned(others, len(values))
        if len(values) - base.shape[1] - own.shape[1] < len(values) / 2:
            base = _spanned([], len(values))  # too few runs to judge all settings at once: each by itself
        singles.append(((name,), *_test(values, base, own, deals, seed), _least(texts[name], deals)))
    pairs = []
    base = _spanned(list(columns.values()), len(values))
    for a, b in combinations(columns, 2):
        if columns[a].shape[1] * columns[b].shape[1] > MOST_KINDS:
            continue
        own = (columns[a][:, :, None] * columns[b][:, None, :]).reshape(len(values), -1)
        if _crossed(list(zip(texts[a], texts[b]))) and len(values) - base.shape[1] - own.shape[1] >= FEWEST_WITHIN:
            least = _least([f"{x}\n{y}" for x, y in zip(texts[a], texts[b])], deals)
            pairs.append(((a, b), *_test(values, base, own, deals, seed), least))
    told = [one for one in _corrected(pairs, OF_PAIRS) if one.least < alpha]
    return sorted([*_corrected(singles, 1 - OF_PAIRS if told else 1), *told], key=lambda one: (one.p, -one.share))


def _corrected(found: Sequence[tuple[tuple[str, ...], float, float, float]], part: float) -> list[Importance]:
    """With p-values that hold together at `part` of the permitted error."""
    adjusted = holm([p for _, _, p, _ in found])
    return [
        Importance(names, share, min(1.0, p / part), min(1.0, least * len(found) / part))
        for (names, share, _, least), p in zip(found, adjusted)
    ]


def _crossed(points: Sequence[tuple[str, ...]]) -> bool:
    """Whether every combination of the values was run."""
    return len(set(points)) == math.prod(len(set(column)) for column in zip(*points))


def _columns(values: Sequence[str]) -> np.ndarray | None:
    """What stands for a setting in the model `[n, g - 1]`; of numbers that are nearly all different their ranks and
    the squares of these; None where nothing can."""
    kinds = list(dict.fromkeys(values))
    if _are_groups(values):
        return np.array([[value == kind for kind in kinds[1:]] for value in values], dtype=float)
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return None
    if len(kinds) < 2:
        return None
    ranks = np.searchsorted(np.unique(numbers), numbers) / (len(np.unique(numbers)) - 1) - 0.5
    return np.stack([ranks, ranks**2], axis=1) if len(kinds) > 2 else ranks[:, None]


def _spanned(columns: Sequence[np.ndarray], count: int) -> np.ndarray:
    """An orthonormal basis of a constant and columns: `[n, rank]`."""
    left, sizes, _ = np.linalg.svd(np.column_stack([np.ones(count), *columns]), full_matrices=False)
    return left[:, sizes > 1e-9 * sizes[0]]


def _deals(count: int, deals: int, seed: int) -> Iterator[np.ndarray]:
    """`[deals, n]` in blocks of rows, each row an order of the units."""
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // count)
    for start in range(0, deals, block):
        yield generator.permuted(np.tile(np.arange(count), (min(block, deals - start), 1)), axis=1)


def _test(values: np.ndarray, base: np.ndarray, own: np.ndarray, deals: int, seed: int) -> tuple[float, float]:
    """The share of the variance that columns explain beyond a base, and how often dealt results have as large a one."""
    apart = own - base @ (base.T @ own)
    left, sizes, _ = np.linalg.svd(apart, full_matrices=False)
    added = left[:, sizes > 1e-9 * max(1.0, np.abs(own).max())]
    residual = values - base @ (base.T @ values)
    rest, more = len(values) - base.shape[1], added.shape[1]
    scale = np.abs(values).max(initial=0.0)
    if not more or rest <= more or np.abs(residual).max() <= 1e-12 * scale:
        return 0.0, 1.0

    def explained(dealt: np.ndarray) -> np.ndarray:
        total = (dealt**2).sum(1) - ((dealt @ base) ** 2).sum(1)
        return ((dealt @ added) ** 2).sum(1) / np.maximum(total, 1e-300)

    found = explained(residual[None])[0]
    blocks = _deals(len(values), deals, seed)
    as_large = sum(int(np.count_nonzero(explained(residual[block]) >= found - 1e-9)) for block in blocks)
    share = 1 - (1 - found) * rest / (rest - more)
    return float(np.clip(share, 0, 1)), (1 + as_large) / (1 + deals)


def _least(values: Sequence[str], deals: int) -> float:
    """The smallest p that dealing can give: orders that group the units alike cannot be told apart, nor can an order of
    numbers from its reverse."""
    groups = Counter(values)
    alike = math.prod(math.factorial(size) for size in groups.values())
    if _are_groups(values):
        alike *= math.prod(math.factorial(count) for count in Counter(groups.values()).values())
    else:
        alike *= 2
    return max(min(1.0, alike / math.factorial(len(values))), 1 / (deals + 1))


def _are_groups(values: Sequence[str]) -> bool:
    """Whether each value is had by enough units to stand for itself, rather than by its rank."""
    return 1 < len(set(values)) <= min(MOST_KINDS, len(values) / 2)
