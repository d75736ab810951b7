"""Whether one run is better than another: `python -m detr_exp.compare a=<run> b=<run>`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.config.keys import SELECTION
from detr_exp.data.splits import HELD_OUT
from detr_exp.runs.past import PastRun, find, load_all
from detr_exp.runs.settings import SEED, Point, differing, in_pairs, points
from detr_exp.terminal import say
from detr_exp.values import Values
from detr_exp.writing import write

USAGE = """\
Evaluate two runs on the same images and test whether the difference is significant.

  python -m detr_exp.compare a=outputs/<day>/<run> b=outputs/<day>/<run>
  python -m detr_exp.compare a=[RUN,RUN,RUN] b=[RUN,RUN,RUN]      several seeds on each side
  python -m detr_exp.compare a=RUN b=outputs/sweeps/<sweep>       each point of a sweep; its seeds are one side

The images are resampled (bootstrap, the same resamples for all runs); the confidence interval covers images and seeds.
With one run per side it covers the choice of images only: the verdict is about these two checkpoints, not about their
settings. If both sides have the same seeds, runs are paired by seed. Verdicts on several metrics, classes or points are
corrected for multiple testing (Holm).

  a, b               run folders or ids; a list: runs with different seeds; a sweep folder: each of its points
  metrics            mAP, mAP50, mAP_small, segm_mAP, AP/<class>, ... or those of a custom evaluator; null:
                     trainer.monitor of a, or mAP where that is none of these average precisions
  margin             differences below it are irrelevant: both sides can be called equivalent; null: no such test
  data.split         val, train or test; of runs with metric.honest_selection val is the half that has not chosen
  data, data.root    other data, or their new folder; null: those of the first run of a
  resamples, level   number of bootstrap resamples, and confidence level of the interval
  trainer/hardware   auto, cpu, cuda, mps; null: as in each run
  root               folder that is searched for ids
  allow_targets      custom packages that the checkpoints' configs may name
"""


if TYPE_CHECKING:
    import numpy as np

    from detr_exp.inference.on_data import OnData
    from detr_exp.runs.comparison import Scores, Side


class Evaluated(NamedTuple):
    """What one run reaches.

    Attributes:
        values: of all metrics.
        ap: metric -> category -> `[1 + B]` AP of the split and of each draw of its images.
        objects: metric -> category -> `[I]` objects to be found in each image.
    """

    values: dict[str, float]
    ap: dict[str, dict[int, np.ndarray]]
    objects: dict[str, dict[int, np.ndarray]]


def compare(cfg: DictConfig) -> float:
    """One comparison in Hydra's output folder; the difference b - a of the first metric."""
    return compare_in(Path(HydraConfig.get().runtime.output_dir), cfg)["comparisons"][0]["difference"]


