"""Nested plain values."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from detr_exp.values import flat, is_number, look_up, values_of, walk

NESTED = {"a": {"b": 1, "c": {}}, "d": [1]}


def test_flat_keeps_every_leaf_and_what_is_empty() -> None:
    assert flat(NESTED) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert [key for key, _ in walk(NESTED, "x.")] == ["x.a", "x.a.b", "x.a.c", "x.d"]


def test_every_dotted_key_finds_its_value() -> None:
    assert all(look_up(NESTED, key) == value for key, value in walk(NESTED))
    for absent in ("e", "a.e", "a.b.c", "d.0"):
        with pytest.raises(KeyError):
            look_up(NESTED, absent)


def test_a_switch_is_no_number() -> None:
    assert [is_number(value) for value in (1, 0.5, True, "1", None)] == [True, True, False, False, False]


def test_references_stay_or_lead() -> None:
    cfg = OmegaConf.create({"a": 1, "b": "${a}"})
    assert values_of(cfg) == {"a": 1, "b": 1}
    assert values_of(cfg, resolve=False) == {"a": 1, "b": "${a}"}
