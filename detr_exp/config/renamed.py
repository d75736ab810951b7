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
LIST = re.compile(r"([+]{0,2}[\w.]+)=\[([^\"$]*[/\\][^\"$]*)\]")
PLAIN = re.compile(r"[\w\s./\\:+%@?*-]*", re.ASCII)  # what Hydra's grammar takes as text
OVERRIDE = re.compile(r"([+~]{0,2})([\w.]+)(=.*|$)", re.DOTALL)


def renamed(config_name: str, overrides: Iterable[str]) -> list[str]:
    """Overrides in which old names of keys are replaced, with a warning for each, and URLs and paths are quoted.

    Paths are, also in lists, if they exist and have characters that mean something else in Hydra's grammar.

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
        elif (listed := LIST.fullmatch(override)) and (words := _listed_paths(listed[2])):
            override = f"{listed[1]}=[{','.join(words)}]"
        current.append(override)
    return current


def _is_special_path(override: str) -> bool:
    found = PATH.fullmatch(override)
    return found is not None and not PLAIN.fullmatch(found[1]) and _exists(found[1])


def _listed_paths(text: str) -> list[str]:
    """The elements of a list, special paths among them quoted; none where a special one is no path that exists.

    Names of runs have commas: of the places where an element may end, the last one counts that makes it a path.
    """
    parts, words, start = text.split(","), [], 0
    while start < len(parts):
        ends = range(len(parts), start, -1)
        end = next((end for end in ends if _exists(",".join(parts[start:end]).strip())), start + 1)
        word = ",".join(parts[start:end]).strip()
        if not PLAIN.fullmatch(word):
            if not _exists(word):
                return []
            word = f'"{word}"'
        words.append(word)
        start = end
    return words


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # too long for a name
        return False
