"""Do a run again and compare: `python -m detr_exp.reproduce run=<folder or id>`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli, launch
from detr_exp.config.mistakes import look_up
from detr_exp.config.stored import stored
from detr_exp.runs.past import PastRun, find_one
from detr_exp.terminal import say
from detr_exp.tracker.provenance import environment
from detr_exp.tracker.secrets import MASK
from detr_exp.tracker.tracker import CONFIG
from detr_exp.values import Values

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
COMPARED = ("python", "platform", "cpus", "version/", "git.", "hardware", "data.fingerprint")
UNCOMPARED = ("step", "time/", "system/")


class NotReproduced(RuntimeError):
    """Metrics differ from those of the earlier run."""


class Difference(NamedTuple):
    """Attributes: a `name` at a `step`, with its value `before` and `now`; None where there is none."""

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
    told = config_of(run, cfg)
    say(f"\n{run.folder}  {run.status}, {spoken(run.score)} {run.monitor}")
    for line in changes(run.record.tags, environment() | facts(told)):
        say(f"  {line}")
    say("")
    folder = Path(job.runtime.output_dir)
    result = launch.train(folder, told, groups(run), run.record.words, job.job_logging)
    again = PastRun.load(folder)
    found = differences(run.lines, again.lines)
    say(verdict(run, again, found))
    if found:
        raise NotReproduced(f"{len(found)} values differ from those of {run.folder}")
    return result


def config_of(run: PastRun, cfg: DictConfig) -> DictConfig:
    """The config of an earlier run, for a new one.

    Raises:
        ValueError: none was recorded.
    """
    if not run.config:
        raise ValueError(f"{run.folder} holds no config.yaml, so nothing can be done again; give another run: run=...")
    told = stored(run.config, run.folder / CONFIG)
    told.allow_targets = list(cfg.allow_targets)  # what a file says about itself does not count
    told.trainer.resume = None
    if MASK in str(told.tracker.get("tracking_uri")):
        say(f"the run was tracked at {told.tracker.tracking_uri}, which is not known whole; this one is not")
        told.tracker.tracking_uri = None
    if cfg.data.root is not None:
        told.data.root = cfg.data.root
    return told


def facts(cfg: DictConfig) -> dict[str, str]:
    """What this machine and the data are now, by the names of the tags."""
    from detr_exp import build

    return {"hardware": build.hardware(cfg).describe(), "data.fingerprint": build.data(cfg).fingerprint}


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Sentences about what is not as it was, or one that everything is."""
    names = [name for name in before if name.startswith(COMPARED)]
    differing = [name for name in names if before[name] != now.get(name)]
    changed = [f"{name}: was {before[name]}, is {now.get(name, 'not there')}" for name in differing]
    if before.get("git.dirty") == "true":
        changed.append("git.dirty: the code was changed since its commit, so the commit does not say all of it")
    return changed or ["code, packages, machine and data are as they were"]


def groups(run: PastRun) -> dict[str, str]:
    """The chosen options, which a run keeps among its tags."""
    return {name: tag for name, tag in run.record.tags.items() if _is_group(run.config, name)}


def _is_group(config: Values, name: str) -> bool:
    if name in ("experiment", "sweep"):
        return True
    try:
        return isinstance(look_up(config, name.replace("/", ".")), dict)
    except KeyError:
        return False


def differences(before: Sequence[Values], now: Sequence[Values]) -> list[Difference]:
    """Values that are not the same to the last digit, in order; clocks and machine figures are not compared."""
    sides = [_values(lines) for lines in (before, now)]
    keys = sorted(set(sides[0]) | set(sides[1]))
    differing = [key for key in keys if (key in sides[0], sides[0].get(key)) != (key in sides[1], sides[1].get(key))]
    return [Difference(name, step, *(side.get((step, name)) for side in sides)) for step, name in differing]


def _values(lines: Sequence[Values]) -> dict[tuple[int, str], float | None]:
    return {
        (line["step"], name): value for line in lines for name, value in line.items() if not name.startswith(UNCOMPARED)
    }


def verdict(run: PastRun, again: PastRun, found: Sequence[Difference]) -> str:
    """What came of it, with the values that matter most."""
    compared = len(_values(run.lines))
    if not found:
        return f"reproduced: all {compared} values are the same to the last digit ({run.monitor} {spoken(again.score)})"
    first = min(found, key=lambda row: row.step)
    lines = [
        f"not reproduced: {len(found)} of {compared} values differ",
        f"  {run.monitor}  was {spoken(run.score)}, is {spoken(again.score)}",
        f"  first at step {first.step}: {first.name}  was {first.before}, is {first.now}",
    ]
    return "\n".join(lines)


def spoken(value: float | None) -> str:
    return "no" if value is None else f"{value:.4f}"


def main() -> None:
    cli.main(reproduce, "reproduce", USAGE)


if __name__ == "__main__":
    main()
