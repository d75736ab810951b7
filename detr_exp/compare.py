"""Whether one run is better than another: `python -m detr_exp.compare a=<run> b=<run>`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.config.keys import NO_NUMBER, is_under
from detr_exp.runs.past import PastRun, find, load_all
from detr_exp.terminal import say
from detr_exp.values import Values, flat
from detr_exp.writing import write

USAGE = """\
Evaluate two runs on the same images and test whether the difference is significant.

  python -m detr_exp.compare a=outputs/<day>/<run> b=outputs/<day>/<run>
  python -m detr_exp.compare a=[RUN,RUN,RUN] b=[RUN,RUN,RUN]      several seeds on each side

The images are resampled with replacement (paired bootstrap); the interval contains 95 of 100 of the differences. With
one run per side it covers the choice of images only; with several runs it also covers seeds.

  a, b               run folders or ids; a list or a sweep folder: runs with different seeds
  data.split         val, train or test
  data, data.root    other data, or their new folder; null: those of the first run of a
  resamples, level   number of bootstrap resamples, and confidence level of the interval
  trainer/hardware   auto, cpu, cuda, mps; null: as in each run
  root               folder that is searched for ids
  allow_targets      custom packages that the checkpoints' configs may name
"""

if TYPE_CHECKING:
    import numpy as np

    from detr_exp.inference.on_data import OnData


@dataclass
class Side:
    """The runs of one side.

    Attributes:
        runs: what they recorded.
        ap: `[runs, K]` AP of every class.
        drawn: `[runs, B, K]` the same for every draw of the images.
    """

    runs: list[PastRun]
    ap: np.ndarray
    drawn: np.ndarray


def compare(cfg: DictConfig) -> float:
    """One comparison in Hydra's output folder; the difference of mAP, b - a."""
    return compare_in(Path(HydraConfig.get().runtime.output_dir), cfg)["difference"]


def compare_in(folder: Path, cfg: DictConfig) -> Values:
    """Compare, print, and write `compare.json` into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/compare.yaml`.

    Returns:
        what the file holds, of the task the first run was judged by.

    Raises:
        ValueError: runs or data cannot be read, or have nothing in common.
    """
    from detr_exp.inference.on_data import on_data, open_detector
    from detr_exp.metric.backend import CocoEvaluation

    if cfg.resamples < 1 or not 0 < cfg.level < 1:
        raise ValueError(f"resamples={cfg.resamples} level={cfg.level} is no interval; use resamples=1000 level=0.95")
    sides = [_readable(load_all(find(_plain(words), cfg.root))) for words in (cfg.a, cfg.b)]
    opened = on_data(open_detector(cfg, sides[0][0].folder), cfg)
    if "backend" in opened.cfg.metric:
        opened.cfg.metric.backend = "pycocotools"  # shows which detection found what
    data, trained_on = opened.data, opened.detector.cfg.data
    if opened.cfg.data.get("root") == trained_on.get("root") and "_target_" not in _plain(cfg.data):
        _say_other_data(sides, data.fingerprint)
    if isinstance(opened.metric(cfg.data.split), CocoEvaluation):
        found = statistics(*_evaluated(sides, cfg, opened), cfg.level)
    else:
        found = _values(sides, cfg, opened)
    found = {"split": cfg.data.split, **found}
    found["config"] = [list(row) for row in config_difference(*sides)]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "compare.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    say(text(found))
    say(f"written to {folder}")
    return found


def _readable(side: list[PastRun]) -> list[PastRun]:
    """The runs of a side whose checkpoint can be read; the others are named.

    Raises:
        ValueError: there is none.
    """
    from detr_exp.trainer import checkpoint as files

    if len(side) == 1:
        return side  # said where it is read
    kept, damaged = [], []
    for run in side:
        try:
            files.load(files.resolve(run.folder))
        except ValueError as error:
            damaged.append(error)
        else:
            kept.append(run)
    if not kept:
        raise damaged[0]
    for reason in damaged:
        say(f"warning: left out: {reason}")
    return kept


