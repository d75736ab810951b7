"""A search with Optuna: trials that ask, train and tell one by one, unpromising ones given up, studies that go on."""

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
DRAWS = 100  # of a point that has not diverged before
WORDS = {"sampler": ("tpe", "random"), "pruner": ("halving", "median", "hyperband", None)}


class OptunaSweeper(Sweeper):
    """Searches the ranges given on the command line; `conf/hydra/sweeper/optuna.yaml` says what each setting does.

    Raises:
        ConfigError: for a word that is none of the choices, or when optuna is not installed.
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
        """Not done by the constructor, whose errors Hydra would wrap in its own."""
        for name, value in (("sampler", self.sampler), ("pruner", self.pruner)):
            if value not in WORDS[name]:
                choices = ", ".join(str(word or "null") for word in WORDS[name])
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
        """Run what is missing of the study's trials.

        Returns:
            what each trial returned.

        Raises:
            ConfigError: the ranges do not compose, or the folder is that of another configuration or other ranges.
            SweepFailed: after the last trial, if any of them failed.
        """
        self._read(arguments)
        for words in self._typical():
            refuse_unready(self._composed(words))
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

    # ---------------------------------------------------------------------------------------------- what is searched

    def _read(self, arguments: list[str]) -> None:
        """The fixed words and the distributions of the swept ones."""
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        fixed: dict[str, str] = {}
        self.ranges: dict[str, optuna.distributions.BaseDistribution] = {}
        for word in OverridesParser.create(config_loader=self.shared.loader).parse_overrides(words):
            key = word.get_key_element()
            if key in SWEEP_KEYS:
                continue
            fixed.pop(key, None), self.ranges.pop(key, None)
            if word.is_sweep_override():
                self.ranges[key] = distribution(word)
            else:
                fixed[key] = str(word.input_line)
        self.fixed = list(fixed.values())
        if not self.ranges:
            raise ConfigError("nothing is searched; give a choice or a range: optim.lr='tag(log,interval(1e-5,1e-3))'")

    def _typical(self) -> Iterator[list[str]]:
        """Words of trials that show whether all can be: each choice, both ends, a fraction; else the lowest."""
        options = {key: getattr(given, "choices", None) or ends_of(given) for key, given in self.ranges.items()}
        lowest = {key: values[0] for key, values in options.items()}
        for key, values in options.items():
            for value in values:
                yield [*self.fixed, *(override_of(*pair) for pair in (lowest | {key: value}).items())]

    def _composed(self, words: list[str]) -> DictConfig:
        return composition(self.shared.loader, self.shared.config.hydra.job.config_name, words).cfg

    def _study(self) -> optuna.Study:
        """The study of the folder.

        Raises:
            ConfigError: it searches other ranges or for something else.
        """
        import optuna

        repair_journal(self.shared.folder / JOURNAL)
        study = optuna.create_study(
            study_name=STUDY,
            storage=storage(self.shared.folder),
            directions=cast(Any, list(self.objectives.values())),
            load_if_exists=True,
        )
        wanted = {key: optuna.distributions.distribution_to_json(given) for key, given in sorted(self.ranges.items())}
        asked = {"ranges": wanted, "objectives": self.objectives, "pruner": self.pruner}
        known = study.user_attrs.get("asked")
        if known is not None and known != asked:
            differing = ", ".join(
                f"{key} was {known[key]} and is {asked[key]}" for key in asked if known[key] != asked[key]
            )
            raise ConfigError(
                f"{self.shared.folder} holds another study: {differing}; use another folder: hydra.sweep.dir=..."
            )
        study.set_user_attr("asked", asked)
        return study

    # -------------------------------------------------------------------------------------------- ask, train and tell

    def _missing(self) -> int:
        """Trials to start or to go on with; failed ones are replaced where that is asked for."""
        states = [trial.state.name for trial in self.study.trials]
        missing = ("RUNNING", "WAITING", *(("FAIL",) if self.shared.retry_failed else ()))
        return max(0, self.n_trials - sum(state not in missing for state in states))

    def _trials(self, missing: int) -> Iterator[Job]:
        """Trials that an earlier start has left behind, then new ones, drawn when there is a place for them."""
        left_behind = [trial for trial in self.study.trials if trial.state.name == "RUNNING"]
        known = self.shared.ledger.latest()
        for trial in left_behind:
            job = self.jobs.get(trial.number)
            entry = None if job is None else known.get(job.hash)
            if job is not None and entry is not None and entry.status != "killed":
                self._tell(job, entry)  # it had ended, but nobody was there to tell
            else:
                yield self._started(trial)
            missing -= 1
        for _ in range(missing):
            self.study.sampler = self._sampler(len(self.study.trials))
            if not self._avoid_diverged():
                say(f"the search ends: {DRAWS} draws gave no point that has not diverged before")
                return
            number = self.study.ask(self.ranges).number
            yield self._started(self.study.trials[number])

    def _avoid_diverged(self) -> bool:
        """See that the next point asked for is none at which a training has diverged; whether there is such a point.

        Samplers leave failed trials out of what they learn from, and would draw them again. The next draw is looked at
        in a copy of the study, as one that was asked for cannot be taken back; in its place comes one at random.
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
        points = (copy.ask(self.ranges).params for _ in range(DRAWS))
        fresh = next((point for point in points if point not in diverged), None)
        if fresh is not None:
            self.study.enqueue_trial(fresh)
        return fresh is not None

    def _started(self, trial: optuna.trial.FrozenTrial) -> Job:
        if len(trial.params) < len(self.ranges):  # the sweep was killed while it asked
            import optuna

            asked = optuna.Trial(self.study, trial._trial_id)
            for key, given in self.ranges.items():
                asked._suggest(key, given)
            trial = self.study.trials[trial.number]
        job = self.jobs[trial.number] = self._job(trial)
        if self.pruner is not None and len(self.objectives) == 1:
            told = {"folder": str(self.shared.folder), "number": trial.number, "pruner": self.pruner}
            told |= {"min_epochs": self.min_epochs, "reduction_factor": self.reduction_factor}
            told |= {"startup_trials": self.startup_trials}
            told |= {"max_epochs": OmegaConf.select(self._composed(job.overrides), "trainer.epochs", default=100)}
            self.shared.task.environment_of[job.hash] = {TRIAL_VARIABLE: json.dumps(told)}
        return job

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Made for each trial from seed and number, so that a study that goes on does not repeat its draws."""
        from optuna import samplers

        seed = (self.seed * 1_000_003 + number) % 2**31
        if self.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=self.startup_trials, constant_liar=True)

    def _job(self, trial: optuna.trial.FrozenTrial) -> Job:
        swept = [override_of(key, trial.params[key]) for key in self.ranges]
        return Job(trial.number, [*self.fixed, *swept], swept, hash_of([f"trial {trial.number}", *swept]))

    def _tell(self, job: Job, entry: Entry) -> None:
        """Tell the study how a trial ended; one that was asked to end stays open and is gone on with later."""
        from optuna.trial import TrialState

        if entry.status == "killed":
            return
        values = list(self._values(job, entry).values())
        if entry.status == "pruned":
            self.study.tell(job.number, state=TrialState.PRUNED)
        elif entry.status == "ok" and all(map(math.isfinite, values)):
            self.study.tell(job.number, values)
        else:
            reason = entry.reason or f"it did not give {', '.join(self.objectives)}"
            if entry.status == "ok":
                self.shared.ledger.record(job, time.monotonic() - entry.seconds, "failed", entry.metric, reason)
            asked = self.study.trials[job.number]
            self.study._storage.set_trial_user_attr(asked._trial_id, "reason", f"{entry.status}: {reason}")
            self.study.tell(job.number, state=TrialState.FAIL)

    # ------------------------------------------------------------------------------------------------- what came out

    def _values(self, job: Job, entry: Entry) -> dict[str, float]:
        """The objectives of a trial; NaN for one it does not give."""
        monitor = math.nan if entry.metric is None else entry.metric
        further = self._further(job)
        return {name: monitor if name == MONITOR else further.get(name, math.nan) for name in self.objectives}

    def _further(self, job: Job) -> dict[str, float]:
        """The objectives beside the monitored metric: the last value of a metric, or what the run's record says."""
        names = [name for name in self.objectives if name != MONITOR]
        folder = self.shared.folder / job.hash
        found = {name: last_values(folder, name).get(name) for name in names}
        for name in (name for name in names if found[name] is None):
            try:
                found[name] = float(RunRecord.load(folder).tags[name])
            except (ValueError, KeyError):
                continue
        return {name: value for name, value in found.items() if value is not None}

    def _say_best(self) -> None:
        """The words of the best trial; of several objectives the trials that no other beats in all of them."""
        finished = [trial for trial in self.study.trials if trial.state.name == "COMPLETE"]
        if not finished:
            return
        if len(self.objectives) > 1:
            front = ", ".join(f"#{trial.number}" for trial in self.study.best_trials)
            say(f"\nnot beaten in everything ({', '.join(self.objectives)}): {front}")
            return
        best = self.study.best_trial
        say(f"\nbest: {' '.join(self._job(best).swept)}")


