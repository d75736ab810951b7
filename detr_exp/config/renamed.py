"""Keys of commands that had another name in earlier versions: an override with the old name still sets them.

Only keys that no run stores: those of training keep their names, because run identities are computed from them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

RENAMED = {  # primary config -> old key -> key
    "benchmark": {"benchmark.picture": "benchmark.image"},
    "check_data": {"pictures": "images"},
    "export": {"export.pictures": "export.images"},
    "predict": {"pictures": "draw"},
}
# a URL with characters that mean something else in Hydra's grammar, as in https://host/file.pth#sha256=...
ADDRESS = re.compile(r"[\w.]+=https?://[^\s\"',]*[=#&~;!][^\s\"',]*")
OVERRIDE = re.compile(r"([+~]{0,2})([\w.]+)(=.*|$)", re.DOTALL)


def renamed(config_name: str, overrides: Iterable[str]) -> list[str]:
    """Overrides in which old names of keys are replaced, with a warning for each, and URLs are quoted.

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
        if ADDRESS.fullmatch(override):
            key, _, address = override.partition("=")
            override = f'{key}="{address}"'
        current.append(override)
    return current
