"""The space that a search samples: choices and ranges of the command line as distributions of Optuna."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from hydra.core.override_parser.types import IntervalSweep, Override

from detr_exp.config.grid import refuse_repeated
from detr_exp.config.mistakes import ConfigError

if TYPE_CHECKING:
    import optuna


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
