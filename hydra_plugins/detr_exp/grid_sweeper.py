"""Every combination of the values given with commas: one run each, and a table at the end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from detr_exp.config import grid
from detr_exp.config.compose import composition, refuse_unready
from detr_exp.config.renamed import renamed
from detr_exp.terminal import say
from hydra_plugins.detr_exp._ledger import Job
from hydra_plugins.detr_exp._sweep import Sweep, hash_of


class GridSweeper(Sweeper):
    """Hydra's grid, with these differences: all jobs are checked before the first one starts, a failed one does not
    stop the others, the end of every run is recorded, and the same command in the same folder starts only missing runs.

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
            the value that each of them returned.

        Raises:
            ConfigError: a job cannot be composed, or the folder is that of another configuration; none was started.
            SweepFailed: after the last job, if any of them failed.
        """
        jobs = self._jobs(arguments)
        with self.shared.held():
            self.shared.refuse_another_config(jobs, self._composed)
            before = self.shared.ledger.latest()
            missing = [job for job in jobs if not self.shared.is_finished(job, before)]
            if len(missing) < len(jobs):
                say(f"{len(jobs) - len(missing)} of {len(jobs)} runs have ended before, in {self.shared.folder}")
            self.shared.run(missing, len(missing), at_once=True)
        self.shared.close(jobs)
        entries = self.shared.ledger.latest()
        return [entries[job.hash].metric for job in jobs]

    def _jobs(self, arguments: list[str]) -> list[Job]:
        """The cartesian product of all values, in the order of the overrides; checked, unless that was done already."""
        loader, hydra = self.shared.loader, self.shared.config.hydra
        params = renamed(hydra.job.config_name, (f"{key}={value}" for key, value in self.params.items()))
        overrides = grid.parse_sweep(loader, [*params, *arguments])
        if self.params or not grid.is_plain([*overrides, *grid.parse_sweep(loader, hydra.overrides.hydra)]):
            for run in grid.representative_runs(loader, hydra.job.config_name, overrides):
                refuse_unready(run.cfg)
        axes = grid.axes_of(overrides)
        jobs = []
        for number, combination in enumerate(itertools.product(*axes.values())):
            swept = [one for one, values in zip(combination, axes.values()) if len(values) > 1]
            jobs.append(Job(number, list(combination), swept, hash_of(swept)))
        return jobs

    def _composed(self, job: Job) -> DictConfig:
        return composition(self.shared.loader, self.shared.config.hydra.job.config_name, job.overrides).cfg
