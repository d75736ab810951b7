"""Names of the folders of a sweep's runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detr_exp.runs.swept import LONGEST, alone, folder_of, hash_in, readable

HASH = "0a1b2c3d4e"


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        (["loss=focal", "loss.focal_gamma=1.5"], "loss=focal,focal_gamma=1.5"),
        (["loss.focal_gamma=1.5", "loss=focal"], "loss=focal,focal_gamma=1.5"),
        (["model/backbone=r50vd", "+extra.a=[1,2]"], "a=_1_2_,model_backbone=r50vd"),
        (["optim.lr=1e-4", "model.lr=2"], "model.lr=2,optim.lr=1e-4"),
        (["data.root=/home/me/../x y"], "root=_home_me_.._x_y"),
        (["data.token=geheim"], "token=_"),
    ],
)
def test_names_can_be_read(swept: list[str], name: str, tmp_path: Path) -> None:
    assert folder_of(tmp_path, HASH, swept).name == f"{name}-{HASH}"


@given(st.lists(st.tuples(st.text("abc./_", min_size=1), st.text()), max_size=6))
def test_names_are_safe_on_every_disk(pairs: list[tuple[str, str]]) -> None:
    name = folder_of(Path("s"), HASH, [f"{key}={value}" for key, value in pairs]).name
    assert re.fullmatch(r"[A-Za-z0-9_.+=,-]+", name)
    assert len(name) <= LONGEST + 1 + len(HASH)
    assert not name.startswith((".", "-"))
    assert hash_in(name) == HASH
    assert name == folder_of(Path("s"), HASH, [f"{key}={value}" for key, value in reversed(pairs)]).name


def test_a_folder_of_an_earlier_version_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / HASH).mkdir()
    assert folder_of(tmp_path, HASH, ["loss=focal"]) == tmp_path / HASH


def test_without_swept_overrides_the_hash_is_the_name(tmp_path: Path) -> None:
    assert (readable([]), folder_of(tmp_path, HASH, [])) == ("", tmp_path / HASH)


def test_a_run_of_a_sweep_is_repeated_alone() -> None:
    assert alone(["seed=2", "sweep=seeds"]) == ["seed=2", "sweep=seeds", "hydra.mode=RUN"]
    assert alone(["seed=2", "loss=focal"]) == ["seed=2", "loss=focal"]
