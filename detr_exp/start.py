"""What a network starts from: the file that `model.weights` means.

An existing path comes first, then a run, then a name of the table of published weights, then an address.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from omegaconf import DictConfig, OmegaConf
from torch import nn

from detr_exp.config.mistakes import ConfigError
from detr_exp.config.published import PUBLISHED
from detr_exp.model.adapter.slim import undetermined_by
from detr_exp.model.pretrained import load_weights, weights_file
from detr_exp.protocols import Adapter, Network
from detr_exp.published.fetch import Found, fetch
from detr_exp.published.places import digests
from detr_exp.published.table import named, nearest
from detr_exp.runs import past

FILE = "file://"
_ID = re.compile("[0-9a-f]{6,32}")


def find(word: str | None, runs: str = "outputs") -> Found | None:
    """The file that `model.weights` means, downloaded if it is not on this machine; None: it is null.

    Args:
        word: a path or `file://` URL, a run's folder or id, a name, `hf:...`, or a URL.
        runs: the folder in which ids are looked for.

    Raises:
        ValueError: it means nothing or several things, or its file cannot be had.
    """
    if word is None:
        return None
    word = str(word)
    if word.strip() in ("", FILE):  # as a path it would be the current folder
        raise ConfigError("model.weights is empty; give a file, a run or a name, or start without: model.weights=null")
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
        scheme, colon, _ = word.partition(":")
        if colon and scheme.isalnum() and not word.startswith(FILE):
            meant += f"{scheme}: is not read: an address begins with hf:, https://, http:// or file://; "
        raise ValueError(
            f"model.weights={word} is not a file, a run, or the name of published weights; {meant}"
            "python -m detr_exp.weights list shows the names; or start without: model.weights=null"
        )
    return found


def record(word: str | None, network: Network | None) -> dict[str, str] | None:
    """What a run and its checkpoints keep of the weights that training begins with; None: they are random.

    Args:
        word: see `find`.
        network: as training begins with it; None: with a random backbone.

    Returns:
        `weights`, the word, or `backbone`, the word for the weights of the backbone alone; and `sha256`.
    """
    found, kind = find(word), "weights"
    if found is None and network is not None:
        files = (getattr(module, "initial", None) for module in network.modules())
        found, kind = next((file for file in files if isinstance(file, Found)), None), "backbone"
    return None if found is None else {kind: found.word, "sha256": found.sha256}


def tags(recorded: dict[str, str] | None) -> dict[str, str]:
    """The tags of a run for a result of `record`."""
    if recorded is None:
        return {}
    kind = "weights" if "weights" in recorded else "backbone"
    return {kind: recorded[kind], f"{kind}.sha256": recorded["sha256"]}


def load(network: Network, found: Found, classes: list[str] | None = None) -> str:
    """Load weights into a network.

    Args:
        network: to fill.
        found: the file.
        classes: names of the network's classes, in the order of its logits.

    Returns:
        how much of the network is from the file, in words.

    Raises:
        ValueError: they do not fit; says of known ones which network they are for.
    """
    try:
        return load_weights(network, found.path, classes)
    except ValueError as error:
        if not found.network:
            raise
        raise ValueError(f"{error}; {found.word} is for {found.network}") from error


def load_adapted(
    network: Network, found: Found, classes: list[str] | None, adapter: Adapter, anew: Collection[str] | None
) -> str:
    """As `load`, and add an adapter.

    Args:
        network: see `load`.
        found: see `load`.
        classes: see `load`.
        adapter: to add.
        anew: names of parameters that are trained in full beside it; None: those that the file does not determine.
    """
    module = cast("nn.Module", network)
    missing, share = undetermined_by(lambda: load(network, found, classes), module)
    adapter.adapt(module, missing if anew is None else anew)
    return share


def for_weights(cfg: DictConfig) -> DictConfig:
    """The config of a network that is about to get weights: those of its backbone alone are not looked for."""
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_readonly(cfg, False)
    if OmegaConf.select(cfg, "model.backbone.pretrained"):
        cfg.model.backbone.pretrained = False
    return cfg


def of_one_size(cfg: DictConfig) -> tuple[DictConfig, tuple[tuple[int, int], ...]]:
    """The config of a network for the first of several image sizes, and all of them; none where it has one."""
    given = OmegaConf.select(cfg, "model.image_size")
    if not OmegaConf.is_list(given) or not any(map(OmegaConf.is_list, given)):
        return cfg, ()
    sizes = tuple(dict.fromkeys((height, width) for height, width in given))
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_readonly(cfg, False)
    cfg.model.image_size = list(sizes[0])
    return cfg, sizes if len(sizes) > 1 else ()


def for_checkpoint(cfg: DictConfig) -> DictConfig:
    """The config of a network that is about to get all weights of a checkpoint: no others are looked for."""
    cfg = for_weights(cfg)
    cfg.model.weights = None
    return cfg


def _at(word: str, path: Path) -> Found:
    file = weights_file(path)
    return Found(word, file, digests(file)["sha256"], str(path))


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