def distribution(word: Override) -> optuna.distributions.BaseDistribution:
    """What Optuna calls the choice or range that a word gives.

    Raises:
        ConfigError: there is nothing in it, the same twice, or a tag that does nothing.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    given, key = cast(Any, word.value()), word.get_key_element()
    is_interval = isinstance(given, IntervalSweep)
    if unknown := sorted(set(given.tags) - ({"log"} if is_interval else set())):
        raise ConfigError(
            f"{word.input_line} has the tag {unknown[0]}, which means nothing here; the only one is log, of a range: "
            f"{key}='tag(log,interval(1e-5,1e-3))'"
        )
    if not is_interval:
        refuse_repeated(word)
        return CategoricalDistribution([str(value) for value in word.sweep_string_iterator()])
    low, high, is_log = given.start, given.end, "log" in given.tags
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not is_log)):
        scale = " on a logarithmic scale, which begins above 0" if is_log else ""
        raise ConfigError(f"{word.input_line} is no range{scale}; write it as {key}='interval(lowest,highest)'")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def ends_of(given: Any) -> tuple[float, ...]:
    """Both ends of a range, and what is between whole numbers where fractions are drawn."""
    between = () if isinstance(given.low, int) else (given.low + (given.high - given.low) / math.pi,)
    return (given.low, given.high, *between)


def override_of(key: str, value: Any) -> str:
    """`key=value`, a number with six digits."""
    return f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
