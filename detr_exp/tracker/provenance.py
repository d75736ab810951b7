"""Parameters, code and environment of a run, for comparing and repeating it."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from detr_exp.values import Values, look_up

PACKAGES = ("detr_exp", "torch", "torchvision", "timm", "numpy", "pycocotools", "hydra-core")
MAIN_KEYS = (
    "seed",
    "model.image_size",
    "model.num_queries",
    "model.hidden_dim",
    "model.weights",
    "loss.weight_class",
    "loss.weight_bbox",
    "loss.weight_giou",
    "matcher.cost_class",
    "matcher.cost_bbox",
    "matcher.cost_giou",
    "optim.lr",
    "optim.lr_backbone",
    "optim.weight_decay",
    "optim.warmup",
    "optim.warmup_unit",
    "data.root",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.grad_accum_steps",
    "trainer.clip_max_norm",
    "trainer.use_ema",
    "trainer.ema_decay",
    "trainer.evaluate_weights",
    "trainer.hardware.amp",
)


def parameters(
    config: Values, overrides: Iterable[str] = (), choices: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Parameters of a run for trackers: a fixed list of keys, those set by overrides, and the option of every group.

    With these, everything that the runs of a sweep may differ in can be compared.

    Args:
        config: the resolved config.
        overrides: of the command line, e.g. `loss.focal_gamma=2.0`.
        choices: group -> option, e.g. `loss` -> `focal`.
    """
    overridden = [override.partition("=")[0].lstrip("+~") for override in overrides if not override.startswith("~")]
    found = {key: _at(config, key) for key in dict.fromkeys([*MAIN_KEYS, *overridden])}
    return {key: str(value) for key, value in (found | dict(choices or {})).items() if value is not None}


def _at(config: Values, key: str) -> object:
    try:
        return look_up(config, key)
    except KeyError:
        return None


@cache
def environment() -> dict[str, str]:
    """Tags for code, packages and machine; read once per process, because loaded code does not change."""
    tags = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            tags[f"version/{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tags | git()


def versions() -> str:
    """What a bug report needs: versions of this package, torch, CUDA and Python; torch is not imported."""
    found = git()
    commit = (
        f" (commit {found['git.commit'][:12]}{', changed' if found['git.dirty'] == 'true' else ''})" if found else ""
    )
    spec = find_spec("torch")
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py"))) if spec and spec.origin else {}
    toolkits = [f"{name.upper()} {built[name]}" for name in ("cuda", "hip", "xpu") if built.get(name)]
    return (
        f"detr_exp {metadata.version('detr_exp')}{commit}\n"
        f"torch {built.get('__version__', 'is not installed')} ({', '.join(toolkits) or 'without CUDA'})\n"
        f"Python {platform.python_version()}, {platform.platform()}"
    )


def git() -> dict[str, str]:
    """Commit of the checkout this package runs from, and whether it has changes; empty for an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return {}
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(bool(changed)).lower()}


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, timeout=10)
    return done.stdout.decode("utf-8", "replace").strip()
