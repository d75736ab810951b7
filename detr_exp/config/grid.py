"""The plan of a grid: which runs the words of a command line stand for, and whether all of them can be composed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString

from detr_exp.config.compose import Composer, Composition, refuse_unready
from detr_exp.config.hydra_private import ConfigLoaderImpl
from detr_exp.config.mistakes import ConfigError, parse_overrides

SWEEP_KEYS = ("sweep_retry", "sweep_fail_fast")  # of the command line, meant for the sweep and not for its runs
OTHER_SWEEPER_KEYS = ("sweep.", "hydra/sweeper.", "hydra.sweeper.")  # keys by which a file or another sweeper decides


def refuse_before_start(loader: ConfigLoaderImpl, config_name: str, words: Sequence[str]) -> None:
    """Refuse a plain grid with a run that cannot be composed, before Hydra composes anything.

    Raises:
        ConfigError: what is wrong with that run.
    """
    overrides = parse_sweep(loader, words)
    if is_plain(overrides):
        for run in representative_runs(loader, config_name, overrides):
            if run.choices["hydra/sweeper"] != "grid" or any(file.sweeps for file in run.sources):
                return  # a recipe of the user's own decides what is tried
            refuse_unready(run.cfg)


def parse_sweep(loader: ConfigLoaderImpl, words: Sequence[str]) -> list[Override]:
    """The words of a sweep."""
    return OverridesParser.create(config_loader=loader).parse_overrides(list(words))


def is_plain(words: Sequence[Override]) -> bool:
    """Whether lists of values on the command line are all there is to a sweep."""
    return not any(
        f"{word.key_or_group}.".startswith(OTHER_SWEEPER_KEYS)
        or (word.is_sweep_override() and not word.is_discrete_sweep())
        for word in words
    )


def axes_of(words: Sequence[Override]) -> dict[str, list[str]]:
    """What is tried of every key, in the order of the words: `optim.lr` -> `[optim.lr=1e-4, optim.lr=2e-4]`.

    Raises:
        ConfigError: a range instead of a list of values, no value, or the same one twice.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        key = word.get_key_element()
        if key in SWEEP_KEYS:
            continue
        if not word.is_sweep_override() or word.is_hydra_override():
            axes[key] = [str(word.input_line)]
        elif word.is_discrete_sweep():
            refuse_repeated(word)
            axes[key] = [f"{key}={value}" for value in word.sweep_string_iterator()]
        else:
            raise ConfigError(f"{word.input_line} is no list of values; a grid needs one: {key}=a,b or range(1,9)")
    return axes


def refuse_repeated(word: Override) -> None:
    """Refuse values that give no run, or the same run twice.

    Raises:
        ConfigError: names them.
    """
    try:
        values = list(word.sweep_iterator())
    except ValueError as error:  # of Python's `range`
        raise ConfigError(
            f"{word.input_line} cannot be counted ({error}); write it as range(first,last,step)"
        ) from None
    key = word.get_key_element()
    if not values:
        raise ConfigError(f"{word.input_line} gives no value, so there is nothing to run; give one or more: {key}=a,b")
    texts = [value.text if isinstance(value, QuotedString) else value for value in values]
    seen = [(isinstance(text, bool), text if isinstance(text, int | float | None) else str(text)) for text in texts]
    if twice := [value for value, known in zip(values, seen) if seen.count(known) > 1]:
        raise ConfigError(
            f"{word.input_line} gives {twice[0]} more than once, which is the same run; leave it out, or repeat a run "
            "with other seeds: seed=1,2"
        )


def representative_runs(loader: ConfigLoaderImpl, config_name: str, words: Sequence[Override]) -> Iterator[Composition]:
    """Runs that show whether all can be: one for each choice of options, and one for each further value of a key.

    Raises:
        ConfigError: one of them cannot.
    """
    composer = Composer(loader, config_name, words)
    axes = axes_of(words)
    for run in product(*(tried if key in composer.groups else tried[:1] for key, tried in axes.items())):
        yield composer.compose(parse_overrides(run))
    first = {key: tried[0] for key, tried in axes.items()}
    for key, tried in axes.items():
        for word in [] if key in composer.groups else tried[1:]:
            yield composer.compose(parse_overrides([*(first | {key: word}).values()]))
