"""Which smaller networks a checkpoint holds, and what they reach: `python -m detr_exp.pareto checkpoint=...`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.config.compose import compose
from detr_exp.deploy.forms import FORMS, image_to_time, in_form, interleaved, median_of
from detr_exp.terminal import say
from detr_exp.values import Values
from detr_exp.writing import write

USAGE = """\
Evaluate the members of a trained network (fewer decoder layers or queries, other image sizes), time those that may be
worth it, and name the best: fast, balanced, accurate.

  python -m detr_exp.pareto checkpoint=RUN_FOLDER
  python -m detr_exp.pareto checkpoint=RUN_FOLDER pareto.layers=[1,2,3] 'pareto.image_sizes=[256,320,[320,480]]'
  python -m detr_exp.pareto checkpoint=RUN_FOLDER pareto.search=40
  python -m detr_exp.pareto checkpoint=RUN_FOLDER pareto.form=onnx pareto.export=balanced
  python -m detr_exp.evaluate checkpoint=RUN_FOLDER at.name=balanced data.split=test       one of them, in every command

  checkpoint            a file, a run folder (its best checkpoint) or a run id
  weights               ema or raw; null: the weights of the file
  pareto.layers, .queries, .image_sizes     the grid; null: what the network can
  pareto.search         so many members, chosen by what earlier ones reach, in place of the grid; needs optuna
  pareto.metric         what is to be high; null: what the training monitored
  pareto.form           in which the latency is measured: {forms}
  pareto.rounds         more rounds make the medians surer
  pareto.resamples      draws of the images that show how sure differences of AP are
  pareto.export         a point to export, with all checks of detr_exp.export; format=onnx|torchscript|openvino|tensorrt
  data.split            val, train, test or held_out; also data, data.root, data.num_workers
  batch_size            null: as in training, which gives exactly the numbers of detr_exp.evaluate
  metric                fast or pycocotools; null: the checkpoint's
  trainer/hardware      auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets         custom packages that the checkpoint's config may name

