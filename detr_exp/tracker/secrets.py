"""Passwords and keys must not travel with configs into stores, checkpoints and pages."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
_KEY = re.compile(r"password|passwd|token|secret|api_?key|credential", re.IGNORECASE)
_URL = re.compile(r"(?<=://)[^/@\s]+@")


def masked(value: Any, key: str = "") -> Any:
    """A copy of nested dicts, lists and strings without secrets.

    Strings under a key that speaks of a password, token, secret, API key or credential become `***`, as does
    everything between `://` and `@`.
    """
    if isinstance(value, dict):
        return {name: masked(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item, key) for item in value]
    if isinstance(value, str):
        return MASK if value and _KEY.search(key) else _URL.sub(f"{MASK}@", value)
    return value


def masked_word(word: str) -> str:
    """A `key=value` of a command line without its secret; `{...}` and `[...]` that name one are masked whole."""
    key, equals, value = word.partition("=")
    if value[:1] in ("{", "[") and _KEY.search(value):
        value = MASK
    return key + equals + masked(value, key)
