"""What docs/tracking.md says: its words and commands compose, and its pictures are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from detr_exp.config.compose import compose
from detr_exp.explain import explain

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "tracking.md").read_text()
COMMANDS = re.findall(r"python -m detr_exp\.(\w+) ([^#\n]*)", PAGE)


def test_commands_compose() -> None:
    assert {name for name, _ in COMMANDS} == {"sync", "report", "compare", "reproduce", "explain", "train"}
    for name, line in COMMANDS:
        words = shlex.split(re.sub("[<>]", "", line))
        if name != "explain":
            compose(words, config_name="config" if name == "train" else name)
        elif "run=" not in line:
            assert explain(words)


def test_words_of_the_table_compose() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) >= 7
    for words in re.findall(r"`([^`]*)`", " ".join(rows)):
        compose(shlex.split(words))


def test_images_are_there_and_small() -> None:
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)
    assert len(images) == 2
    assert all((DOCS / image).stat().st_size < 300_000 for image in images)
