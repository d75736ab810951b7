"""Keys of commands that had another name in earlier versions: an override with the old name still sets them.

Only keys that no run stores: those of training keep their names, because run identities are computed from them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

RENAMED = {  # primary config -> old key -> key
    "benchmark": {"benchmark.picture": "benchmark.image"},
    "check_data": {"pictures": "images"},
    "export": {"export.pictures": "export.images"},
    "predict": {"pictures": "draw"},
}
# a URL with characters that mean something else in Hydra's grammar, as in https://host/file.pth#sha256=...
ADDRESS = re.compile(r"[\w.]+=(?:https?|rtsps?)://[^\s\"',]*[=#&~;!][^\s\"',]*")
PATH = re.compile(r"[+]{0,2}[\w.]+=((?![\[{\"'])[^\"$]*[/\\][^\"$]*[^\\])")
PLAIN = re.compile(r"[\w\s./\\:+%@?*-]*", re.ASCII)  # what Hydra's grammar takes as text
OVERRIDE = re.compile(r"([+~]{0,2})([\w.]+)(=.*|$)", re.DOTALL)


def renamed(config_name: str, overrides: Iterable[str]) -> list[str]:
    """Overrides in which old names of keys are replaced, with a warning for each, and URLs and paths are quoted.

    Paths are, if they exist and have characters that mean something else in Hydra's grammar.

    Args:
        config_name: primary config of the command.
        overrides: as on the command line, options of Hydra among them.
    """
    keys = RENAMED.get(config_name, {})
    current = []
    for override in overrides:
        parts = OVERRIDE.fullmatch(override)
        if parts and parts[2] in keys and (parts[1] or parts[3]):
            key = keys[parts[2]]
            logging.getLogger(__name__).warning("%s has been renamed; use %s=...", parts[2], key)
            override = f"{parts[1]}{key}{parts[3]}"
        if ADDRESS.fullmatch(override) or _is_special_path(override):
            key, _, address = override.partition("=")
            override = f'{key}="{address}"'
        current.append(override)
    return current


def _is_special_path(override: str) -> bool:
    found = PATH.fullmatch(override)
    if found is None or PLAIN.fullmatch(found[1]):
        return False
    try:
        return Path(found[1]).exists()
    except (OSError, ValueError):  # too long for a name
        return False
