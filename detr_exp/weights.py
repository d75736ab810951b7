"""Published weights: `python -m detr_exp.weights list|fetch|verify|path`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from detr_exp import cli
from detr_exp.config.compose import composition, config_loader
from detr_exp.published import places
from detr_exp.published.fetch import checked, fetch, local
from detr_exp.published.source import Source, is_remote, of_entry, of_word
from detr_exp.published.table import UNKNOWN, named, nearest, table
from detr_exp.terminal import say

USAGE = """\
Published weights: what there is, and the files on this machine.

  python -m detr_exp.weights list [WORD ...]          all, or those with these words: coco, r50vd, Apache-2.0
  python -m detr_exp.weights fetch NAME ...           download and verify; a name, hf:owner/name or a URL
  python -m detr_exp.weights fetch experiment=NAME    what a recipe starts from; --all: every file of the table
  python -m detr_exp.weights verify                   the hashes of all files on this machine
  python -m detr_exp.weights path NAME ...            where they lie; nothing is downloaded

  --json    as JSON, one list

Files are looked for in the folders of DETR_EXP_WEIGHTS, in $XDG_CACHE_HOME/detr_exp/weights, and in the caches of the
Hugging Face hub and of torch. DETR_EXP_OFFLINE=1 keeps from the network. The exit status is 2 if a file is not there or
is another one.
"""
SHOWN = ("name", "data", "published", "licence", "here", "state", "sha256", "path")  # without --json


Row = dict[str, str]


def weights(words: Sequence[str]) -> None:
    """Do what a command line says.

    Raises:
        ValueError: it cannot be read, or a file is absent or another one.
    """
    options = [word for word in words if word.startswith("-")]
    if unknown := [word for word in options if word not in ("--json", "--all")]:
        raise ValueError(f"{unknown[0]} is no option; there are --json and --all")
    command, *rest = [word for word in words if word not in options] or [""]
    commands = {"list": listed, "fetch": fetched, "verify": verified, "path": paths}
    if command not in commands:
        what = f"{command} is no command" if command else "no command is given"
        raise ValueError(f"{what}; use one of {', '.join(commands)}: python -m detr_exp.weights list")
    if "--all" in options:
        if command != "fetch":
            raise ValueError(f"--all belongs to fetch; leave it out: python -m detr_exp.weights {command}")
        rest = [*rest, "--all"]
    rows, problems = commands[command](rest)
    if rows or "--json" in options:
        say(json.dumps(rows, indent=1) if "--json" in options else _drawn(rows))
    if problems:
        raise ValueError("; ".join(problems))


def listed(words: Sequence[str]) -> tuple[list[Row], list[str]]:
    """A row for every entry that contains all of the words."""
    rows = []
    for entry in table().values():
        here = next((str(path) for source in of_entry(entry) for path, _ in places.candidates(source)), "")
        row = asdict(entry) | {"network": entry.network, "here": here}
        if all(word.lower() in " ".join(row.values()).lower() for word in words):
            rows.append(row)
    if not rows:
        raise ValueError(f"no line has {' '.join(words)}; python -m detr_exp.weights list shows all")
    return rows, []


def fetched(words: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Have the files of names, addresses and configs on this machine."""
    overrides = [word for word in words if "=" in word and not is_remote(word)]
    wanted = [word for word in words if word not in overrides and word != "--all"]
    if overrides:
        wanted += needed(overrides, everything="--all" in words)
    elif "--all" in words:
        wanted += table()
    elif not wanted:
        raise ValueError("fetch what? give names or addresses, experiment=NAME, or --all")
    rows, problems = [], []
    for word in dict.fromkeys(wanted):
        try:
            found = fetch(word)
        except ValueError as error:
            problems.append(str(error))
            continue
        if found is None:
            problems.append(_unknown(word))
        else:
            rows.append({"name": word, "licence": _licence(word), "sha256": found.sha256, "path": str(found.path)})
    return rows, problems


def needed(overrides: Sequence[str], everything: bool) -> list[str]:
    """What a training with these overrides starts from.

    Args:
        overrides: as of a training.
        everything: also the published result, and weights of the backbone that this training does not need.
    """
    composed = composition(config_loader(), "config", overrides)
    model, option = composed.cfg.model, composed.choices.get("model/backbone") or ""
    found = [] if model.weights is None or Path(model.weights).exists() else [model.weights]
    if everything:
        experiment = composed.choices.get("experiment")
        found += [entry.name for entry in table().values() if experiment in entry.recipes.split()]
    pretrained = model.backbone.get("pretrained")
    if isinstance(pretrained, str) and not Path(pretrained).exists():
        found.append(pretrained)
    elif (pretrained is True and model.weights is None) or everything:
        backbones = [entry for entry in table().values() if entry.kind == "backbone"]
        found += [entry.name for entry in backbones if option.startswith(entry.backbone)]
        if model.backbone._target_.endswith(".TimmBackbone"):
            from detr_exp.model.backbone.timm_backbone import published

            found.append(published(model.backbone.name))
    if not found:
        raise ValueError(f"a training with {' '.join(overrides)} starts from random weights; name what to fetch")
    return found


def verified(words: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Compare every file of the table that is on this machine, or those of some names, with its hash."""
    rows, problems = [], []
    for name in words or table():
        for source in _sources(name):
            for path, _ in places.candidates(source):
                problem, sha256 = checked(source, path)
                problems += [problem] if problem else []
                state = "another file" if problem else "as published" if source.hash else "as at first use"
                rows.append({"name": name, "state": state, "sha256": sha256, "path": str(path)})
    return rows, problems


def paths(words: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Where files lie."""
    if not words:
        raise ValueError("the path of what? give names or addresses: python -m detr_exp.weights path NAME")
    rows, problems = [], []
    for word in words:
        sources = _sources(word)
        if (found := local(sources)) is None:
            problems.append(f"{word} is not on this machine; fetch it: python -m detr_exp.weights fetch {word}")
        else:
            rows.append({"path": str(found[0])})
    return rows, problems


def _sources(word: str) -> list[Source]:
    if is_remote(word):
        return [of_word(word)]
    if (entry := named(word)) is None:
        raise ValueError(_unknown(word))
    return of_entry(entry)


def _unknown(word: str) -> str:
    near = nearest(word)
    meant = f"did you mean {', '.join(near)}? " if near else ""
    return f"{word} is no name of published weights; {meant}python -m detr_exp.weights list shows all"


def _licence(word: str) -> str:
    entry = named(word)
    return UNKNOWN if entry is None else entry.licence


def _drawn(rows: Sequence[Row]) -> str:
    """Rows as columns; of a list only what fits on a screen."""
    columns = [name for name in rows[0] if name in SHOWN] if rows else []
    lines = [[name.upper() for name in columns], *([row[name] for name in columns] for row in rows)]
    if len(columns) == 1:
        lines = lines[1:]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main() -> None:
    cli.of_words(weights, USAGE)


if __name__ == "__main__":
    main()