def _evaluated(sides: list[list[PastRun]], cfg: DictConfig, opened: OnData) -> tuple[Side, Side, list[str]]:
    """Both sides, evaluated on the same images and the same draws of them, and the classes all of them know."""
    import numpy as np

    from detr_exp.inference.on_data import open_detector
    from detr_exp.metric.backend import CocoEvaluation
    from detr_exp.metric.bootstrap import average_precision, draws, matched

    iou_type = {"val/segm_mAP": "segm", "val/keypoint_mAP": "keypoints"}.get(sides[0][0].monitor, "bbox")
    data = opened.data
    times = draws(len(data.split(cfg.data.split).image_ids), cfg.resamples)
    once = np.ones((1, times.shape[1]), dtype=int)
    known = list(data.category_ids)
    results: list[list[dict[int, np.ndarray]]] = []
    for side in sides:
        results.append([])
        for run in side:
            one = replace(opened, detector=open_detector(cfg, run.folder))
            metric = one.metric(cfg.data.split)
            if not isinstance(metric, CocoEvaluation) or iou_type not in metric.iou_types:
                judged = f"by which {sides[0][0].folder} was judged"
                raise ValueError(f"{run.folder} gives no {iou_type}, {judged}; compare it with runs of its own task")
            if count := one.evaluate(one.loader(cfg.data.split), metric).get("nonfinite"):
                raise ValueError(
                    f"{run.folder}: {count:.0f} predictions of its network are not finite, so it has no result to "
                    f"compare; leave it out, and name the runs of its side one by one"
                )
            known = [number for number in known if number in metric.category_ids]
            categories = zip(known, matched(metric, iou_type, known))
            both = np.concatenate([once, times])
            results[-1].append({number: average_precision(category, both) for number, category in categories})
    a, b = (np.stack([np.stack([ap[number] for number in known], axis=1) for ap in side]) for side in results)
    names = dict(zip(data.category_ids, data.classes))
    made = [Side(runs, found[:, 0], found[:, 1:]) for runs, found in zip(sides, (a, b))]
    return made[0], made[1], [names[number] for number in known]


def _values(sides: list[list[PastRun]], cfg: DictConfig, opened: OnData) -> Values:
    """What both sides reach by an evaluator that is not COCO's: it does not say what is due to which image."""
    from detr_exp.inference.on_data import open_detector
    from detr_exp.trainer.evaluation import headline

    measured = []
    for run in (run for side in sides for run in side):
        one = replace(opened, detector=open_detector(cfg, run.folder))
        measured.append(one.evaluate(one.loader(cfg.data.split), one.metric(cfg.data.split)))
    told = sides[0][0].monitor.removeprefix("val/")
    name = told if all(told in found for found in measured) else next(iter(headline(measured[0])))
    values = [found[name] for found in measured]
    a, b = values[: len(sides[0])], values[len(sides[0]) :]
    return {
        "a": {"runs": [str(run.folder) for run in sides[0]], name: a},
        "b": {"runs": [str(run.folder) for run in sides[1]], name: b},
        "value": name,
        "difference": sum(b) / len(b) - sum(a) / len(a),
    }


