"""Repeat a run and compare: `python -m detr_exp.reproduce run=<folder or id>`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli, launch
from detr_exp.config.mistakes import look_up
from detr_exp.config.stored import stored
from detr_exp.runs.past import PastRun, find_one
from detr_exp.terminal import say
from detr_exp.tracker.provenance import environment
from detr_exp.tracker.secrets import MASK
from detr_exp.tracker.tracker import CONFIG
from detr_exp.values import Values, values_of

USAGE = """\
Train with exactly the config of an earlier run, in a new folder, and compare the metrics.

  python -m detr_exp.reproduce run=outputs/<day>/<run>

First lists what has changed: commit, packages, machine, data. If nothing has, a CPU gives exactly the same numbers, and
a GPU does with trainer.deterministic=true.

  run             a run folder or a run id
  data.root       folder of the data on this machine; null: the recorded one
  root            folder that is searched for ids
  allow_targets   custom packages that the run's config may name

The exit status is 1 if a metric differs.
"""
COMPARED = ("python", "platform", "cpus", "version/", "git.", "hardware", "data.fingerprint", "weights", "backbone")
UNCOMPARED = ("step", "time/", "system/")


class NotReproduced(RuntimeError):
    """Metrics differ from those of the earlier run."""


class Difference(NamedTuple):
    """Attributes: a `name` at a `step`, with its values `before` and `now`; None where there is no value."""

    name: str
    step: int
    before: float | None
    now: float | None


def reproduce(cfg: DictConfig) -> float | None:
    """One training in Hydra's output folder, compared with the earlier one.

    Raises:
        NotReproduced: metrics differ.
        ValueError: the run, its data or its config cannot be used.
    """
    job = HydraConfig.get()
    run = PastRun.load(find_one(cfg.run, cfg.root))
    config = config_of(run, cfg)
    say(f"\n{run.folder}  {run.status}, {shown(run.score)} {run.monitor}")
    for line in changes(run.record.tags, environment() | facts(config)):
        say(f"  {line}")
    say("")
    folder = Path(job.runtime.output_dir)
    result = launch.train(folder, config, groups(run), run.record.words, values_of(job.job_logging))
    again = PastRun.load(folder)
    differing = differences(run.lines, again.lines)
    say(verdict(run, again, differing))
    if differing:
        raise NotReproduced(f"{len(differing)} values differ from those of {run.folder}")
    return result


def config_of(run: PastRun, cfg: DictConfig) -> DictConfig:
    """The config of an earlier run, for a new one.

    Raises:
        ValueError: none was recorded.
    """
    if not run.config:
        raise ValueError(f"{run.folder} holds no config.yaml, so it cannot be repeated; give another run: run=...")
    config = stored(run.config, run.folder / CONFIG)
    config.allow_targets = list(cfg.allow_targets)  # not those that the file allows itself
    config.trainer.resume = None
    if MASK in str(config.tracker.get("tracking_uri")):
        say(f"the run was tracked at {config.tracker.tracking_uri}, whose password is not stored; this one is not")
        config.tracker.tracking_uri = None
    if cfg.data.root is not None:
        config.data.root = cfg.data.root
    return config


def facts(cfg: DictConfig) -> dict[str, str]:
    """Current values of the tags that describe machine, data and initial weights."""
    from detr_exp import build, start

    data = build.data(cfg)
    alone = cfg.model.weights is None and OmegaConf.select(cfg, "model.backbone.pretrained")
    initial = start.record(cfg.model.weights, build.network(cfg, data) if alone else None)
    machine = {"hardware": build.hardware(cfg).describe(), "data.fingerprint": data.fingerprint}
    return machine | start.tags(initial)


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """One sentence for each difference, or one that there is none."""
    names = [name for name in before if name.startswith(COMPARED)]
    differing = [name for name in names if before[name] != now.get(name)]
    changed = [f"{name}: was {before[name]}, is {now.get(name, 'missing')}" for name in differing]
    if before.get("git.dirty") == "true":
        changed.append("git.dirty: the code was changed since its commit, so the commit does not describe all of it")
    return changed or ["code, packages, machine and data have not changed"]


def groups(run: PastRun) -> dict[str, str]:
    """The chosen options, which are among the tags of a run."""
    return {name: tag for name, tag in run.record.tags.items() if _is_group(run.config, name)}


def _is_group(config: Values, name: str) -> bool:
    if name in ("experiment", "sweep"):
        return True
    try:
        return isinstance(look_up(config, name.replace("/", ".")), dict)
    except KeyError:
        return False


def differences(before: Sequence[Values], now: Sequence[Values]) -> list[Difference]:
    """Values that are not the same to the last digit, in order; times and machine metrics are not compared."""
    sides = [_values(lines) for lines in (before, now)]
    keys = sorted(set(sides[0]) | set(sides[1]))
    differing = [key for key in keys if (key in sides[0], sides[0].get(key)) != (key in sides[1], sides[1].get(key))]
    return [Difference(name, step, *(side.get((step, name)) for side in sides)) for step, name in differing]


def _values(lines: Sequence[Values]) -> dict[tuple[int, str], float | None]:
    return {
        (line["step"], name): value for line in lines for name, value in line.items() if not name.startswith(UNCOMPARED)
    }


def verdict(run: PastRun, again: PastRun, differing: Sequence[Difference]) -> str:
    """The result, with the most important values."""
    compared = len(_values(run.lines))
    if not differing:
        return f"reproduced: all {compared} values are the same to the last digit ({run.monitor} {shown(again.score)})"
    first = min(differing, key=lambda row: row.step)
    lines = [
        f"not reproduced: {len(differing)} of {compared} values differ",
        f"  {run.monitor}  was {shown(run.score)}, is {shown(again.score)}",
        f"  first at step {first.step}: {first.name}  was {first.before}, is {first.now}",
    ]
    return "\n".join(lines)


def shown(value: float | None) -> str:
    return "no" if value is None else f"{value:.4f}"


def main() -> None:
    cli.main(reproduce, "reproduce", USAGE)


if __name__ == "__main__":
    main()