Members of one image size share backbone and encoder, and those with as many queries the decoder, so that dozens of
them take the time of a few evaluations. Writes members.json and pareto.html, and the names beside the checkpoint.
""".replace("{forms}", ", ".join(FORMS))

if TYPE_CHECKING:
    import numpy as np

    from detr_exp.inference.on_data import OnData
    from detr_exp.inference.shared import Measured
    from detr_exp.model.member import Member
    from detr_exp.protocols import Metric
    from detr_exp.runs.members_page import Point
    from detr_exp.trainer.console import Console


def pareto(cfg: DictConfig) -> None:
    """`members.json` and `pareto.html` in Hydra's output folder."""
    pareto_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def pareto_in(folder: Path, cfg: DictConfig) -> Values:
    """Evaluate and time members of a checkpoint, and write what was found.

    Args:
        folder: made if absent.
        cfg: see `conf/pareto.yaml`.

    Returns:
        the content of `members.json`, which is also written beside the checkpoint.

    Raises:
        ValueError: checkpoint or data cannot be read, or the network has no such members.
        GateError: the exported file differs from its member.
    """
    from detr_exp.inference.members import file_of, grid_of
    from detr_exp.inference.on_data import on_data, open_detector
    from detr_exp.runs import members_page
    from detr_exp.trainer.console import Console

    _refuse_settings(cfg)
    detector = open_detector(cfg)
    members = grid_of(detector.network, *_grid(cfg), fine=cfg.pareto.search is not None)
    opened, console = on_data(detector, cfg), Console("rich")
    started = _cpu_seconds()
    by_name, points = _evaluated(opened, cfg, members, console)
    seconds = _cpu_seconds() - started
    timed = [point for point in points if point.timed]
    console.line(f"{len(points)} evaluated in {seconds:.1f} s of CPU time; measuring the latency of {len(timed)}")
    _time(timed, by_name, opened, cfg)
    content = members_page.content(points, _facts(opened, cfg, seconds))
    if cfg.pareto.export is not None and cfg.pareto.export not in (*by_name, *content["names"]):
        raise ValueError(
            f"pareto.export is {cfg.pareto.export}, and the points are {', '.join((*content['names'], *by_name))}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write(folder / "members.json", text)
    write(folder / "pareto.html", members_page.render(content, datetime.now()))
    console.table(members_page.table(content), left=2)
    console.line(f"written to {folder}")
    try:
        write(file_of(detector.path), text)
    except OSError as error:
        say(f"warning: {file_of(detector.path)} cannot be written ({error.strerror}), so at.name finds no point")
        return content
    console.line(f"each can be used by its name: checkpoint={cfg.checkpoint} at.name=balanced")
    if cfg.pareto.export is not None:
        say(f"written to {_export(folder, cfg)}")
    return content


def _refuse_settings(cfg: DictConfig) -> None:
    """Refuse what can be refused before anything is opened."""
    from detr_exp.deploy.engines import SUFFIX

    if cfg.pareto.form not in FORMS:
        raise ValueError(f"pareto.form is {cfg.pareto.form!r}; use one of {', '.join(FORMS)}: pareto.form=folded")
    if cfg.pareto.export is not None and cfg.format not in SUFFIX:
        raise ValueError(f"format is {cfg.format!r}; use one of {', '.join(SUFFIX)}: format=onnx")


def _grid(cfg: DictConfig) -> list[list[Values] | None]:
    """Layers, queries and image sizes of the config."""
    found = []
    for name in ("layers", "queries", "image_sizes"):
        given = OmegaConf.to_container(cfg.pareto[name]) if OmegaConf.is_list(cfg.pareto[name]) else cfg.pareto[name]
        if given is not None and (not isinstance(given, list) or not given):
            example = "[320,[320,480]]" if name == "image_sizes" else "[1,2]"
            raise ValueError(f"pareto.{name} is {given!r}; it needs a list: pareto.{name}={example}, or null")
        found.append(given)
    return found


def _evaluated(
    opened: OnData, cfg: DictConfig, members: Sequence[Member], console: Console
) -> tuple[dict[str, Member], list[Point]]:
    """All members with their metrics, by their names; those that may be on the front are `timed`, and have draws.

    Raises:
        ValueError: there is no such metric, or predictions are not finite.
    """
    from detr_exp.metric.bootstrap import draws
    from detr_exp.model.member import Elastic, Member
    from detr_exp.runs.members_page import Point, is_beaten

    network, split = opened.detector.network, cfg.data.split
    assert isinstance(network, Elastic)
    times = draws(len(opened.data.split(split).image_ids), cfg.pareto.resamples)
    by_name: dict[str, Member] = {}
    points: list[Point] = []
    with _measured(opened, cfg, members, console) as found:
        for measured in found:
            metrics: dict[str, Metric] = {}
            for member, metric, values in measured:
                extent = member.of(network.own)
                name = _judged_by(cfg.pareto.metric, str(opened.detector.cfg.trainer.monitor), values)
                points.append(Point(str(Member(*extent)), *extent, name, values))
                by_name[points[-1].name], metrics[points[-1].name] = member, metric
            for point in points[-len(measured) :]:
                point.timed = not is_beaten(point, points)
                if point.timed:
                    point.draws = _drawn(metrics[point.name], point.metric, times)
    for point in points:  # a search evaluates larger ones before smaller ones
        point.timed = point.timed and not is_beaten(point, points)
    if all(point.values[point.metric] == -1 for point in points):
        raise ValueError(
            f"{opened.detector.path}: {split} has nothing to measure {points[0].metric} on, so none can be chosen; use "
            "another split, data.split=..., or pareto.metric=..."
        )
    if not any(point.timed for point in points):
        raise ValueError(
            f"{opened.detector.path}: no member has a finite {points[0].metric} on {split}, so none can "
            "be chosen; use a checkpoint of a run that has not diverged, or pareto.metric=..."
        )
    return by_name, points


@contextmanager
def _measured(
    opened: OnData, cfg: DictConfig, members: Sequence[Member], console: Console
) -> Iterator[Iterator[list[Measured]]]:
    """All of the members, or those that a search chooses, with their metrics; one list for each image size.

    Raises:
        ValueError: there is no such metric, or no program that searches.
    """
    from detr_exp.inference.search import TOGETHER, searched
    from detr_exp.inference.shared import evaluate_members
    from detr_exp.model.member import Elastic, Member
    from detr_exp.model.operations import gigaflops

    network, split, trials = opened.detector.network, cfg.data.split, cfg.pareto.search
    assert isinstance(network, Elastic)
    passes = len({one.image_size for one in members}) if trials is None else math.ceil(trials / TOGETHER)
    count = len(members) if trials is None else min(trials, len(members))

    def cost(member: Member) -> float:
        network.set_member(member)
        operations = gigaflops(opened.detector.network)
        network.set_member(Member())
        return operations

    def gain(values: dict[str, float]) -> float:
        value = values[_judged_by(cfg.pareto.metric, str(opened.detector.cfg.trainer.monitor), values)]
        return math.nan if value == -1 else value

    with console.progress(f"evaluating {count} members", passes * len(opened.loader(split, cfg.batch_size))) as meter:

        def evaluate(some: Sequence[Member]) -> Iterator[list[Measured]]:
            return evaluate_members(opened, split, some, cfg.batch_size, meter)

        if trials is None:
            yield evaluate(members)
        else:
            yield searched(members, lambda some: next(evaluate(some)), gain, cost, trials, cfg.pareto.seed)


def _judged_by(asked: str | None, monitor: str, values: dict[str, float]) -> str:
    """Which value is to be high."""
    from detr_exp.trainer.evaluation import headline

    name = (asked or monitor).removeprefix("val/")
    if name in values and not name.startswith(("loss", "time/")):
        return name
    if asked is not None:
        known = ", ".join(one for one in headline(values))
        raise ValueError(f"pareto.metric is {asked}, which is not measured, or not to be high; use one of {known}")
    return next(iter(headline(values)))


def _drawn(metric: Metric, name: str, times: np.ndarray) -> np.ndarray | None:
    """A mean of average precisions on several draws of the images, `[B]`; None for other values."""
    import numpy as np

    from detr_exp.metric.backend import CocoEvaluation
    from detr_exp.metric.bootstrap import average_precision, kind_of, matched

    kind = kind_of(name)
    if kind is None or not isinstance(metric, CocoEvaluation):
        return None
    labels = dict(zip(metric.category_ids, metric.metric_names()))
    wanted = [number for number, label in labels.items() if kind.label in ("", label)]
    found = matched(metric, kind.iou_type, wanted, kind.area)
    ap = [average_precision(one.at(kind.thresholds), times) for one in found if one.objects.any()]
    return np.nanmean(np.array(ap), axis=0) if ap else None


def _time(points: Sequence[Point], by_name: dict[str, Member], opened: OnData, cfg: DictConfig) -> None:
    """Set the latencies of points, measured in turn."""
    from detr_exp.model.member import Elastic, Member

    network, image = opened.detector.network, image_to_time(None, opened.detector.channels)
    assert isinstance(network, Elastic)
    with TemporaryDirectory() as aside:
        calls = []
        for point in points:
            network.set_member(by_name[point.name])
            place = Path(aside) / point.name
            place.mkdir()
            program = in_form(opened.detector.network, cfg.pareto.form, place)
            calls.append(partial(program.run, program.inputs([image])))
        network.set_member(Member())
        for point, times in zip(points, interleaved(calls, cfg.pareto.rounds)):
            median, error = median_of(times)
            point.latency, point.noise = 1e3 * median, 1e3 * error


def _facts(opened: OnData, cfg: DictConfig, seconds: float) -> Values:
    """What the page and the file say beside the points."""
    import torch

    from detr_exp.model.member import Elastic, Member
    from detr_exp.published.places import digests

    detector, network = opened.detector, opened.detector.network
    assert isinstance(network, Elastic)
    return {
        "checkpoint": str(detector.path),
        "sha256": digests(detector.path)["sha256"],
        "weights": cfg.weights,
        "split": cfg.data.split,
        "images": len(opened.data.split(cfg.data.split).image_ids),
        "form": cfg.pareto.form,
        "rounds": cfg.pareto.rounds,
        "resamples": cfg.pareto.resamples,
        "device": f"{detector.precision.device.type}, {torch.get_num_threads()} threads",
        "cpu_seconds": round(seconds, 1),
        "own": str(Member(*network.own)),
    }


def _export(folder: Path, cfg: DictConfig) -> Path:
    """The chosen point as a file, compared with its member."""
    from detr_exp.deploy.export import export_in
    from detr_exp.inference.on_data import open_detector

    settings = compose([f"format={cfg.format}"], config_name="export")
    OmegaConf.set_struct(settings, False)
    for key in ("checkpoint", "data", "metric", "allow_targets"):
        settings[key] = cfg[key]
    asked = cfg.copy()
    OmegaConf.update(asked, "at", {"name": cfg.pareto.export}, force_add=True)
    return export_in(folder, settings, open_detector(asked))


def _cpu_seconds() -> float:
    """Of this process and of those that loaded images for it."""
    return sum(os.times()[:4])


def main() -> None:
    cli.main(pareto, "pareto", USAGE)


if __name__ == "__main__":
    main()
