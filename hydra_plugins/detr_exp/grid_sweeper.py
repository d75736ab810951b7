"""Every combination of the values given with commas: one run each, and a table at the end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from detr_exp.compose import composition, refuse_unready
from detr_exp.mistakes import ConfigError


class SweepFailed(RuntimeError):
    """Some runs of a sweep failed; all of them were tried."""


@dataclass(frozen=True)
class Job:
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
        self.context = hydra_context
        self.config = config
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
        loader, name = self.context.config_loader, self.config.hydra.job.config_name
        for job in jobs:
            refuse_unready(composition(loader, name, job.overrides).cfg)
        results = list(self.launcher.launch([job.overrides for job in jobs], initial_job_idx=0))
        print(table(jobs, results), flush=True)
        failed = sum(result.status is not JobStatus.COMPLETED for result in results)
        if failed:
            raise SweepFailed(f"{failed} of {len(jobs)} runs failed")
        return results

    def combinations(self, arguments: Sequence[str]) -> list[Job]:
        """The cartesian product of all values, in the order of the words."""
        loader = self.context.config_loader
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        axes: dict[str, list[str]] = {}
        for word in OverridesParser.create(config_loader=loader).parse_overrides(words):
            key = word.get_key_element()
            if not word.is_sweep_override():
                axes[key] = [str(word.input_line)]
            elif word.is_discrete_sweep():
                axes[key] = [f"{key}={value}" for value in word.sweep_string_iterator()]
            else:
                raise ConfigError(
                    f"{word.input_line} is not a list of values; a grid needs them: {key}=a,b or range(..)"
                )
        swept = [key for key, values in axes.items() if len(values) > 1]
        return [
            Job(list(values), [value for key, value in zip(axes, values) if key in swept])
            for values in itertools.product(*axes.values())
        ]


def table(jobs: Sequence[Job], results: Sequence[JobReturn]) -> str:
    """One line a job: number, what it was given, and its result or why there is none; best first."""
    rows = []
    for number, (job, result) in enumerate(zip(jobs, results)):
        value = result._return_value  # the property raises what the job raised
        if result.status is not JobStatus.COMPLETED:
            reason = f"{type(value).__name__}: {value}".splitlines()[0]
            rows.append((float("-inf"), number, job, f"failed  {reason[:100]}"))
        else:
            score = float("-inf") if value is None else float(value)
            rows.append((score, number, job, "-" if value is None else f"{score:.4f}"))
    rows.sort(key=lambda row: (-row[0], row[1]))
    words = [" ".join(job.swept) or "(no value is swept)" for _, _, job, _ in rows]
    width = max(map(len, words))
    lines = [f"  #{number:<4} {text:<{width}}  {shown}" for (_, number, _, shown), text in zip(rows, words)]
    return "\n".join(["", f"{len(rows)} runs, best first", *lines, ""])
