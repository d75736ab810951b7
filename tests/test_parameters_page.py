"""What docs/parameters.md says: its words compose, its defaults are those of the configs, and a test shows each."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from detr_exp import build

TESTS = Path(__file__).resolve().parent
DOCS = TESTS.parent / "docs"
SHORT = {
    "P": "test_parameters.py",
    "T": "trainer/test_parameters.py",
    "S": "trainer/test_surroundings.py",
    "B": "trainer/test_batch_size.py",
}


def rows(page: str) -> list[list[str]]:
    lines = (DOCS / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


ROWS, TESTED = rows("parameters.md"), rows("tested_parameters.md")


def overrides(cell: str) -> list[list[str]]:
    """The words of each example in a cell."""
    return [words.split() for words in re.findall(r"`([^`]*=[^`]*)`", cell)]


def test_it_names_words_that_exist_and_their_defaults() -> None:
    composed = functools.cache(lambda *words: build.compose(words))
    loose: list[str] = []
    for _, here, default, *_ in ROWS:
        for number, words in enumerate(overrides(here)):
            groups = [word for word in words if "." not in word.partition("=")[0]]
            keys = [word.partition("=")[0] for word in words if word not in groups and not word.startswith("~")]
            if groups:
                composed(*words)
            else:
                loose += words
            if number == 0 and len(keys) == 1 and default.startswith("`") and not keys[0].startswith("hydra."):
                found = OmegaConf.select(composed(*groups), keys[0])
                assert found == yaml.safe_load(default.strip("`")), f"default of {keys[0]}"
    composed(*(word for word in loose if not word.startswith("hydra.")))


def test_it_names_tests_that_exist() -> None:
    seen = 0
    for _, where in TESTED:
        path = TESTS / SHORT["P"]
        for letter, file, name in re.findall(r"\b([PTSB]) (?=`)|`([\w/]+\.py)`|`(test_\w+)`", where):
            if name:
                assert f"def {name}(" in path.read_text(), f"{path} has no {name}"
                seen += 1
            else:
                path = TESTS / (file or SHORT[letter])
                assert path.is_file(), path
    assert seen > 100


def test_every_row_has_a_test() -> None:
    assert [row[0] for row in TESTED] == [row[0] for row in ROWS], "the same rows in the same order"
    named = [(row, where) for row, (_, where) in zip(ROWS, TESTED) if row[0] != "there" and "not here" not in row[1]]
    assert [row[0] for row, where in named if not re.search(r"`test_\w+`|`[\w/]+_parity\w*\.py`", where)] == []
