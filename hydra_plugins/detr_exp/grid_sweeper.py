"""Every combination of the values given with commas: one run each, and a table at the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from detr_exp.compose import composition, refuse_unready
from detr_exp.mistakes import ConfigError, groups_of
from hydra_plugins.detr_exp._ledger import Job
from hydra_plugins.detr_exp._sweep import OWN_KEYS, Sweep, hash_of


class GridSweeper(Sweeper):
    """Hydra's grid, with these differences: all jobs are checked before the first one starts, one that fails does not
    stop the others, every ending is written down, and the same command in the same folder does only what is missing.

    Args:
        params: sweeps set by a file: key -> values as on the command line, which wins.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.shared = Sweep(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> list[float | None]:
        """Run all combinations that are not finished.

        Returns:
            what each of them returned.

        Raises:
            ConfigError: a job cannot be composed, or the folder is that of another configuration; none was started.
            SweepFailed: after the last job, if any of them failed.
        """
        jobs = self.combinations(arguments)
        for job in self._typical(jobs):
            refuse_unready(self._composed(job))
        with self.shared.held():
            self.shared.refuse_another_config(jobs, self._composed)
            before = self.shared.ledger.latest()
            missing = [job for job in jobs if not self.shared.is_finished(job, before)]
            if len(missing) < len(jobs):
                print(f"{len(jobs) - len(missing)} of {len(jobs)} runs have ended before, in {self.shared.folder}")
            self.shared.run(missing, len(missing), at_once=True)
        self.shared.close(jobs)
        entries = self.shared.ledger.latest()
        return [entries[job.hash].metric for job in jobs]

    def combinations(self, arguments: Sequence[str]) -> list[Job]:
        """The cartesian product of all values, in the order of the words."""
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        axes: dict[str, list[str]] = {}
        for word in OverridesParser.create(config_loader=self.shared.loader).parse_overrides(words):
            key = word.get_key_element()
            if key in OWN_KEYS:
                continue
            if not word.is_sweep_override():
                axes[key] = [str(word.input_line)]
            elif word.is_discrete_sweep():
                axes[key] = [f"{key}={value}" for value in word.sweep_string_iterator()]
            else:
                raise ConfigError(f"{word.input_line} is no list of values; a grid needs one: {key}=a,b or range(1,9)")
        swept_keys = [key for key, values in axes.items() if len(values) > 1]
        jobs = []
        for number, values in enumerate(itertools.product(*axes.values())):
            swept = [value for key, value in zip(axes, values) if key in swept_keys]
            jobs.append(Job(number, list(values), swept, hash_of(swept)))
        return jobs

    def _composed(self, job: Job) -> DictConfig:
        return composition(self.shared.loader, self.shared.config.hydra.job.config_name, job.words).cfg

    def _typical(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Jobs that show whether all can be composed: one for each choice of options, as all have the same keys."""
        groups = groups_of(self.shared.loader.repository)
        seen: set[tuple[str, ...]] = set()
        for job in jobs:
            choices = tuple(word for word in job.words if word.partition("=")[0] in groups)
            if choices not in seen:
                seen.add(choices)
                yield job
