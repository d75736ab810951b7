"""How often the verdicts of `compare`, of a report and of a race are wrong, and what they find: `docs/statistics.md`.

python scripts/simulate_verdicts.py [--trials 10000] [--only equal,unequal,precision,means,costs,...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product

import numpy as np
from scipy import special, stats

from detr_exp.metric.bootstrap import Category, average_precision, draws
from detr_exp.metric.honest import Choice, flattery
from detr_exp.metric.importance import importances
from detr_exp.metric.mean import mean_of
from detr_exp.metric.racing import budget, survivors
from detr_exp.metric.verdict import difference, equivalence_p, holm, interval, need, p_value
from detr_exp.runs.analysis import Cost, front, noise_of

IMAGES, DRAWS, BATCH = 100, 200, 250
AP_DRAWS = 600
OWN = 0.7  # deviation of an image's score from run to run, where that from setting to setting is 1
UNIT = np.sqrt(2 / IMAGES)  # deviation that the images give the difference of two settings
CELLS = [(*images, runs) for images in ((5, 60), (12, 60), (25, 0), (100, 0)) for runs in (1, 2, 3, 5)]
RATIOS = (0.5, 1.0, 2.0)
KINDS = {"normal": False, "t, 3 df": True}
Sides = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def noise(generator: np.random.Generator, heavy: bool, *shape: int) -> np.ndarray:
    """Of mean 0 and variance 1."""
    return generator.standard_t(3, shape) / np.sqrt(3) if heavy else generator.normal(size=shape)


def table(title: str, columns: list[str], rows: Iterator[list[str]]) -> None:
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def trials_of(
    count: int, counts: tuple[int, int], ratio: float, heavy: bool, shared: float = 0.0, wider: float = 1.0
) -> Iterator[Sides]:
    """Batches of `[T, n]` results and `[T, n, B]` draws of two equal sides.

    Args:
        count: trials in all.
        counts: runs a side.
        ratio: deviation of seeds / deviation that the images give the difference; of the second side `wider` times it.
        heavy: Student's t of three degrees of freedom, for seeds and images.
        shared: correlation of the seeds of both sides.
        wider: see `ratio`.
    """
    generator = np.random.default_rng(20)
    times = draws(IMAGES, DRAWS).T / IMAGES
    for _ in range(0, count, BATCH):
        common, found = noise(generator, heavy, BATCH, max(counts)), []
        for runs, scale in zip(counts, (1.0, wider)):
            images = noise(generator, heavy, BATCH, 1, IMAGES) + OWN * noise(generator, heavy, BATCH, runs, IMAGES)
            seeds = np.sqrt(1 - shared) * noise(generator, heavy, BATCH, runs) + np.sqrt(shared) * common[:, :runs]
            seeds *= scale * ratio * UNIT
            found += [images.mean(2) + seeds, images @ times + seeds[:, :, None]]
        yield found[0], found[2], found[1], found[3]


def ours(paired: bool) -> Callable[[Sides, float], np.ndarray]:
    def told(sides: Sides, effect: float) -> np.ndarray:
        a, b, drawn_a, drawn_b = sides
        found = [
            difference(a[i], b[i] + effect, drawn_a[i], drawn_b[i] + effect, images=IMAGES, paired=paired)
            for i in range(len(a))
        ]
        ends = np.array([interval(one) for one in found])
        return (ends[:, 0] > 0) | (ends[:, 1] < 0)

    return told


def welch(sides: Sides, effect: float) -> np.ndarray:
    return stats.ttest_ind(sides[1] + effect, sides[0], axis=1, equal_var=False).pvalue < 0.05


def old(sides: Sides, effect: float) -> np.ndarray:
    """Percentiles of the differences of draws in which the runs are drawn as well."""
    generator, drawn = np.random.default_rng(1), []
    for side in sides[2:]:
        chosen = generator.integers(side.shape[1], size=side.shape)
        drawn.append(np.take_along_axis(side, chosen, axis=1).mean(1))
    low, high = np.quantile(drawn[1] + effect - drawn[0], [0.025, 0.975], axis=1)
    return (low > 0) | (high < 0)


def share(how: Callable[[Sides, float], np.ndarray], effect: float, count: int, *told: object, **more: float) -> float:
    return float(np.mean([how(sides, effect) for sides in trials_of(count, *told, **more)]))  # type: ignore[arg-type]


def findable(counts: tuple[int, int], ratio: float, shared: float = 0.0) -> float:
    """The effect that one who knew all variances would find in 80 of 100 comparisons."""
    seeds, own = (ratio * UNIT) ** 2 * (1 - shared), OWN**2 / IMAGES
    known = UNIT**2 + (seeds + own) * (1 / counts[0] + 1 / counts[1])
    return float((special.ndtri(0.975) + special.ndtri(0.8)) * np.sqrt(known))


def equal(count: int) -> None:
    """False alarms and power with as many seeds on both sides."""

    def rows() -> Iterator[list[str]]:
        for (name, heavy), runs, ratio in product(KINDS.items(), (1, 2, 3, 5, 10), RATIOS):
            scale, counts = ratio if runs > 1 else 0.0, (runs, runs)  # one run: its seed is part of what is compared
            if runs == 1 and ratio != RATIOS[0]:
                continue
            told, effect = (counts, scale, heavy), findable(counts, ratio if runs > 1 else 0.0)
            methods = [ours(False), *([ours(True), welch] if runs > 1 else []), old]
            wrong = [percent(share(how, 0.0, count, *told)) for how in methods]
            found = [percent(share(how, effect, count // 4, *told)) for how in methods]
            if runs == 1:
                wrong, found = ([x[0], "-", "-", x[1]] for x in (wrong, found))
            yield [name, str(runs), "images alone" if runs == 1 else f"{ratio:g}", *wrong, *found]

    methods = ["ours", "in pairs", "Welch's t", "percentiles"]
    table(
        "As many seeds on both sides",
        ["noise", "seeds", "ratio", *(f"wrong: {m}" for m in methods), *(f"found: {m}" for m in methods)],
        rows(),
    )


def unequal(count: int) -> None:
    """Unequal numbers, unequal scatter, and seeds that go together."""

    def rows() -> Iterator[list[str]]:
        for (name, heavy), counts, wider in product(KINDS.items(), ((1, 3), (2, 5), (3, 10)), (1.0, 3.0)):
            if counts[0] == 1 and wider != 1:
                continue
            cells = [percent(share(ours(False), 0.0, count // 2, counts, r, heavy, wider=wider)) for r in RATIOS]
            yield [name, f"{counts[0]}, {counts[1]}", f"{wider:g}", *cells]

    def pairs() -> Iterator[list[str]]:
        for runs, shared in product((2, 3, 5, 10), (0.0, 0.5, 0.9)):
            told, effect = ((runs, runs), 1.0, False), findable((runs, runs), 1.0, shared)
            cells = [share(ours(paired), 0.0, count // 4, *told, shared=shared) for paired in (False, True)]
            cells += [share(ours(paired), effect, count // 4, *told, shared=shared) for paired in (False, True)]
            yield [str(runs), f"{shared:g}", *map(percent, cells)]

    table("Unequal sides", ["noise", "seeds", "scatter of b / a", *(f"wrong: ratio {r:g}" for r in RATIOS)], rows())
    table(
        "The same seeds on both sides, ratio 1",
        ["seeds", "correlation", "wrong: apart", "wrong: in pairs", "found: apart", "found: in pairs"],
        pairs(),
    )


def scene(generator: np.random.Generator, objects: np.ndarray, ease: np.ndarray) -> Category:
    """Detections of a run: every object is found well or badly as its image is easy for the run, and some are false."""
    places = np.repeat(np.arange(len(objects)), objects)
    quality = ease[places] + generator.normal(size=len(places))  # in IoU: 0.5 + 0.15 per unit
    false = generator.integers(len(objects), size=len(places) // 2)
    scores = np.concatenate([quality + generator.normal(size=len(places)), generator.normal(-1, 1, len(false))])
    overlap = np.concatenate([0.7 + 0.15 * quality, np.zeros(len(false))])
    order = np.argsort(-scores)
    hits = overlap[order] >= np.linspace(0.5, 0.95, 10)[:, None]
    return Category(np.concatenate([places, false])[order], hits, np.ones_like(hits), objects.astype(float))


def precision(count: int, cells: Iterable[tuple[int, ...]]) -> None:
    """Average precision itself, which is no mean over images; `cells` are images with and without objects, seeds."""

    def rows() -> Iterator[list[str]]:
        for shown, others, runs in cells:
            images = shown + others
            generator, wrong, before = np.random.default_rng(images + runs), 0, 0
            times = np.concatenate([np.ones((1, images), dtype=int), draws(images, AP_DRAWS)])
            for _ in range(trials := max(20, count // 30)):
                objects, hard = np.maximum(1, generator.poisson(2, images)), generator.normal(size=images)
                objects[shown:] = 0  # false detections alone
                sides = []
                for _ in range(2):
                    ease = hard + 0.5 * generator.normal(size=images)
                    seeds = 0.15 * generator.normal(size=runs) * (runs > 1)
                    own = 0.3 * generator.normal(size=(runs, images))
                    ap = np.stack(
                        [average_precision(scene(generator, objects, ease + s + o), times) for s, o in zip(seeds, own)]
                    )
                    sides.append(ap)
                a, b = sides
                found = difference(a[:, 0], b[:, 0], a[:, 1:], b[:, 1:], images=shown, paired=False)
                wrong += p_value(found) < 0.05
                before += bool(old((a[None, :, 0], b[None, :, 0], a[None, :, 1:], b[None, :, 1:]), 0.0)[0])
            yield [str(shown), str(others), str(runs), str(trials), percent(wrong / trials), percent(before / trials)]

    table(
        "AP of simulated detections",
        ["images with objects", "without", "seeds", "trials", "wrong: ours", "wrong: percentiles"],
        rows(),
    )


def margin(count: int) -> None:
    """Sides said to differ by less than a margin: wrongly, at the margin, and rightly, where they are equal."""

    def told(edge: float) -> Callable[[Sides, float], np.ndarray]:
        def judged(sides: Sides, effect: float) -> np.ndarray:
            a, b, x, y = sides
            found = [
                difference(a[i], b[i] + effect, x[i], y[i] + effect, images=IMAGES, paired=False) for i in range(len(a))
            ]
            return np.array([equivalence_p(one, edge) < 0.05 for one in found])

        return judged

    def rows() -> Iterator[list[str]]:
        for (name, heavy), runs in product(KINDS.items(), (2, 3, 5, 10)):
            edge = 2 * findable((runs, runs), 1.0) / 2.8
            cells = [share(told(edge * k), edge * k, count // 2, (runs, runs), 1.0, heavy) for k in (1.0, 2.0)]
            cells += [share(told(edge * k), 0.0, count // 4, (runs, runs), 1.0, heavy) for k in (1.0, 2.0)]
            yield [name, str(runs), *map(percent, cells)]

    columns = ["noise", "seeds", "wrong: margin 2 errors", "wrong: 4 errors", "found: 2 errors", "found: 4 errors"]
    table("Equal but for a margin, in standard errors of the difference, ratio 1", columns, rows())


def classes(count: int) -> None:
    """Ten classes at once, in pairs: comparisons in which any class is wrongly said to differ."""

    def rows() -> Iterator[list[str]]:
        for runs, ratio in product((2, 3, 5), RATIOS):
            told = []
            for a, b, x, y in trials_of(2 * count, (runs, runs), ratio, False):
                found = [difference(a[i], b[i], x[i], y[i], images=IMAGES, paired=True) for i in range(len(a))]
                told += [p_value(one) for one in found]
            families = np.array(told).reshape(-1, 10)
            wrong = [np.mean(families.min(1) < 0.05), np.mean([min(holm(row.tolist())) < 0.05 for row in families])]
            yield [str(runs), f"{ratio:g}", *(percent(float(x)) for x in wrong)]

    table("Ten classes at once, in pairs", ["seeds", "ratio", "wrong: each by itself", "wrong: Holm"], rows())


def advice(count: int) -> None:
    """The number of seeds that is said to tell an effect, and how often it does."""

    def rows() -> Iterator[list[str]]:
        for seen in (3, 5, 10):
            effect, asked = 5 * UNIT, []
            for a, b, x, y in trials_of(count // 10, (seen, seen), 2.0, False):
                found = [difference(a[i], b[i], x[i], y[i], images=IMAGES, paired=False) for i in range(len(a))]
                asked += [need(one, effect).seeds for one in found]
            numbers = [one for one in asked if one is not None]
            told = {n: share(ours(False), effect, 1000, (n, n), 2.0, False) for n in set(numbers) if n <= 25}
            power = np.mean([told.get(n, 1.0) for n in numbers])
            quarters = np.quantile(numbers, [0.25, 0.5, 0.75])
            yield [str(seen), *(f"{q:.0f}" for q in quarters), percent(1 - len(numbers) / len(asked)), percent(power)]

    columns = ["seeds seen", "quarter", "median", "three quarters", "cannot be told", "found when followed"]
    table("Seeds asked for, ratio 2, effect of 5 deviations of the images", columns, rows())


def mattered(count: int) -> None:
    """Settings said to matter: any, where none does; and the planted one of two deviations."""
    designs: list[tuple[tuple[int, ...], int]] = [
        ((2,), 2),
        ((2,), 6),
        ((2, 2), 1),
        ((2, 2), 2),
        ((2, 2), 3),
        ((2, 3), 2),
        ((2, 6), 1),
        ((2, 2, 3), 1),
    ]
    designs += [((2, 3, 4), 1), ((2, 2), 10)]

    def rows() -> Iterator[list[str]]:
        for levels, seeds in designs:
            points = [point for point in product(*map(range, levels)) for _ in range(seeds)]
            settings = {f"s{i}": [str(point[i]) for point in points] for i in range(len(levels))}
            first = np.array([point[0] for point in points])
            cells = []
            for heavy, effect in ((False, 0.0), (True, 0.0), (False, 2.0), (True, 2.0)):
                generator, told = np.random.default_rng(5), []
                for _ in range(count // 2):
                    found = importances(settings, noise(generator, heavy, len(points)) + effect * first, deals=499)
                    told.append(any(one.p < 0.05 and (not effect or one.names == ("s0",)) for one in found))
                cells.append(percent(float(np.mean(told))))
            least = max(one.least for one in importances(settings, first, deals=499) if one.names == ("s0",))
            yield [" x ".join(map(str, levels)), str(seeds), str(len(points)), f"{least:.3f}", *cells]

    columns = ["levels", "seeds", "runs", "least p", "wrong: normal", "wrong: t", "found: normal", "found: t"]
    table("What mattered: a two-level setting of two deviations", columns, rows())


def raced(values: np.ndarray) -> tuple[int, np.ndarray]:
    """The winner of a race, and how many seeds each point saw, of the grid `[P, S]`."""
    points, seeds = values.shape
    alive, seen = list(range(points)), np.ones(points, dtype=int)
    while True:
        left, run = budget(points, seeds) - int(seen.sum()), int(seen.max())
        alive = [alive[place] for place in survivors(values[alive, :run], left=left, rounds=seeds - run)]
        if len(alive) == 1:
            return alive[0], seen
        seen[alive] += 1


def race(count: int) -> None:
    """Races at 60 % of the grid: the true mean of their winner beside that of the grid's winner."""
    scenes: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
        "nothing differs": lambda _, n: np.zeros(n),
        "one is better by a deviation": lambda _, n: np.eye(n)[0],
        "points scatter like seeds": lambda generator, n: generator.normal(size=n),
        "from 0 to 3 deviations": lambda _, n: np.linspace(0, 3, n),
    }

    def rows() -> Iterator[list[str]]:
        for (words, truth), seeds, points in product(scenes.items(), (3, 5, 10), (3, 4, 6, 12, 24)):
            cells = []
            for heavy in (False, True):
                generator, near, cost = np.random.default_rng(9), 0, 0.0
                for _ in range(trials := count // 10):
                    means = truth(generator, points)
                    values = means[:, None] + noise(generator, heavy, points, seeds) + generator.normal(size=seeds) / 2
                    winner, seen = raced(values)
                    near += means[winner] >= means[values.mean(1).argmax()] - 0.5
                    cost += seen.sum() / values.size
                cells += [percent(near / trials), percent(cost / trials)]
            yield [words, str(points), str(seeds), *cells]

    columns = ["points", "number", "seeds", "as good: normal", "cost", "as good: t", "cost"]
    table("Races: winner within half a deviation of the grid's", columns, rows())


def means(count: int) -> None:
    """Intervals of means over seeds: of any point, after a race, and of the best of several."""

    def held(results: np.ndarray, truth: float) -> bool:
        low, high = mean_of(results.tolist()).interval or (-np.inf, np.inf)
        return low <= truth <= high

    def alone() -> Iterator[list[str]]:
        for seeds in (2, 3, 5, 10, 20):
            generator = np.random.default_rng(12)
            cells = [
                np.mean([held(row, 0.0) for row in noise(generator, heavy, count, seeds)]) for heavy in KINDS.values()
            ]
            yield [str(seeds), *(percent(float(share)) for share in cells)]

    def chosen() -> Iterator[list[str]]:
        for spread, points, seeds in product((0.0, 1.0), (3, 6, 12), (3, 5, 10)):
            generator, every, winner, best = np.random.default_rng(13), [], [], []
            for _ in range(count // 10):
                truth = spread * generator.normal(size=points)
                values = truth[:, None] + generator.normal(size=(points, seeds))
                won, seen = raced(values)
                rows = [held(values[k, : seen[k]], truth[k]) for k in range(points) if seen[k] > 1]
                every += rows
                winner.append(held(values[won, : seen[won]], truth[won]))
                first = values.mean(1).argmax()
                best.append(held(values[first], truth[first]))
            cells = [percent(float(np.mean(one))) for one in (every, winner, best)]
            yield [f"{spread:g}", str(points), str(seeds), *cells]

    columns = ["seeds", "normal", "t, 3 df"]
    table("Intervals of means that hold the true mean", columns, alone())
    columns = [
        "points scatter by",
        "points",
        "seeds",
        "in a race: any point",
        "in a race: its winner",
        "best of the grid",
    ]
    table("The same for points that were chosen", columns, chosen())


def costs(count: int) -> None:
    """Networks of equal cost of which one is said to be cheaper, and of a cost that is a tenth lower."""

    def rows() -> Iterator[list[str]]:
        for networks, runs, (words, ratio) in product((2, 4, 8), (2, 3, 10), (("alike", 0.0), ("three times", 3.0))):
            generator, cells = np.random.default_rng(14), []
            for cheaper in (0.0, 0.1):
                several = 0
                for _ in range(count // 10):
                    scatter = 0.03 * ratio * generator.normal(size=(networks, runs, 1))
                    times = 10 + 10 * scatter + 0.3 * generator.normal(size=(networks, runs, 5))
                    times[0] *= 1 - cheaper
                    each = np.median(times, axis=2)
                    noise = noise_of(each.tolist())
                    assert noise is not None
                    points = [
                        Cost(one.mean(), noise.share * one.mean() / runs**0.5, gain) for gain, one in enumerate(each)
                    ]
                    several += len(front(points, noise.freedom)) > 1
                cells.append(percent(several / (count // 10)))
            yield [str(networks), str(runs), words, *cells]

    columns = ["networks", "runs of each", "scatter of runs beside that of evaluations"]
    columns += ["wrong: equal ones told apart", "found: one a tenth cheaper"]
    table("Front of accuracy and time, timings that scatter by 3 %, five in a run", columns, rows())


def honest(count: int) -> None:
    """How far what is told of a choice's luck is from it, beside the plain difference of the halves."""

    def rows() -> Iterator[list[str]]:
        for (name, heavy), offered, spread in product(KINDS.items(), (5, 40), (0.0, 1.0)):
            generator, found = np.random.default_rng(11), []
            for _ in range(count // 2):
                truth, hard = spread * generator.normal(size=offered), 2 * generator.normal(size=2)
                a, b = (truth + h + noise(generator, heavy, offered) for h in hard)
                told = flattery([Choice(*pair) for pair in zip(a, b)], [Choice(*pair) for pair in zip(b, a)])
                luck = told.choice.here - hard[0] - truth[a.argmax()]
                found.append((luck, told.luck, told.choice.here - told.choice.there))
            luck, ours, plain = np.array(found).T
            means = [f"{values.mean():.2f}" for values in (luck, ours, plain)]
            errors = [f"{np.sqrt(((values - luck) ** 2).mean()):.2f}" for values in (ours, plain)]
            yield [name, str(offered), f"{spread:g}", *means, *errors]

    columns = ["noise", "choices", "they scatter by", "luck", "told", "difference of the halves"]
    table(
        "Luck of a choice, in deviations of a value on one half",
        [*columns, "error of what is told", "error of the difference"],
        rows(),
    )


def main() -> None:
    parts: dict[str, Callable[[int], None]] = {"equal": equal, "unequal": unequal, "margin": margin, "classes": classes}
    parts |= {"precision": partial(precision, cells=CELLS)}
    parts |= {"need": advice, "mattered": mattered, "race": race, "honest": honest, "means": means, "costs": costs}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--only", default=",".join(parts), help="names of parts, with commas")
    parser.add_argument("--cell", help="of precision: images with objects, without, seeds: 12,60,5; default: all")
    words = parser.parse_args()
    if words.cell:
        parts["precision"] = partial(precision, cells=[tuple(map(int, words.cell.split(",")))])
    for name in words.only.split(","):
        start = time.perf_counter()
        parts[name](words.trials)
        print(f"\n({name}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
