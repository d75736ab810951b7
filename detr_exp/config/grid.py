"""Grid sweeps: the runs that the overrides of a command line define, and whether all of them can be composed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString

from detr_exp.config.compose import Composer, Composition, refuse_unready
from detr_exp.config.hydra_private import ConfigLoaderImpl
from detr_exp.config.mistakes import ConfigError, parse_overrides

SWEEP_KEYS = ("sweep_retry", "sweep_fail_fast")  # settings of the sweep, not of its runs
WHOLE, NUMBER = re.compile("-?[0-9]{1,18}"), re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?(e[+-]?[0-9]{1,2})?")
OTHER_SWEEPER_KEYS = (
    "sweep.",
    "hydra/sweeper.",
    "hydra.sweeper.",
)  # with these keys a file or another sweeper defines the runs


def refuse_before_start(loader: ConfigLoaderImpl, config_name: str, arguments: Sequence[str]) -> None:
    """Refuse a plain grid with a run that cannot be composed, before Hydra composes anything.

    Raises:
        ConfigError: the mistake in that run.
    """
    overrides = parse_sweep(loader, arguments)
    if is_plain(overrides):
        for run in representative_runs(loader, config_name, overrides):
            if run.choices["hydra/sweeper"] != "grid" or any(file.sweeps for file in run.sources):
                return  # a recipe of the user defines the runs
            refuse_unready(run.cfg)


def parse_sweep(loader: ConfigLoaderImpl, arguments: Sequence[str]) -> list[Override]:
    """Parse the overrides of a sweep."""
    return OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))


def is_plain(overrides: Sequence[Override]) -> bool:
    """Whether a sweep is defined only by lists of values on the command line."""
    return not any(
        f"{override.key_or_group}.".startswith(OTHER_SWEEPER_KEYS)
        or (override.is_sweep_override() and not override.is_discrete_sweep())
        for override in overrides
    )


def axes_of(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """The values of every key, in the order of the overrides: `optim.lr` -> `[optim.lr=1e-4, optim.lr=2e-4]`.

    Raises:
        ConfigError: a range instead of a list of values, no value, or the same one twice.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if key in SWEEP_KEYS:
            continue
        if not override.is_sweep_override() or override.is_hydra_override():
            axes[key] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            refuse_repeated(override)
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ConfigError(
                f"{override.input_line} is not a list of values; a grid needs one: {key}=a,b or range(1,9)"
            )
    return axes


def refuse_repeated(override: Override) -> None:
    """Refuse empty lists of values, and repeated values.

    Raises:
        ConfigError: with the value.
    """
    try:
        values = list(override.sweep_iterator())
    except ValueError as error:  # of Python's `range`
        raise ConfigError(
            f"{override.input_line} cannot be counted ({error}); write it as range(first,last,step)"
        ) from None
    key = override.get_key_element()
    if not values:
        raise ConfigError(
            f"{override.input_line} gives no value, so there is nothing to run; give one or more: {key}=a,b"
        )
    texts = [value.text if isinstance(value, QuotedString) else value for value in values]
    seen = [(isinstance(text, bool), text if isinstance(text, int | float | None) else str(text)) for text in texts]
    counts = Counter(seen)
    if twice := [value for value, known in zip(values, seen) if counts[known] > 1]:
        raise ConfigError(
            f"{override.input_line} gives {twice[0]} more than once, which is the same run; leave it out, or repeat a "
            "run with other seeds: seed=1,2"
        )


def representative_runs(
    loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[Override]
) -> Iterator[Composition]:
    """Runs that cover all overrides of a grid: one for each combination of options, and one for each other value.

    Of numbers the least and the largest, because what holds for these holds for those between (`config.ranges`): a
    grid may have thousands of seeds.

    Raises:
        ConfigError: one of them cannot be composed.
    """
    composer = Composer(loader, config_name, overrides)
    axes = axes_of(overrides)
    for run in product(
        *(values_of_key if key in composer.groups else values_of_key[:1] for key, values_of_key in axes.items())
    ):
        yield composer.compose(parse_overrides(run))
    first = {key: values_of_key[0] for key, values_of_key in axes.items()}
    for key, values_of_key in axes.items():
        for override in [] if key in composer.groups else extremes(values_of_key)[1:]:
            yield composer.compose(parse_overrides([*(first | {key: override}).values()]))


def extremes(overrides: Sequence[str]) -> list[str]:
    """The first override of a key, and of the others all but the numbers that lie between two of their type."""
    kept, numbers = list(overrides), [(number, one) for one in overrides[1:] if (number := number_in(one)) is not None]
    for kind in (int, float):
        between = {one for _, one in sorted(pair for pair in numbers if type(pair[0]) is kind)[1:-1]}
        kept = [one for one in kept if one not in between]
    return kept


def number_in(override: str) -> int | float | None:
    """The value of an override if it is written as a number."""
    text = override.partition("=")[2]
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else None
