"""Every combination of the values given with commas: one run each, and a table at the end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from detr_exp.config import grid
from detr_exp.config.compose import composition, refuse_unready
from detr_exp.config.mistakes import ConfigError
from detr_exp.config.renamed import renamed
from detr_exp.terminal import say
from hydra_plugins.detr_exp._ledger import Job, score
from hydra_plugins.detr_exp._sweep import Sweep, hash_of


class GridSweeper(Sweeper):
    """Hydra's grid, with these differences: all jobs are checked before the first one starts, a failed one does not
    stop the others, the end of every run is recorded, and the same command in the same folder starts only missing runs.

    Args:
        params: sweeps set by a file: key -> values as on the command line, which wins.
        race: go seed by seed, and give no further seed to points that will hardly win; see `metric.racing`.

    Raises:
        ConfigError: `race` is no switch.
    """

    def __init__(self, params: Mapping[str, Any], race: bool = False) -> None:
        if not isinstance(race, bool):
            raise ConfigError(f"hydra.sweeper.race is {race!r}; use true or false: hydra.sweeper.race=true")
        self.params, self.race = params, race

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
        rounds = by_seed(jobs) if self.race else []
        with self.shared.held():
            self.shared.refuse_another_config(jobs, self._composed)
            tried = self._raced(rounds) if self.race else self._run(jobs)
        self.shared.close(tried, raced=self.race)
        entries = self.shared.ledger.latest()
        return [entries[job.hash].metric if job.hash in entries else None for job in jobs]

    def _run(self, jobs: list[Job]) -> list[Job]:
        """Run those of the jobs that are not finished."""
        before = self.shared.ledger.latest()
        missing = [job for job in jobs if not self.shared.is_finished(job, before)]
        if len(missing) < len(jobs):
            say(f"{len(jobs) - len(missing)} of {len(jobs)} runs have ended before, in {self.shared.folder}")
        self.shared.run(missing, len(missing), at_once=True)
        return jobs

    def _raced(self, rounds: list[list[Job]]) -> list[Job]:
        """Run seed after seed, each for the points that may still win.

        Args:
            rounds: for each seed the job of every point, in one order.

        Returns:
            the jobs that were tried.
        """
        import numpy as np

        from detr_exp.metric.racing import budget, survivors  # its statistics take long to load

        points, seeds = len(rounds[0]), len(rounds)
        alive, values = list(range(points)), np.full((points, seeds), -np.inf)
        tried: list[Job] = []
        for place, jobs in enumerate(rounds):
            tried += self._run([jobs[point] for point in alive])
            entries = self.shared.ledger.latest()
            if any(jobs[point].hash not in entries for point in alive) or self.shared.task.is_to_stop():
                return tried
            values[alive, place] = [score(entries[jobs[point].hash]) for point in alive]
            failed = [point for point in alive if not np.isfinite(values[point, place])]
            alive = [point for point in alive if point not in failed]
            after = place + 1
            if len(alive) > 1 and after < seeds:
                left = budget(points, seeds) - len(tried)
                kept = survivors(values[alive, :after], left=left, rounds=seeds - after)
                alive = sorted(alive[place] for place in kept)
            say(f"race: after {after} of {seeds} seeds {len(alive)} of {points} points may still win")
            if len(alive) < 2:
                break
        saved = 1 - len(tried) / (points * seeds)
        say(
            f"race: {len(tried)} of {points * seeds} runs, {saved:.0%} saved. The risk: in simulations the winner was "
            "that of the full grid, or less than half a standard deviation of seeds worse, in 91 to 100 of 100 races"
        )
        return tried

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


def by_seed(jobs: Sequence[Job]) -> list[list[Job]]:
    """For each seed the job of every point, in one order.

    Raises:
        ConfigError: there are not several points with several seeds each.
    """
    from detr_exp.metric.racing import FEWEST

    rounds: dict[str, list[Job]] = {}
    for job in jobs:
        seed = next((word for word in job.swept if word.startswith("seed=")), "")
        rounds.setdefault(seed, []).append(job)
    points = len(next(iter(rounds.values()), []))
    if len(rounds) < FEWEST or points < 2:
        raise ConfigError(
            f"a race is between settings with at least {FEWEST} seeds each, but this sweep has {points} settings "
            f"and {len(rounds)} seeds; sweep both: seed=0,1,2,3,4 optim.lr=1e-4,3e-4, or hydra.sweeper.race=false"
        )
    return list(rounds.values())
