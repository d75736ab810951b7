"""A search evaluates few members, and finds about the front of all."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from detr_exp.config.mistakes import ConfigError
from detr_exp.inference.search import TOGETHER, searched
from detr_exp.model.member import Member

pytest.importorskip("optuna")
SPACE = [
    Member(layers, 25 * queries, (32 * side, 32 * side))
    for side in range(20, 9, -1)
    for queries in range(12, 0, -1)
    for layers in range(1, 7)
]


def gain_of(member: Member) -> float:
    """Saturates in each axis, as average precisions do."""
    assert member.layers and member.queries and member.image_size  # noqa: PT018
    parts = (member.layers, 1.2), (member.queries, 60), (member.image_size[0], 220)
    return math.prod(1 - math.exp(-value / scale) for value, scale in parts)


def cost_of(member: Member) -> float:
    assert member.layers and member.queries and member.image_size  # noqa: PT018
    return 3e-4 * member.image_size[0] ** 2 + member.layers * (2 + 0.02 * member.queries)


def evaluated(members: Sequence[Member]) -> list[Any]:
    assert len({member.image_size for member in members}) == 1
    assert 1 <= len(members) <= TOGETHER
    return [(member, None, {"gain": gain_of(member)}) for member in members]


def found(space: Sequence[Member], trials: int, seed: int = 0) -> list[Member]:
    rounds = searched(space, evaluated, lambda values: values["gain"], cost_of, trials, seed)
    return [member for measured in rounds for member, _, _ in measured]


def area(members: Sequence[Member]) -> float:
    """Under the front, up to the highest cost of the space."""
    total, best, before = 0.0, 0.0, 0.0
    for member in sorted(members, key=cost_of):
        total += best * (cost_of(member) - before)
        best, before = max(best, gain_of(member)), cost_of(member)
    return total + best * (max(map(cost_of, SPACE)) - before)


def test_few_members_have_most_of_the_front() -> None:
    shares = []
    for seed in range(4):
        members = found(SPACE, 40, seed)
        assert len(set(members)) == len(members) == 40
        shares.append(area(members) / area(SPACE))
    assert min(shares) > 0.93, shares
    assert sum(shares) / 4 > 0.95, shares


def test_it_repeats_itself_and_seeds_differ() -> None:
    assert found(SPACE, 24) == found(SPACE, 24)
    assert found(SPACE, 24) != found(SPACE, 24, seed=1)


@pytest.mark.parametrize("space", [SPACE[:1], SPACE[:7], [Member(), Member(layers=1)], SPACE[::97]])
def test_small_spaces_are_evaluated_whole(space: list[Member], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "gain_of", lambda member: float(member.layers or 3))
    monkeypatch.setattr(sys.modules[__name__], "cost_of", lambda member: float(member.layers or 3))
    assert Counter(found(space, 99)) == Counter(space)


def test_members_without_a_finite_value_do_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "gain_of", lambda member: math.nan)
    assert len(found(SPACE, 20)) == 20


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'detr_exp\[optuna\]'.*pareto.search=null"):
        found(SPACE, 4)
