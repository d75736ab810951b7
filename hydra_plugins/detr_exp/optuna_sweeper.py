"""A search with Optuna: trials ask, train and tell one by one, unpromising ones are pruned, and studies resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import env_override
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from detr_exp.config.compose import composition, refuse_unready
from detr_exp.config.grid import SWEEP_KEYS
from detr_exp.config.keys import FREE, is_under
from detr_exp.config.mistakes import ConfigError
from detr_exp.terminal import say
from detr_exp.tracker.base import RunRecord
from detr_exp.tracker.secrets import masked
from detr_exp.trainer.study import ADDRESS_VARIABLE
from detr_exp.trainer.trial import TRIAL_VARIABLE
from hydra_plugins.detr_exp._ledger import Entry, Job
from hydra_plugins.detr_exp._parent import last_values
from hydra_plugins.detr_exp._space import distribution, ends_of, override_of
from hydra_plugins.detr_exp._study import SharedStudy
from hydra_plugins.detr_exp._sweep import Sweep, hash_of

if TYPE_CHECKING:
    import optuna

    from detr_exp.values import Values  # at run time Hydra, which searches here for classes, fails by it on Python 3.10

MONITOR, SEED = "monitor", "seed"
STORAGE = "hydra.sweeper.storage="
SAMPLES = 100  # attempts to find a point that has not diverged before
CHOICES = {"sampler": ("tpe", "random"), "pruner": ("halving", "median", "hyperband", None)}


class OptunaSweeper(Sweeper):
    """Searches the ranges of the command line; `conf/hydra/sweeper/optuna.yaml` explains the settings.

    Raises:
        ConfigError: a setting is none of its choices, or optuna is not installed.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        storage: str | None,
        study: str | None,
        n_trials: int,
        sampler: str,
        seed: int,
        startup_trials: int,
        pruner: str | None,
        min_epochs: int,
        reduction_factor: int,
        objectives: Mapping[str, str],
    ) -> None:
        self.params, self.address, self.study_name = params, storage, study
        self.n_trials, self.sampler, self.seed = n_trials, sampler, seed
        self.startup_trials, self.pruner, self.min_epochs = startup_trials, pruner, min_epochs
        self.reduction_factor, self.objectives = reduction_factor, dict(objectives)

    def _refuse_wrong_settings(self) -> None:
        """Not in the constructor, whose errors Hydra would wrap in its own."""
        for name, value in (("sampler", self.sampler), ("pruner", self.pruner)):
            if value not in CHOICES[name]:
                choices = ", ".join(str(choice or "null") for choice in CHOICES[name])
                raise ConfigError(f"hydra.sweeper.{name} is {value!r}; use one of {choices}")
        for name, given in (("storage", self.address), ("study", self.study_name)):
            if given is not None and (not isinstance(given, str) or not given.strip()):
                raise ConfigError(f"hydra.sweeper.{name} is {given!r}; use a text, or null")
        if not set(self.objectives.values()) <= {"maximize", "minimize"}:
            raise ConfigError(f"hydra.sweeper.objectives is {self.objectives}; each is maximize or minimize")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._refuse_wrong_settings()
        try:
            import optuna
        except ModuleNotFoundError:
            raise ConfigError("hydra/sweeper=optuna needs optuna: pip install 'detr_exp[optuna]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with open_dict(config):  # it may contain a password; jobs are given the address by their environment
            config.hydra.sweeper.storage = masked(self.address)
            given = list(config.hydra.overrides.hydra)
            config.hydra.overrides.hydra = [one for one in given if not one.lstrip("+").startswith(STORAGE)]
        self.shared = Sweep(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> list[float | None]:
        """Run the missing trials of the study.

        Returns:
            the value that each trial returned.

        Raises:
            ConfigError: the ranges do not compose, or the folder is that of another configuration or other ranges.
            SweepFailed: after the last trial, if any of them failed.
        """
        self._read(arguments)
        for overrides in self._typical():
            refuse_unready(self._composed(overrides))
        variable = {} if self.address is None else {ADDRESS_VARIABLE: self.address}
        with env_override(variable), self.shared.held(several=True) as place:
            with self.shared.starting():
                directions = list(self.objectives.values())
                self.common = SharedStudy(self.shared, place, self.address, self.study_name, directions, self._asked())
            self.study, trials = self.common.study, self.common.trials()
            self.replaced = {t.number for t in trials if self.shared.retry_failed and self._is_failed(t)}
            self.jobs = {trial.number: self._job(trial) for trial in trials if self._is_sampled(trial)}
            self.shared.refuse_another_config(self.jobs.values(), lambda job: self._composed(job.overrides))
            done = sum(t.state.name != "WAITING" and t.number not in self.replaced for t in trials)
            missing = len(self.common.unfinished) + max(0, self.n_trials - done)
            self.shared.run(self._trials(), missing, at_once=False, ended=self._tell)
        return self._closed()

    # ---------------------------------------------------------------------------------------------- search space

    def _read(self, arguments: list[str]) -> None:
        """The fixed overrides and the distributions of the swept keys."""
        overrides = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        fixed: dict[str, str] = {}
        self.ranges: dict[str, optuna.distributions.BaseDistribution] = {}
        for override in OverridesParser.create(config_loader=self.shared.loader).parse_overrides(overrides):
            key = override.get_key_element()
            if key in SWEEP_KEYS:
                continue
            fixed.pop(key, None), self.ranges.pop(key, None)
            if override.is_sweep_override():
                self.ranges[key] = distribution(override)
            else:
                fixed[key] = str(override.input_line)
        if SEED in self.ranges:
            raise ConfigError(
                "a search over seeds would find the luckiest one; search with one seed, seed=0, and train what it "
                "found with several: sweep=seeds"
            )
        self.fixed = list(fixed.values())
        if not self.ranges:
            raise ConfigError("nothing is searched; give a choice or a range: optim.lr='tag(log,interval(1e-5,1e-3))'")

    def _typical(self) -> Iterator[list[str]]:
        """Overrides of trials that show whether all compose: each choice, both ends, a fraction; else the lowest."""
        options = {key: getattr(spread, "choices", None) or ends_of(spread) for key, spread in self.ranges.items()}
        lowest = {key: values[0] for key, values in options.items()}
        for key, values in options.items():
            for value in values:
                yield [*self.fixed, *(override_of(*pair) for pair in (lowest | {key: value}).items())]

    def _composed(self, overrides: list[str]) -> DictConfig:
        return composition(self.shared.loader, self.shared.config.hydra.job.config_name, overrides).cfg

    def _asked(self) -> Values:
        """What all processes of a study must have in common."""
        from optuna.distributions import distribution_to_json

        wanted = {key: distribution_to_json(spread) for key, spread in sorted(self.ranges.items())}
        asked: Values = {"ranges": wanted, "objectives": self.objectives, "pruner": self.pruner}
        if self.address is not None:  # of other folders only the study tells what they train
            others = (one for one in self.fixed if not is_under(one.partition("=")[0], (*FREE, "data.root")))
            asked["fixed"] = masked(sorted(others))
        return asked

    # -------------------------------------------------------------------------------------------- ask, train and tell

    def _trials(self) -> Iterator[Job]:
        """Unfinished trials of an earlier start, then new ones, sampled when a slot is free."""
        known, started = self.shared.ledger.latest(), {trial.number for trial in self.common.unfinished}
        for trial in self.common.unfinished:
            job = self.jobs.get(trial.number)
            entry = None if job is None else known.get(job.hash)
            if job is not None and entry is not None and entry.status != "killed":
                self._tell(job, entry)  # it had ended, but the study did not know it
            else:
                yield self._started(trial)
        while (new := self.common.claimed(self.n_trials, self.replaced, started)) is not None:
            started.add(new.number)
            if not self._avoid_diverged(new):
                say(f"the search ends: {SAMPLES} samples gave no point that has not diverged before")
                return
            yield self._started(new)

    def _is_failed(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether a trial has failed, or runs in another folder, whose machine may be gone."""
        return trial.state.name == "FAIL" or (trial.state.name == "RUNNING" and not self.common.is_here(trial))

    def _is_sampled(self, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.params.keys() == self.ranges.keys()

    def _avoid_diverged(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Make the point of a new trial one at which no training has diverged; returns whether there is such a point.

        Samplers ignore failed trials, and would sample them again. The sample is inspected in a copy of the study; if
        it has diverged, a random point replaces it. Without any, the trial waits for a search that has one.
        """
        import optuna

        number = trial.number
        trials = [other for other in self.common.trials() if other.number != number]
        diverged = [other.params for other in trials if other.user_attrs.get("reason", "").startswith("nan:")]
        if not diverged:
            return True
        copy = optuna.create_study(directions=self.study.directions, sampler=self._sampler(number))
        copy.add_trials(other for other in trials if other.state.name != "WAITING")
        samples = [copy.ask(self.ranges).params]
        if samples[0] in diverged:
            copy.sampler = optuna.samplers.RandomSampler(seed=number)
            samples = [copy.ask(self.ranges).params for _ in range(SAMPLES)]
        point = next((point for point in samples if point not in diverged), None)
        if point is None:
            self.common.leave(trial)
        else:
            store, id = self.study._storage, trial._trial_id
            self.common.patiently(lambda: store.set_trial_system_attr(id, "fixed_params", point))
        return point is not None

    def _started(self, trial: optuna.trial.FrozenTrial) -> Job:
        if len(trial.params) < len(self.ranges):  # new, or the sweep was killed while it sampled the trial
            trial = self.common.patiently(lambda: self._sampled(trial))
        job = self.jobs[trial.number] = self._job(trial)
        if self.pruner is not None and len(self.objectives) == 1:
            pruning = {"folder": str(self.shared.folder), "study": self.study.study_name, "number": trial.number}
            pruning |= {"is_shared": self.address is not None, "pruner": self.pruner}
            pruning |= {"min_epochs": self.min_epochs, "reduction_factor": self.reduction_factor}
            pruning |= {"startup_trials": self.startup_trials}
            epochs = OmegaConf.select(self._composed(job.overrides), "trainer.epochs", default=100)
            pruning |= {"max_epochs": math.ceil(epochs)}
            self.shared.task.environment_of = {job.hash: {TRIAL_VARIABLE: json.dumps(pruning)}}
        return job

    def _sampled(self, trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
        import optuna

        self.study.sampler = self._sampler(trial.number)
        asked = optuna.Trial(self.study, trial._trial_id)
        for key, spread in self.ranges.items():
            asked._suggest(key, spread)
        return self.study.trials[trial.number]

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Made for each trial from seed and number, so that a resumed study does not repeat its samples."""
        from optuna import samplers

        seed = (self.seed * 1_000_003 + number) % 2**31
        if self.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=self.startup_trials, constant_liar=True)

    def _job(self, trial: optuna.trial.FrozenTrial) -> Job:
        swept = [override_of(key, trial.params[key]) for key in self.ranges]
        return Job(trial.number, [*self.fixed, *swept], swept, hash_of([f"trial {trial.number}", *swept]))

    def _tell(self, job: Job, entry: Entry) -> None:
        """Tell the study how a trial ended; an interrupted one stays open and is resumed later."""
        from optuna.trial import TrialState

        if entry.status == "killed":
            return
        values = list(self._values(job, entry).values())
        if entry.status == "pruned":
            self.common.finish(job.number, TrialState.PRUNED, None, None)
        elif entry.status == "ok" and all(map(math.isfinite, values)):
            self.common.finish(job.number, TrialState.COMPLETE, values, None)
        else:
            reason = entry.reason or f"it has no {', '.join(self.objectives)}"
            if entry.status == "ok":
                self.shared.ledger.record(job, time.monotonic() - entry.seconds, "failed", entry.metric, reason)
            self.common.finish(job.number, TrialState.FAIL, None, f"{entry.status}: {reason}")

    # ------------------------------------------------------------------------------------------------- results

    def _closed(self) -> list[float | None]:
        """Print the best trial and the table; returns the values of the runs of this folder."""
        trials, entries = self.common.trials(), self.shared.ledger.latest()
        sampled = {trial.number: trial for trial in trials if self._is_sampled(trial)}
        self.jobs |= {number: self._job(trial) for number, trial in sampled.items()}
        elsewhere = {
            job.hash: self._entry_of(sampled[job.number], job, place)
            for job in self.jobs.values()
            if job.hash not in entries and (place := self.common.owner_of(sampled[job.number])) is not None
        }
        self._say_best(trials)
        jobs = list(self.jobs.values())
        self.shared.close(jobs, {job.hash: self._further(job) for job in jobs}, elsewhere)
        return [entries[job.hash].metric for job in jobs if job.hash in entries]

    def _entry_of(self, trial: optuna.trial.FrozenTrial, job: Job, place: str) -> Entry:
        """How a trial of another process ended, or where it runs."""
        metric = dict(zip(self.objectives, trial.values or ())).get(MONITOR)
        if metric is None and self.objectives.get(MONITOR) == "maximize":
            metric = max(trial.intermediate_values.values(), default=None)
        seconds = 0.0 if trial.duration is None else trial.duration.total_seconds()
        status = {"COMPLETE": "ok", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "running")
        reason = trial.user_attrs.get("reason", place)
        return Entry(job.number, masked(job.swept), job.hash, status, metric, seconds, reason)

    def _values(self, job: Job, entry: Entry) -> dict[str, float]:
        """The objectives of a trial; NaN for a missing one."""
        monitor = math.nan if entry.metric is None else entry.metric
        further = self._further(job)
        return {name: monitor if name == MONITOR else further.get(name, math.nan) for name in self.objectives}

    def _further(self, job: Job) -> dict[str, float]:
        """The objectives besides the monitored metric: the last value of a metric, or a value of the run's record."""
        names = [name for name in self.objectives if name != MONITOR]
        folder = self.shared.folder_of(job)
        values = {name: last_values(folder, name).get(name) for name in names}
        for name in (name for name in names if values[name] is None):
            try:
                values[name] = float(RunRecord.load(folder).tags[name])
            except (ValueError, KeyError):
                continue
        return {name: value for name, value in values.items() if value is not None}

    def _say_best(self, trials: Sequence[optuna.trial.FrozenTrial]) -> None:
        """Print the overrides of the best trial; for several objectives the Pareto-optimal trials."""
        finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
        if not finished:
            return
        if len(self.objectives) > 1:
            front = ", ".join(f"#{trial.number}" for trial in self.study.best_trials)
            say(f"\nnot beaten in everything ({', '.join(self.objectives)}): {front}")
            return
        best = self.study.best_trial
        say(f"\nbest: {' '.join(self._job(best).swept)}")
