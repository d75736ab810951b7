"""Every file of `conf/sweep`: each of its values composes, and is tried by the sweeper that can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from detr_exp.config.compose import CONF_DIR, compose

FILES = sorted((CONF_DIR / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_its_values_compose(path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    searches = {"override /hydra/sweeper": "optuna"} in content["defaults"]
    assert {"override /hydra/launcher": "local"} in content["defaults"]
    axes: dict[str, list[str]] = {}
    for key, given in content["hydra"]["sweeper"]["params"].items():
        (word,) = OverridesParser.create().parse_overrides([f"{key}={given}"])
        if word.is_discrete_sweep():
            axes[key] = [f"{key}={value}" for value in word.sweep_string_iterator()]
        elif word.is_sweep_override():
            assert searches, f"{path.name}: a grid cannot try {given}"
            axes[key] = [f"{key}={end:g}" for end in (word.value().start, word.value().end)]  # type: ignore[union-attr]
        else:
            axes[key] = [f"{key}={given}"]
    first = {key: values[0] for key, values in axes.items()}
    for key, values in axes.items():
        for value in values[1:] or values:
            compose([f"sweep={path.stem}", *(first | {key: value}).values()])
    assert f"sweep={path.stem}" in path.read_text(), "the command"
