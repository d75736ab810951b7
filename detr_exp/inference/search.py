"""Members that are chosen one after another by what the earlier ones have reached, where a grid would be too large."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from detr_exp.config.mistakes import ConfigError
from detr_exp.inference.shared import Measured
from detr_exp.model.member import Member

if TYPE_CHECKING:
    import optuna

TOGETHER = 4  # members of one image size, which share a pass of backbone and encoder
TRIES = 8  # for each of them, until it is one that was not evaluated before
STARTUP = 12  # random members at first


def searched(
    space: Sequence[Member],
    evaluate: Callable[[list[Member]], list[Measured]],
    gain: Callable[[dict[str, float]], float],
    cost: Callable[[Member], float],
    trials: int,
    seed: int,
) -> Iterator[list[Measured]]:
    """Evaluate those members of a space that may gain much at a low cost (Ozaki et al. 2020, multi-objective TPE).

    Args:
        space: to choose from, without repeats.
        evaluate: members of one image size.
        gain: of the values of a member, to be high; not finite where it has none.
        cost: of a member, to be low.
        trials: most members to evaluate.
        seed: of the choice.

    Yields:
        the measured members of one image size.

    Raises:
        ConfigError: Optuna is not installed.
    """
    library = _optuna()
    axes = {name: list(dict.fromkeys(vars(one)[name] for one in space)) for name in vars(Member())}
    ranges = {name: library.distributions.IntDistribution(0, len(values) - 1) for name, values in axes.items()}
    sampler = library.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True)
    study = library.create_study(directions=["maximize", "minimize"], sampler=sampler)
    known: dict[Member, tuple[float, float]] = {}
    rest = dict.fromkeys(space)
    waiting = [max(space, key=_extent), min(space, key=_extent)]
    while rest and len(known) < trials:
        chosen: dict[Member, optuna.Trial] = {}
        fixed: dict[str, int] = {}
        for number in range(TOGETHER * TRIES):
            if number == 0 and (waiting := [one for one in waiting if one in rest]):
                study.enqueue_trial({name: values.index(vars(waiting[0])[name]) for name, values in axes.items()})
            study.sampler = library.samplers.PartialFixedSampler(fixed, sampler)
            trial = study.ask(ranges)
            member = Member(**{name: values[trial.params[name]] for name, values in axes.items()})
            if member in rest and member not in chosen:
                chosen[member] = trial
                fixed = {"image_size": trial.params["image_size"]}
            else:
                _tell(study, trial, known.get(member))
            if len(chosen) == min(TOGETHER, trials - len(known)):
                break
        if not chosen:  # the sampler repeats itself
            waiting = [next(iter(rest))]
            continue
        measured = evaluate(list(chosen))
        for member, _, values in measured:
            rest.pop(member)
            known[member] = gain(values), cost(member)
            _tell(study, chosen[member], known[member])
        yield measured


def _extent(member: Member) -> tuple[int, ...]:
    return math.prod(member.image_size or ()), member.queries or 0, member.layers or 0


def _tell(study: optuna.Study, trial: optuna.Trial, values: tuple[float, float] | None) -> None:
    """The result of a trial; it failed where there is none, or no number."""
    if values is not None and all(map(math.isfinite, values)):
        study.tell(trial, values)
    else:
        study.tell(trial, state=_optuna().trial.TrialState.FAIL)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError(
            "pareto.search needs optuna: pip install 'detr_exp[optuna]'; or evaluate a grid: pareto.search=null"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