def statistics(a: Side, b: Side, classes: Sequence[str], level: float) -> Values:
    """Means, their difference and its interval, for all classes together and each of them.

    In every draw of the images the runs of a side are drawn as well, where there are several.
    """
    import numpy as np

    from detr_exp.metric.bootstrap import interval

    generator = np.random.default_rng(1)
    drawn = []
    for side in (a, b):
        runs, count, _ = side.drawn.shape
        chosen = generator.integers(runs, size=(count, runs))
        drawn.append(side.drawn[chosen, np.arange(count)[:, None]].mean(axis=1))  # [B, K]
    present = ~np.isnan(a.ap[0])
    per_class = drawn[1] - drawn[0]
    with np.errstate(all="ignore"):
        overall = np.nanmean(np.where(present, per_class, np.nan), axis=1)
    values = [np.nanmean(side.ap[:, present], axis=1) for side in (a, b)]
    rows = [
        {
            "class": name,
            "a": float(a.ap[:, k].mean()),
            "b": float(b.ap[:, k].mean()),
            "difference": float(b.ap[:, k].mean() - a.ap[:, k].mean()),
            "interval": list(interval(per_class[:, k], level)),
        }
        for k, name in enumerate(classes)
        if present[k]
    ]
    return {
        "a": {"runs": [str(run.folder) for run in a.runs], "mAP": values[0].tolist()},
        "b": {"runs": [str(run.folder) for run in b.runs], "mAP": values[1].tolist()},
        "difference": float(values[1].mean() - values[0].mean()),
        "interval": list(interval(overall, level)),
        "level": level,
        "resamples": len(overall),
        "b_is_better_in": float((overall > 0).mean()),
        "classes": sorted(rows, key=lambda row: -abs(cast(float, row["difference"]))),
    }


def config_difference(a: Sequence[PastRun], b: Sequence[PastRun]) -> list[tuple[str, str, str]]:
    """Keys whose values are not the same on both sides, with the values on each."""

    def values(configs: Sequence[Values], key: str) -> str:
        found = (config.get(key, "-") for config in configs)
        return ", ".join(dict.fromkeys("null" if value is None else str(value) for value in found))

    sides = [[flat(run.config) for run in side] for side in (a, b)]
    keys = dict.fromkeys(key for configs in sides for config in configs for key in config)
    rows = [(key, values(sides[0], key), values(sides[1], key)) for key in keys if not is_under(key, NO_NUMBER)]
    return [row for row in rows if row[1] != row[2]]


def text(found: Values) -> str:
    """The comparison as a person reads it."""
    value = found.get("value", "mAP")
    lines = [f"\n{found['split']} split"]
    for name in ("a", "b"):
        side = found[name]
        lines.append(f"  {name}  {value} {spread(side[value])}  {', '.join(side['runs'][:4])}")
    if "interval" in found:
        lines += _told_interval(found)
    else:
        lines.append(f"  b - a  {found['difference']:+.4f}; no interval: the evaluator says nothing of single images")
    if found["config"]:
        width = max(len(key) for key, _, _ in found["config"])
        lines += ["", "settings that differ (a -> b)"]
        lines += [f"  {key:<{width}}  {before} -> {after}" for key, before, after in found["config"]]
    return "\n".join([*lines, ""])


def _told_interval(found: Values) -> Iterator[str]:
    """The verdict, and a line per class."""
    low, high = found["interval"]
    verdict = "b is better" if low > 0 else "a is better" if high < 0 else "no difference can be told"
    yield (
        f"  b - a  {found['difference']:+.4f}, {found['level']:.0%} of {found['resamples']} draws between {low:+.4f} "
        f"and {high:+.4f}: {verdict} (b is ahead in {found['b_is_better_in']:.1%})\n"
    )
    width = max([5, *(len(row["class"]) for row in found["classes"])])
    yield f"{'class':<{width}}       a       b    b - a  interval (* without 0)"
    for row in found["classes"]:
        low, high = row["interval"]
        star = " *" if low > 0 or high < 0 else ""
        yield (
            f"{row['class']:<{width}}  {row['a']:.4f}  {row['b']:.4f}  {row['difference']:+.4f}  "
            f"{low:+.4f} .. {high:+.4f}{star}"
        )


def spread(values: Sequence[float]) -> str:
    """One value, or mean and standard deviation of several."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.4f} +- {deviation:.4f} ({len(values)} runs)"


def _say_other_data(sides: list[list[PastRun]], fingerprint: str) -> None:
    for run in (run for side in sides for run in side):
        recorded = run.record.tags.get("data.fingerprint", fingerprint)
        if recorded != fingerprint:
            say(f"warning: {run.folder} was trained on other data ({recorded}, here {fingerprint})")


def _plain(node: object) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else str(node)


def main() -> None:
    cli.main(compare, "compare", USAGE)


if __name__ == "__main__":
    main()
