"""Every combination of the values given with commas: one run each, and a table at the end."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from detr_exp.compose import composition, refuse_unready
from detr_exp.mistakes import ConfigError


class SweepFailed(RuntimeError):
    """Some runs of a sweep failed; all of them were tried."""


class Job(NamedTuple):  # no dataclass: Hydra runs this file before it is a module
    """One run of a sweep.

    Attributes:
        overrides: every word of its command line.
        swept: those that differ between the runs.
    """

    overrides: list[str]
    swept: list[str]


class GridSweeper(Sweeper):
    """Hydra's grid, with three differences: all jobs are checked before the first one starts, one that fails does not
    stop the others, and a table of all results closes the sweep.

    Args:
        params: sweeps set by a file: key -> values as on the command line, which wins.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader = cast(ConfigLoaderImpl, hydra_context.config_loader)
        self.config: DictConfig = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run all combinations.

        Raises:
            ConfigError: a job cannot be composed; none was started.
            SweepFailed: after the last job, if any of them failed.
        """
        jobs = self.combinations(arguments)
        for job in jobs:
            refuse_unready(composition(self.loader, self.config.hydra.job.config_name, job.overrides).cfg)
        results: list[JobReturn] = []
        with parent_run(self.config, results):
            results += self.launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
        print(table(jobs, results), flush=True)
        failed = sum(result.status is not JobStatus.COMPLETED for result in results)
        if failed:
            raise SweepFailed(f"{failed} of {len(jobs)} runs failed")
        return results

    def combinations(self, arguments: Sequence[str]) -> list[Job]:
        """The cartesian product of all values, in the order of the words."""
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        axes: dict[str, list[str]] = {}
        for word in OverridesParser.create(config_loader=self.loader).parse_overrides(words):
            key = word.get_key_element()
            if not word.is_sweep_override():
                axes[key] = [str(word.input_line)]
            elif word.is_discrete_sweep():
                axes[key] = [f"{key}={value}" for value in word.sweep_string_iterator()]
            else:
                raise ConfigError(f"{word.input_line} is no list of values; a grid needs one: {key}=a,b or range(1,9)")
        swept = [key for key, values in axes.items() if len(values) > 1]
        return [
            Job(list(values), [value for key, value in zip(axes, values) if key in swept])
            for values in itertools.product(*axes.values())
        ]


@contextlib.contextmanager
def parent_run(config: DictConfig, results: Sequence[JobReturn]) -> Iterator[None]:
    """While it is entered, the jobs' runs are kept in MLflow under one of the sweep's own.

    It is made before the first job, and with it the store, which processes could not make at the same time. A store
    that cannot be reached is no reason not to sweep.

    Args:
        config: of the sweep; where its tracker has no MLflow store, nothing happens.
        results: of the jobs; read at the end.
    """
    uri, project = (OmegaConf.select(config, f"tracker.{key}") for key in ("tracking_uri", "project"))
    if uri is None or find_spec("mlflow") is None:
        yield
        return
    from detr_exp.tracker.mlflow import finish_parent, start_parent
    from detr_exp.tracker.tracker import PARENT_VARIABLE

    folder = Path(config.hydra.sweep.dir).resolve()
    tags = {"sweep": str(folder), "words": " ".join(config.hydra.overrides.task)}
    try:
        run_id = start_parent(uri, project, "/".join(folder.parts[-2:]), tags)
    except Exception as error:
        print(f"warning: no run for this sweep in {uri} ({str(error)[:200]}); its runs will stand alone", flush=True)
        yield
        return
    os.environ[PARENT_VARIABLE] = run_id
    try:
        yield
    finally:
        os.environ.pop(PARENT_VARIABLE, None)
        good = bool(results) and all(result.status is JobStatus.COMPLETED for result in results)
        best = max((score(result) for result in results), default=float("-inf"))
        values = {"best/monitor": best} if best > float("-inf") else {}
        with contextlib.suppress(Exception):
            finish_parent(uri, project, run_id, "ok" if good else "failed", values)


def score(result: JobReturn) -> float:
    """What a job returned; minus infinity if it failed or evaluated nothing."""
    value = result._return_value if result.status is JobStatus.COMPLETED else None  # the property raises job's errors
    return float("-inf") if value is None else float(value)


def table(jobs: Sequence[Job], results: Sequence[JobReturn]) -> str:
    """One line a job: number, what it was given, and its result or why there is none; best first."""
    rows = []
    for number in sorted(range(len(jobs)), key=lambda number: -score(results[number])):
        result, words = results[number], " ".join(jobs[number].swept) or "(nothing is swept)"
        if result.status is JobStatus.COMPLETED:
            rows.append((number, words, "-" if result._return_value is None else f"{score(result):.4f}"))
        else:
            error = result._return_value
            rows.append((number, words, f"failed  {type(error).__name__}: {error}".splitlines()[0][:120]))
    width = max(len(words) for _, words, _ in rows)
    lines = [f"  #{number:<4} {words:<{width}}  {shown}" for number, words, shown in rows]
    return "\n".join(["", f"{len(rows)} runs, best first", *lines, ""])
