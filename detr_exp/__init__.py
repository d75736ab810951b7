"""A Hydra-driven experiment runner for real-time detection transformers.

`detr_exp.fit(overrides)` trains; `detr_exp.load(checkpoint)` opens a trained detector, with `predict`, `evaluate` and
`export`; `detr_exp.build` makes single parts from a config.
"""

from typing import Any

__all__ = ["fit", "load"]


def __getattr__(name: str) -> Any:
    """`fit` and `load` without importing anything before they are used."""
    if name == "fit":
        from detr_exp.fitting import fit

        return fit
    if name == "load":
        from detr_exp.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
