"""Every number of every option has a range, and what is out of it is refused by name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from detr_exp.config.compose import CONF_DIR, compose, refuse_unready
from detr_exp.config.mistakes import ConfigError
from detr_exp.config.ranges import DECIDED_BY, ROWS, TABLE, Row, refuse_out_of_range, row_of
from detr_exp.values import walk

NO_SETTINGS = ("experiment", "sweep", "hydra/job_logging", "hydra/hydra_logging")  # recipes own no keys


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def leaves(path: Path) -> dict[str, Any]:
    """The keys of an option's file as in a whole config."""
    text = path.read_text()
    package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
    group = ".".join(path.relative_to(CONF_DIR).parent.parts)
    prefix = {"_global_": ""}.get(package[1], f"{package[1]}.") if package else f"{group}." if group else ""
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(values, dict)
    values.pop("defaults", None)
    values.pop("contenders", None)  # options of other programs
    return {f"{prefix}{key}": value for key, value in walk(values)}  # type: ignore[arg-type]


FILES = [
    path for path in sorted(CONF_DIR.rglob("*.yaml")) if not str(path.relative_to(CONF_DIR)).startswith(NO_SETTINGS)
]
LEAVES = {path: leaves(path) for path in FILES}
TAKEN = {  # the key that a reference stands for -> the keys that take it
    reference[1]: [key for own in LEAVES.values() for key, other in own.items() if other == value]
    for values in LEAVES.values()
    for value in values.values()
    if isinstance(value, str) and (reference := re.fullmatch(r"\$\{([\w.]+)\}", value))
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_every_number_has_a_range(path: Path) -> None:
    values = LEAVES[path]
    for key, value in values.items():
        if is_number(value) or (isinstance(value, list) and any(map(is_number, value))):
            rows = [row_of(name, values) for name in (key, *TAKEN.get(key, ()))]
            assert any(rows), f"{path}: {key} is a number, but the table of ranges.py does not know it"
            for row in filter(None, rows):
                assert not list(row.faults(value)), f"{path}: {key} is {value}, which the table refuses"


def test_every_row_is_of_a_key_there_is() -> None:
    known = {re.sub(r"(param_groups|sets)\.\w+\.", r"\1.*.", key) for values in LEAVES.values() for key in values}
    rules = {key for key in ROWS if key.startswith("optim.param_groups.*.")}  # fields of a rule, in no file
    assert {key.partition(":")[0] for key in ROWS} <= known | rules
    assert len(ROWS) == sum(len(names.split()) for _, _, names in TABLE), "no key stands in two rows"


def nested(key: str, value: Any) -> Any:
    """A config with one number, and what decides about its range."""
    name, _, deciding = key.partition(":")
    plain = name.replace("*", "mine")
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, plain, value)
    if deciding:
        OmegaConf.update(cfg, DECIDED_BY[name], deciding)
    return cfg


def wrong(row: Row) -> list[Any]:
    least, most, step = row.range.least, row.range.most, 1 if row.range.whole else 1e-6
    outside = [least - step if not row.range.above else least] * math.isfinite(least)
    outside += [most + step if not row.range.below else most] * math.isfinite(most)
    no_numbers = [] if row.free else [True, "many", "1e-3", {"a": 1}]
    return [math.nan, math.inf, -math.inf, 10**400, *outside, *no_numbers, *([1.5] if row.range.whole else [])]


@pytest.mark.parametrize("key", ROWS)
def test_what_is_out_of_range_is_refused_by_name(key: str) -> None:
    row, name = ROWS[key], key.partition(":")[0].replace("*", "mine")
    for value in wrong(row):
        many = [row.range.example] * ((row.length or 2) - 1)
        for given in [value, [*many, value]] if row.listed else [value]:
            if isinstance(given, dict):
                continue  # its own keys are looked at
            with pytest.raises(ConfigError, match=rf"{re.escape(name)} is .*it must be .*: {re.escape(name)}="):
                refuse_out_of_range(nested(key, given))
    if not row.nullable:
        with pytest.raises(ConfigError, match="is null"):
            refuse_out_of_range(nested(key, None))
    one = row.range.example
    for value in ([one] * row.length if row.length else one, *row.range.choices, *([None] if row.nullable else [])):
        refuse_out_of_range(nested(key, value))


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.length])
def test_lists_of_another_length_are_refused(key: str) -> None:
    row = ROWS[key]
    assert row.length
    right = [row.range.example] * row.length
    for given in ([], right[:-1], [*right, row.range.example], row.range.example):
        with pytest.raises(ConfigError, match=rf"{key} is .*; it must be a list of {row.length}, each .*: {key}=\["):
            refuse_out_of_range(nested(key, given))


def test_what_is_listed_are_numbers() -> None:
    refuse_out_of_range(nested("data.multi_scale", "rtdetr"))
    with pytest.raises(ConfigError, match=r"data\.multi_scale is 64 \(in \['64'\]\)"):
        refuse_out_of_range(nested("data.multi_scale", ["64"]))


def test_messages_name_the_key_behind_a_reference() -> None:
    with pytest.raises(ConfigError, match=r"^loss\.focal_alpha is 1\.5"):
        refuse_unready(compose(["loss=focal", "loss.focal_alpha=1.5"]))
    refuse_unready(compose(["loss=mal", "loss.focal_alpha=1.5"]))  # a weight there


def test_user_defined_parts_have_no_ranges(tmp_path: Path) -> None:
    folder = tmp_path / "loss"
    folder.mkdir()
    mine = "defaults: [terms: detr]\nactivation: sigmoid\nfocal_gamma: -1\nclass_loss:\n"
    mine += "  _target_: mine.loss\n  _partial_: true\n  gamma: ${loss.focal_gamma}\n  temperature: -3\n"
    (folder / "mine.yaml").write_text(mine)
    refuse_unready(compose(["loss=mine"], config_dir=tmp_path))
    with pytest.raises(ConfigError, match=r"loss\.weight_bbox is -1"):
        refuse_unready(compose(["loss=mine", "loss.weight_bbox=-1"], config_dir=tmp_path))
    (folder / "ours.yaml").write_text("defaults: [focal]\nfocal_gamma: .nan\n")
    with pytest.raises(ConfigError, match=r"loss\.focal_gamma is nan"):
        refuse_unready(compose(["loss=ours"], config_dir=tmp_path))
