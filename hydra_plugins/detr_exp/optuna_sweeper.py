"""A search with Optuna: trials ask, train and tell one by one, unpromising ones are pruned, and studies resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from detr_exp.config.compose import composition, refuse_unready
from detr_exp.config.grid import SWEEP_KEYS, refuse_repeated
from detr_exp.config.mistakes import ConfigError
from detr_exp.terminal import say
from detr_exp.tracker.base import RunRecord
from detr_exp.trainer.trial import JOURNAL, STUDY, TRIAL_VARIABLE, repair_journal, storage
from hydra_plugins.detr_exp._ledger import Entry, Job
from hydra_plugins.detr_exp._parent import last_values
from hydra_plugins.detr_exp._sweep import Sweep, hash_of

if TYPE_CHECKING:
    import optuna

MONITOR = "monitor"
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
        n_trials: int,
        sampler: str,
        seed: int,
        startup_trials: int,
        pruner: str | None,
        min_epochs: int,
        reduction_factor: int,
        objectives: Mapping[str, str],
    ) -> None:
        self.params, self.n_trials, self.sampler, self.seed = params, n_trials, sampler, seed
        self.startup_trials, self.pruner, self.min_epochs = startup_trials, pruner, min_epochs
        self.reduction_factor, self.objectives = reduction_factor, dict(objectives)

    def _refuse_wrong_settings(self) -> None:
        """Not in the constructor, whose errors Hydra would wrap in its own."""
        for name, value in (("sampler", self.sampler), ("pruner", self.pruner)):
            if value not in CHOICES[name]:
                choices = ", ".join(str(choice or "null") for choice in CHOICES[name])
                raise ConfigError(f"hydra.sweeper.{name} is {value!r}; use one of {choices}")
        if not set(self.objectives.values()) <= {"maximize", "minimize"}:
            raise ConfigError(f"hydra.sweeper.objectives is {self.objectives}; each is maximize or minimize")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._refuse_wrong_settings()
        try:
            import optuna
        except ModuleNotFoundError:
            raise ConfigError("hydra/sweeper=optuna needs optuna: pip install 'detr_exp[optuna]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
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
        with self.shared.held():
            self.study = self._study()
            self.jobs = {
                trial.number: self._job(trial)
                for trial in self.study.trials
                if trial.params.keys() == self.ranges.keys()
            }
            self.shared.refuse_another_config(self.jobs.values(), lambda job: self._composed(job.overrides))
            missing = self._missing()
            self.shared.run(self._trials(missing), missing, at_once=False, ended=self._tell)
        self._say_best()
        jobs = list(self.jobs.values())
        self.shared.close(jobs, {job.hash: self._further(job) for job in jobs})
        entries = self.shared.ledger.latest()
        return [entries[job.hash].metric for job in jobs]

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

    def _study(self) -> optuna.Study:
        """The study of the folder.

        Raises:
            ConfigError: it has other ranges, objectives or another pruner.
        """
        import optuna

        repair_journal(self.shared.folder / JOURNAL)
        study = optuna.create_study(
            study_name=STUDY,
            storage=storage(self.shared.folder),
            directions=cast(Any, list(self.objectives.values())),
            load_if_exists=True,
        )
        wanted = {key: optuna.distributions.distribution_to_json(spread) for key, spread in sorted(self.ranges.items())}
        search = {"ranges": wanted, "objectives": self.objectives, "pruner": self.pruner}
        known = study.user_attrs.get("asked")
        if known is not None and known != search:
            differing = ", ".join(
                f"{key} was {known[key]} and is {search[key]}" for key in search if known[key] != search[key]
            )
            raise ConfigError(
                f"{self.shared.folder} holds another study: {differing}; use another folder: hydra.sweep.dir=..."
            )
        study.set_user_attr("asked", search)
        return study

    # -------------------------------------------------------------------------------------------- ask, train and tell

    def _missing(self) -> int:
        """Number of trials to start or to resume; failed ones are replaced on request."""
        states = [trial.state.name for trial in self.study.trials]
        missing = ("RUNNING", "WAITING", *(("FAIL",) if self.shared.retry_failed else ()))
        return max(0, self.n_trials - sum(state not in missing for state in states))

    def _trials(self, missing: int) -> Iterator[Job]:
        """Unfinished trials of an earlier start, then new ones, sampled when a slot is free."""
        unfinished = [trial for trial in self.study.trials if trial.state.name == "RUNNING"]
        known = self.shared.ledger.latest()
        for trial in unfinished:
            job = self.jobs.get(trial.number)
            entry = None if job is None else known.get(job.hash)
            if job is not None and entry is not None and entry.status != "killed":
                self._tell(job, entry)  # it had ended, but the study did not know it
            else:
                yield self._started(trial)
            missing -= 1
        for _ in range(missing):
            self.study.sampler = self._sampler(len(self.study.trials))
            if not self._avoid_diverged():
                say(f"the search ends: {SAMPLES} samples gave no point that has not diverged before")
                return
            number = self.study.ask(self.ranges).number
            yield self._started(self.study.trials[number])

    def _avoid_diverged(self) -> bool:
        """Make the next point one at which no training has diverged; returns whether there is such a point.

        Samplers ignore failed trials, and would sample them again. The next sample is inspected in a copy of the study,
        because a trial that was asked for cannot be withdrawn; if it has diverged, a random point replaces it.
        """
        import optuna

        trials = self.study.trials
        diverged = [trial.params for trial in trials if trial.user_attrs.get("reason", "").startswith("nan:")]
        if not diverged:
            return True
        copy = optuna.create_study(directions=self.study.directions, sampler=self._sampler(len(trials)))
        copy.add_trials(trials)
        if copy.ask(self.ranges).params not in diverged:
            return True
        copy.sampler = optuna.samplers.RandomSampler(seed=len(trials))
        points = (copy.ask(self.ranges).params for _ in range(SAMPLES))
        fresh = next((point for point in points if point not in diverged), None)
        if fresh is not None:
            self.study.enqueue_trial(fresh)
        return fresh is not None

    def _started(self, trial: optuna.trial.FrozenTrial) -> Job:
        if len(trial.params) < len(self.ranges):  # the sweep was killed while it sampled the trial
            import optuna

            started = optuna.Trial(self.study, trial._trial_id)
            for key, spread in self.ranges.items():
                started._suggest(key, spread)
            trial = self.study.trials[trial.number]
        job = self.jobs[trial.number] = self._job(trial)
        if self.pruner is not None and len(self.objectives) == 1:
            pruning = {"folder": str(self.shared.folder), "number": trial.number, "pruner": self.pruner}
            pruning |= {"min_epochs": self.min_epochs, "reduction_factor": self.reduction_factor}
            pruning |= {"startup_trials": self.startup_trials}
            pruning |= {"max_epochs": OmegaConf.select(self._composed(job.overrides), "trainer.epochs", default=100)}
            self.shared.task.environment_of[job.hash] = {TRIAL_VARIABLE: json.dumps(pruning)}
        return job

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
            self.study.tell(job.number, state=TrialState.PRUNED)
        elif entry.status == "ok" and all(map(math.isfinite, values)):
            self.study.tell(job.number, values)
        else:
            reason = entry.reason or f"it has no {', '.join(self.objectives)}"
            if entry.status == "ok":
                self.shared.ledger.record(job, time.monotonic() - entry.seconds, "failed", entry.metric, reason)
            trial = self.study.trials[job.number]
            self.study._storage.set_trial_user_attr(trial._trial_id, "reason", f"{entry.status}: {reason}")
            self.study.tell(job.number, state=TrialState.FAIL)

    # ------------------------------------------------------------------------------------------------- results

    def _values(self, job: Job, entry: Entry) -> dict[str, float]:
        """The objectives of a trial; NaN for a missing one."""
        monitor = math.nan if entry.metric is None else entry.metric
        further = self._further(job)
        return {name: monitor if name == MONITOR else further.get(name, math.nan) for name in self.objectives}

    def _further(self, job: Job) -> dict[str, float]:
        """The objectives besides the monitored metric: the last value of a metric, or a value of the run's record."""
        names = [name for name in self.objectives if name != MONITOR]
        folder = self.shared.folder / job.hash
        values = {name: last_values(folder, name).get(name) for name in names}
        for name in (name for name in names if values[name] is None):
            try:
                values[name] = float(RunRecord.load(folder).tags[name])
            except (ValueError, KeyError):
                continue
        return {name: value for name, value in values.items() if value is not None}

    def _say_best(self) -> None:
        """Print the overrides of the best trial; for several objectives the Pareto-optimal trials."""
        finished = [trial for trial in self.study.trials if trial.state.name == "COMPLETE"]
        if not finished:
            return
        if len(self.objectives) > 1:
            front = ", ".join(f"#{trial.number}" for trial in self.study.best_trials)
            say(f"\nnot beaten in everything ({', '.join(self.objectives)}): {front}")
            return
        best = self.study.best_trial
        say(f"\nbest: {' '.join(self._job(best).swept)}")


def distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """Optuna's distribution for a choice or range.

    Raises:
        ConfigError: it is empty, has a value twice, or has a tag without effect.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, key = cast(Any, override.value()), override.get_key_element()
    is_interval = isinstance(sweep, IntervalSweep)
    if unknown := sorted(set(sweep.tags) - ({"log"} if is_interval else set())):
        raise ConfigError(
            f"{override.input_line} has the tag {unknown[0]}, which has no meaning; the only tag is log, for a range: "
            f"{key}='tag(log,interval(1e-5,1e-3))'"
        )
    if not is_interval:
        refuse_repeated(override)
        return CategoricalDistribution([str(value) for value in override.sweep_string_iterator()])
    low, high, is_log = sweep.start, sweep.end, "log" in sweep.tags
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not is_log)):
        scale = " on a logarithmic scale, which begins above 0" if is_log else ""
        raise ConfigError(f"{override.input_line} is no range{scale}; write it as {key}='interval(lowest,highest)'")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def ends_of(interval: Any) -> tuple[float, ...]:
    """Both ends of a range, and a fraction between them unless it is one of whole numbers."""
    between = () if isinstance(interval.low, int) else (interval.low + (interval.high - interval.low) / math.pi,)
    return (interval.low, interval.high, *between)


def override_of(key: str, value: Any) -> str:
    """`key=value`, a number with six digits."""
    return f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
