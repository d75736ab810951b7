"""Masks passwords and keys, so that they do not get into stores, checkpoints, logs, pages and terminals.

A secret is detected by its key (`password`, `api-key`, `AWS_SECRET_ACCESS_KEY`), by its position in a URL, a header or
a query, by the formats of known services, or by being the value of an environment variable with such a name. Every
function uses time linear in the length of the text.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Any

MASK = "***"
SHORTEST = 8  # characters of a secret in an environment variable; shorter values are often ordinary words
LONGEST = 80  # characters of a key in a text, so that the search stays linear
# compact keys: lower case, letters only
_PASSWORD = re.compile(r"passw|passphrase|passcode|pwd|credential|secret|apikey|cookie|authorization|bearer")
_OF_KEYS = re.compile(
    r"(?:access|private|account|shared|encryption|signing|auth|ssh|license|subscription|client|master|wandb|storage)key"
)
# networks have tokens, too: `tokenizer`, `token_dim`, `num_tokens`
_TOKEN = re.compile(
    r"token(?!s?(?:iz|is|type|dim|size|len|num|mix|merg|prun|emb|count|drop|pool|limit|per|shape|norm))"
)
_OF_COUNTS = re.compile(r"^(?:num|n|max|min|cls|class|mask|register)_")
_DOTTED = re.compile(r"(?:api|access|private|account|secret|auth|wandb)\.key$", re.IGNORECASE)  # `logger.wandb.key`
_WORDS = {"pass", "pw", "auth", "sas", "sig", "signature", "pat", "jwt", "psk"}
_SEPARATOR = re.compile(r"[=:]\s{0,3}(?=\S)")
_KEY_BACKWARDS = re.compile(r"""\s?[\]"'\\]{0,3}(?P<key>[\w.\-/@]+)(?P<before>[\s_-][\w.\-]+)?""")
_SCHEME = re.compile(r"(?:Bearer|Basic|Token|Digest|AWS4-HMAC-SHA256)\s+", re.IGNORECASE)
# what follows a comma, an ampersand or a semicolon belongs to the value unless it has a key of its own
_BARE = re.compile(r"""[^\s,;&\]}"']+(?:[,;&](?!\s?[\w.\-/@+~"'\\]{1,80}[=:])[^\s,;&\]}"']+)*""")
_SHAPES = re.compile(
    r"\b(?:gh[pousr]_\w{20,255}|github_pat_\w{20,255}|glpat-[\w-]{20,255}|hf_[A-Za-z0-9]{20,255}|sk-[\w-]{20,255}"
    r"|xox[abprs]-[\w-]{10,255}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,2000}\.[\w-]{10,4000}\.[\w-]{0,2000})"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]{0,20000}"
)
_PORT = re.compile(r"\d{1,5}(?![^\s/?#,;)\]}\"'])")
_USER = re.compile(r"[^\s:/?#@\[\]]*:")
_AUTHORITY = re.compile(r"[^\s/?#]*@")
_DATABASE = re.compile(r"(?:postgres(?:ql)?|mysql|mariadb|mssql|oracle)(?:\+\w+)?$")  # a user alone is not a token
_LINE = re.compile(r"[^\n\"']*")
_NOT_SECRET = ("null", "None", "true", "false", MASK)


def masked(value: Any, key: str = "") -> Any:
    """A copy of nested dicts, lists and strings without secrets.

    Values of a key that names a secret become `***`, and so does the text after such a key in a string (a command line,
    JSON, a header, a query) and the text before the `@` of a URL. None, true, false and counts are unchanged.

    Args:
        value: of any type.
        key: dotted key of the value.
    """
    if isinstance(value, dict):
        return {name: masked(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item, key) for item in value]
    if isinstance(value, bool) or value is None or value == "":
        return value
    if isinstance(value, str):
        return MASK if names_secret(key) else _text(value)
    return MASK if names_secret(key) and isinstance(value, int | float) and not _counts(key) else value


@functools.lru_cache(maxsize=4096)
def names_secret(key: str) -> bool:
    """Whether a key, dotted or not and in any spelling (`apiKey`, `API-KEY`, `db_password`), holds a secret."""
    if _DOTTED.search(key):
        return True
    for part in re.split(r"[./\[\]@]", key):
        words = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", part).lower()
        compact = re.sub(r"[^a-z]", "", words)
        if _PASSWORD.search(compact) or _OF_KEYS.search(compact) or _WORDS & set(re.split(r"[^a-z]+", words)):
            return True
        if _TOKEN.search(compact) and not _OF_COUNTS.search(re.sub(r"[^a-z]+", "_", words)):
            return True
    return False


