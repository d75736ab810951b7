"""A Hydra-driven experiment runner for real-time detection transformers.

`detr_exp.load(checkpoint).predict(images)` uses a trained network; `detr_exp.build` makes all else from a config.
"""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load` without importing torch before it is used."""
    if name == "load":
        from detr_exp.inference.detector import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
