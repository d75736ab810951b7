"""Passwords and keys must not travel with configs into stores, checkpoints and pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MASK = "***"
_NAMES = r"(?:password|passwd|token|secret|api_?key|credential)"
_KEY = re.compile(_NAMES, re.IGNORECASE)
_URL = re.compile(r"(?<=://)[^/@\s]+@")
# `data.api_key=...` on a command line or in a sentence, `{token: ...}`; numbers are counts (`num_tokens=300`)
_SAID = re.compile(
    rf"""([\w./@-]*{_NAMES}[\w./@-]*(?:=|:\s))(?!\d+\b|null\b)("[^"]*"|'[^']*'|\[[^]]*\]|{{[^}}]*}}|[^\s,\]}}]+)""",
    re.IGNORECASE,
)


def masked(value: Any, key: str = "") -> Any:
    """A copy of nested dicts, lists and strings without secrets.

    Strings under a key that speaks of a password, token, secret, API key or credential become `***`, as does what
    stands after such a key and `=` in a text, and everything between `://` and `@`.
    """
    if isinstance(value, dict):
        return {name: masked(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item, key) for item in value]
    if isinstance(value, str):
        return MASK if value and _KEY.search(key) else _SAID.sub(rf"\1{MASK}", _URL.sub(f"{MASK}@", value))
    return value


def mask_files(folder: Path) -> None:
    """Take the secrets out of the YAML files of a folder."""
    for path in folder.glob("*.yaml"):
        text = path.read_text()
        if not (_KEY.search(text) or _URL.search(text)):  # which is most, and reading YAML takes long
            continue
        values = yaml.safe_load(text)
        if masked(values) != values:
            path.write_text(yaml.safe_dump(masked(values), sort_keys=False, allow_unicode=True))