def _counts(key: str) -> bool:
    """Whether a number with this key is a count and not a secret (`token: 3`)."""
    compact = re.sub(r"[^a-z]", "", key.lower())
    return not _PASSWORD.search(compact) and "token" in compact


def _text(text: str) -> str:
    text = "".join(_address(line) for line in text.splitlines(keepends=True)) if "://" in text else text
    if "=" in text or ":" in text:
        text = "".join(_masked_parts(text))
    for secret in _of_environment():
        if secret in text:
            text = text.replace(secret, MASK)
    return _SHAPES.sub(MASK, text)


def _masked_parts(text: str) -> Iterator[str]:
    """The parts of a text, with `***` in place of values after a key that names a secret."""
    done = 0
    for separator in _SEPARATOR.finditer(text):
        key = _key_before(text, separator.start())
        start = separator.end()
        if separator.start() < done or not names_secret(key):
            continue
        # an override that is the whole text may contain spaces and any other characters
        is_word = text[separator.start()] == "=" and len(key) >= separator.start() - 2 and text[start] not in "\"'[{"
        if is_word:
            end = len(text)
        elif key.lower().endswith("cookie") and text[start] not in "\"'":
            end = _LINE.match(text, start).end()  # type: ignore[union-attr]
        else:
            end = _end_of_value(text, start)
        value = text[start:end].strip("\"'\\ ")
        if not value or value in _NOT_SECRET or value.startswith("//") or (value.isdigit() and _counts(key)):
            continue
        yield text[done:start]
        yield MASK
        done = end
    yield text[done:]


def _key_before(text: str, position: int) -> str:
    """The key in front of `=` or `:`, without quotes; of two words where the second is "key" (`API key: ...`)."""
    found = _KEY_BACKWARDS.match(text[max(0, position - LONGEST) : position][::-1])
    if found is None:
        return ""
    key, before = found["key"][::-1], found["before"]
    return f"{before[::-1].strip()}_{key}" if before and key.lower() in ("key", "keys") else key


def _end_of_value(text: str, start: int) -> int:
    """End of the value that begins at `start`."""
    scheme = _SCHEME.match(text, start)
    if scheme is not None:
        start = scheme.end()
    if text[start : start + 1] in ("[", "{"):
        return _end_of_brackets(text, start)
    quote = re.compile(r"""(\\*)(["'])""").match(text, start)
    if quote is not None:
        closed = re.compile(rf"(?<!\\){re.escape(quote[1])}{quote[2]}").search(text, quote.end())
        return len(text) if closed is None else closed.end()
    bare = _BARE.match(text, start)
    return start if bare is None else bare.end()


def _end_of_brackets(text: str, start: int) -> int:
    depth = 0
    for found in re.compile(r"[\[\]{}]").finditer(text, start):
        depth += 1 if found[0] in "[{" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _address(line: str) -> str:
    """A line with `***` between `://` and `@`; a password may contain `/ @ : # %` and spaces."""
    first, *rest = line.split("://")
    shown, held = [first], ""
    for number, part in enumerate(rest):
        part = held + part
        user = _USER.match(part)
        is_port = user is not None and _PORT.match(part, user.end()) is not None
        cut = -1
        if user is not None and not is_port:
            cut = part.rfind("@")
            if cut < 0 and number + 1 < len(rest) and "@" in rest[number + 1]:
                held = f"{part}://"  # the password contains `://`
                continue
        elif is_port:
            cut = re.match(r"\S*", part)[0].rfind("@")  # type: ignore[index]
        elif (authority := _AUTHORITY.match(part)) and not _DATABASE.search(shown[-1]):
            cut = authority.end() - 1
        shown.append(part if cut < 0 else MASK + part[cut:])
        held = ""
    return "://".join(shown)


def _of_environment() -> list[str]:
    """Values of environment variables whose names denote secrets, the longest first."""
    named = {value for name, value in os.environ.items() if len(value) >= SHORTEST and names_secret(name)}
    found = (value for value in named if not value.isalpha() and not os.path.exists(value))
    return sorted(found, key=len, reverse=True)
