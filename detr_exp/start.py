"""What a network starts from: the file that `model.weights` means.

An existing path comes first, then a run, then a name of the table of published weights, then an address.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from omegaconf import DictConfig, open_dict

from detr_exp.config.mistakes import ConfigError
from detr_exp.model.pretrained import weights_file
from detr_exp.published.fetch import Found, fetch
from detr_exp.published.table import named, nearest, of_choices
from detr_exp.runs import past
from detr_exp.tensor_files import sha256_of

PUBLISHED = "published"
FILE = "file://"
_ID = re.compile("[0-9a-f]{6,32}")


def settle(cfg: DictConfig, choices: Mapping[str, str | None]) -> None:
    """Put the name in the place of `model.weights=published`, which depends on the chosen options.

    Raises:
        ValueError: nothing is published for them, or several files are.
    """
    if cfg.model.get("weights") == PUBLISHED and not Path(PUBLISHED).exists():
        with open_dict(cfg):
            cfg.model.weights = of_choices(choices).name


def find(word: str, runs: str = "outputs") -> Found:
    """The file that `model.weights` means, downloaded if it is not on this machine.

    Args:
        word: a path or `file://` URL, a run's folder or id, a name, `hf:...`, or a URL.
        runs: the folder in which ids are looked for.

    Raises:
        ValueError: it means nothing or several things, or its file cannot be had.
    """
    word = str(word)
    path = Path(unquote(word.removeprefix(FILE)) if word.startswith(FILE) else word).expanduser()
    if path.exists():
        return _at(word, path)
    run = _run(word, runs)
    if run is not None and named(word) is not None:
        raise ValueError(f"model.weights={word} is a run and published weights; give the path of the run: {run}")
    if run is not None:
        return _at(word, run)
    found = fetch(word, "detector")
    if found is None:
        if word == PUBLISHED:
            raise ConfigError("model.weights=published needs a chosen network; say a name: detr_exp.weights list")
        near = nearest(path.stem if path.suffix in (".pth", ".pt", ".safetensors") else path.name, "detector")
        meant = f"did you mean {' or '.join(f'model.weights={name}' for name in near)}? " if near else ""
        raise ValueError(
            f"model.weights={word} is not a file, a run, or the name of published weights; {meant}"
            "python -m detr_exp.weights list shows the names; or start without: model.weights=null"
        )
    return found


def _at(word: str, path: Path) -> Found:
    file = weights_file(path)
    return Found(word, file, sha256_of(file), str(path))


def _run(word: str, root: str) -> Path | None:
    """The run with this id; None: there is none."""
    if not _ID.fullmatch(word) or not Path(root).is_dir():
        return None
    try:
        folders = past.find(word, root)
    except ValueError:
        return None
    if len(folders) > 1:
        raise ValueError(f"model.weights={word} means {len(folders)} runs; give the folder of one: {folders[0]}")
    return folders[0]