def compare_in(folder: Path, cfg: DictConfig) -> Values:
    """Compare, print, and write `compare.json` into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/compare.yaml`.

    Returns:
        what the file holds; see `runs.comparison.text`. Where there is one comparison, its fields stand above as well.

    Raises:
        ValueError: runs or data cannot be read, or have nothing in common.
    """
    from detr_exp.inference.on_data import on_data, open_detector
    from detr_exp.runs.comparison import compared, text

    pairs = in_pairs(*(sides_of(_plain(cfg[name]), cfg.root, name) for name in ("a", "b")))
    if same := sorted({str(run.folder) for a, b in pairs for run in a if run.folder in {one.folder for one in b}}):
        say(f"warning: on both sides: {', '.join(same)}")
    first = pairs[0][0][0]
    opened = on_data(open_detector(cfg, first.folder), cfg)
    if "backend" in opened.cfg.metric:
        opened.cfg.metric.backend = "pycocotools"  # shows which detection found what
    trained_on = opened.detector.cfg.data
    runs = list({run.folder: run for pair in pairs for side in pair for run in side}.values())
    opened, split = _judging(runs, opened, cfg.data.split)
    data = opened.data
    if opened.cfg.data.get("root") == trained_on.get("root") and "_target_" not in _plain(cfg.data):
        _say_other_data(runs, data.fingerprint)
    evaluated, names = _evaluated(runs, cfg, opened, split)
    made = [tuple(_without_copies(_side(side, evaluated, names, data)) for side in pair) for pair in pairs]
    found = compared([(a, b) for a, b in made], level=cfg.level, margin=cfg.margin)
    for (a, b), one in zip(made, found):
        one["config"] = [list(row) for row in differing(a.runs, b.runs)]
    summary = {"split": split, "images": len(data.split(split).image_ids)}
    summary |= {name: cfg[name] for name in ("resamples", "level", "margin")} | {"comparisons": found}
    folder.mkdir(parents=True, exist_ok=True)
    kept = {**(found[0] if len(found) == 1 else {}), **summary}
    write(folder / "compare.json", json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    say(text(summary))
    say(f"written to {folder}")
    return kept


def sides_of(words: str | list[str], root: str, name: str) -> list[Point]:
    """The points that the words for a side mean: one, or those of a sweep.

    Args:
        words: of the command line; where each of them means one run, these are one side, whatever their settings.
        root: where ids are looked for.
        name: of the side.

    Raises:
        ValueError: a word that means no run, or files that are damaged.
    """
    each = [words] if isinstance(words, str) else words
    runs = _readable(load_all(find(words, root)))
    found = points(runs)
    if len(found) == 1 or any(len(find(word, root)) > 1 for word in each):
        return found
    keys = ", ".join(key for key, *_ in differing(*found) if key != SEED)
    say(
        f"warning: the runs of {name} differ by more than their seed ({keys}); their scatter is taken for that of seeds"
    )
    return [runs]


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


def _judging(runs: Sequence[PastRun], opened: OnData, asked: str) -> tuple[OnData, str]:
    """The data and the split to compare on: instead of `val` the half of it that chose none of the checkpoints."""
    from detr_exp import build

    halved = [run for run in runs if run.config.get("metric", {}).get(SELECTION)]
    if asked != "val" or not halved:
        return opened, asked
    if len(halved) == len(runs) and opened.data.held_out is not None:
        say("compared on the half of the validation images that has chosen no checkpoint (data.split=held_out)")
        return opened, HELD_OUT
    if len(halved) < len(runs):
        flattered = next(run for run in runs if run not in halved)
        say(
            f"warning: all of these images have chosen the epoch of {flattered.folder}, and half of them that of "
            f"{halved[0].folder}, which flatters the first; compare on others: data.split=test"
        )
    return opened if opened.data.held_out is None else replace(opened, data=build.data(opened.cfg)), asked


def _evaluated(
    runs: Sequence[PastRun], cfg: DictConfig, opened: OnData, split: str
) -> tuple[dict[Path, Evaluated], list[str]]:
    """Every run, evaluated on the same images and the same draws of them, and the names of the metrics."""
    from detr_exp.inference.on_data import open_detector
    from detr_exp.metric.backend import CocoEvaluation
    from detr_exp.metric.bootstrap import draws

    said = [cfg.metrics] if isinstance(cfg.metrics, str) else cfg.metrics or []
    names = list(dict.fromkeys(name.removeprefix("val/") for name in said))
    times = draws(len(opened.data.split(split).image_ids), cfg.resamples)
    found = {}
    for run in runs:
        one = replace(opened, detector=open_detector(cfg, run.folder))
        metric = one.metric(split)
        values = one.evaluate(one.loader(split), metric)
        if isinstance(metric, CocoEvaluation):  # -1: the ground truth has no such object
            values = {name: math.nan if value == -1 else value for name, value in values.items()}
        names = names or [_judged_by(run, values, isinstance(metric, CocoEvaluation))]
        if count := values.get("nonfinite"):
            raise ValueError(
                f"{run.folder}: {count:.0f} predictions of its network are not finite, so it has no result to compare; "
                f"leave it out, and name the runs of its side one by one"
            )
        found[run.folder] = Evaluated(values, *_drawn(run, names, values, metric, opened.data.category_ids, times))
    return found, names


def _judged_by(run: PastRun, values: dict[str, float], has_ap: bool) -> str:
    """What a run was judged by, or what its evaluator gives first."""
    from detr_exp.metric.bootstrap import kind_of
    from detr_exp.trainer.evaluation import headline

    monitored = run.monitor.removeprefix("val/")
    if has_ap and kind_of(monitored) is None:
        return "mAP"
    return monitored if monitored in values else next(iter(headline(values)))


def _drawn(
    run: PastRun, names: Sequence[str], values: dict[str, float], metric: object, ids: Sequence[int], times: np.ndarray
) -> tuple[dict[str, dict[int, np.ndarray]], dict[str, dict[int, np.ndarray]]]:
    """AP and objects of every metric that is a mean of average precisions.

    Raises:
        ValueError: the evaluator does not give a metric.
    """
    import numpy as np

    from detr_exp.metric.backend import CocoEvaluation
    from detr_exp.metric.bootstrap import average_precision, kind_of, matched

    ap: dict[str, dict[int, np.ndarray]] = {}
    objects: dict[str, dict[int, np.ndarray]] = {}
    both = np.concatenate([np.ones((1, times.shape[1]), dtype=int), times])
    for name in names:
        kind = kind_of(name)
        if name not in values:
            kin = [known for known in values if known.partition("/")[0] == name.partition("/")[0]]  # classes
            given = kin or [known for known in values if "/" not in known and known != "nonfinite"]
            raise ValueError(
                f"{run.folder} gives no {name}; it gives {', '.join(given)}: compare it by one of these, "
                f"metrics=['{given[0]}'], or with runs of its own task"
            )
        if kind is not None and isinstance(metric, CocoEvaluation):
            labels = dict(zip(metric.category_ids, metric.metric_names()))
            known = [number for number in ids if number in labels and kind.label in ("", labels[number])]
            found = dict(zip(known, matched(metric, kind.iou_type, known, kind.area)))
            if found:
                ap[name] = {number: average_precision(one.at(kind.thresholds), both) for number, one in found.items()}
                objects[name] = {number: one.objects for number, one in found.items()}
    return ap, objects


def _side(runs: Sequence[PastRun], evaluated: dict[Path, Evaluated], names: Sequence[str], data: Any) -> Side:
    """What the runs of a side reach, of the classes that all runs know."""
    import numpy as np

    from detr_exp.metric.bootstrap import kind_of
    from detr_exp.runs.comparison import Scores, Side

    own = [evaluated[run.folder] for run in runs]
    metrics: dict[str, Scores] = {}
    classes: dict[str, Scores] = {}
    of_classes = next((name for name in own[0].ap if (kind := kind_of(name)) is not None and not kind.label), "")
    for name in names:
        if name not in own[0].ap:
            measured = np.array([one.values[name] for one in own])
            metrics[name] = Scores(measured, None, 0)
            continue
        known = [number for number in data.category_ids if all(number in one.ap[name] for one in evaluated.values())]
        if not known:
            raise ValueError(
                f"the runs have no class in common that these data show, so there is nothing to compare by {name}; "
                f"compare runs that know the same classes, or on data that show them: data.root=..."
            )
        ap = np.array([[one.ap[name][number] for number in known] for one in own])  # [n, K, 1 + B]
        shown = np.array([own[0].objects[name][number] > 0 for number in known])  # [K, I]
        present = shown.any(1)
        with np.errstate(all="ignore"):
            total = np.nansum(ap[:, present], axis=1) / np.count_nonzero(~np.isnan(ap[:, present]), axis=1)
        metrics[name] = Scores(total[:, 0], total[:, 1:], int(shown.any(0).sum()))
        if name == of_classes:
            titles = dict(zip(data.category_ids, data.classes))
            classes = {
                titles[number]: Scores(ap[:, k, 0], ap[:, k, 1:], int(shown[k].sum())) for k, number in enumerate(known)
            }
    return Side(runs, metrics, classes, of_classes)


def _without_copies(side: Side) -> Side:
    """A side without runs that are another one again: they would make seeds look as if they did not scatter."""
    from detr_exp.runs.comparison import copies

    left_out = copies(side)
    for place in left_out:
        say(f"warning: left out: {side.runs[place].folder} has the seed and the results of another run of its side")
    return side.in_order([place for place in range(len(side.runs)) if place not in left_out])


def _say_other_data(runs: Sequence[PastRun], fingerprint: str) -> None:
    for run in runs:
        recorded = run.record.tags.get("data.fingerprint", fingerprint)
        if recorded != fingerprint:
            say(f"warning: {run.folder} was trained on other data ({recorded}, here {fingerprint})")


def _plain(node: object) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else str(node)


def main() -> None:
    cli.main(compare, "compare", USAGE)


if __name__ == "__main__":
    main()
