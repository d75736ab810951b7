"""What a word for weights on a network means: `hf:owner/name[@revision][/file]`, a URL, or a name of the table."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from detr_exp.published.table import UNKNOWN, Entry, table

HUB = "hf:"
PACKAGE = "pypi:"
WEB = ("https://", "http://")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
DIGITS = {"md5": 32, "sha256": 64}
_HUB_WORD = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@\s]+))?(/(?P<file>[^\s]+))?")
_REPO = re.compile(r"\w[\w.-]{0,94}/\w([\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A file that a network has.

    Attributes:
        key: what its hash is recorded under.
        title: what it is, in words.
        files: its name; of a repository several, of which the first that is there is meant.
        places: where in our cache, or in a folder of the user, it lies; downloads go to the first.
        url: where it is; `pypi:...`: in a Python package; empty: on the hub.
        repo: on the hub.
        revision: of the repository; None: its newest.
        hash: `md5:` or `sha256:` and hex digits; None: nobody has published one.
        size: in bytes; None: nobody has published it.
    """

    key: str
    title: str
    files: tuple[str, ...]
    places: tuple[str, ...]
    url: str = ""
    repo: str = ""
    revision: str | None = None
    hash: str | None = None
    size: int | None = None

    @property
    def address(self) -> str:
        """Where it comes from, for messages."""
        return self.url or f"{HUB}{self.repo}@{self.revision or 'main'}/{self.files[0]}"

    @property
    def package(self) -> tuple[str, str] | None:
        """Of a file that a Python package contains: the requirement, and the path below `site-packages`."""
        if not self.url.startswith(PACKAGE):
            return None
        requirement, _, path = self.url.removeprefix(PACKAGE).partition("/")
        return requirement, path


def is_remote(word: str) -> bool:
    """Whether this is written as an address on a network."""
    return word.startswith((HUB, *WEB))


def is_repo(name: str) -> bool:
    """Whether the hub takes this as `owner/name` of a repository."""
    return bool(_REPO.fullmatch(name)) and not re.search(r"--|\.\.|\.git$", name)


def of_word(word: str) -> Source:
    """What an address means.

    Raises:
        ValueError: it is none.
    """
    return _of_hub(word) if word.startswith(HUB) else _of_web(word)


def of_entry(entry: Entry) -> list[Source]:
    """Where the file of an entry may be had: at its authors' first, then on the hub."""
    size = None if entry.size == UNKNOWN else int(entry.size)
    found = []
    if entry.url:
        others = {other.file for other in table().values() if other is not entry}
        short = {f"{entry.name}{Path(entry.file).suffix}": 0, entry.file: 0}
        places = (f"{entry.name}/{entry.file}", *(place for place in short if place not in others))
        known = None if entry.hash == UNKNOWN else entry.hash
        found.append(Source(entry.name, entry.title, (entry.file,), places, entry.url, hash=known, size=size))
    if entry.hub:
        revision = None if entry.revision == UNKNOWN else entry.revision
        found.append(_on_hub(entry.hub, revision, (entry.hub_file,), entry.title, entry.name))
    return found


def _of_hub(word: str) -> Source:
    match = _HUB_WORD.fullmatch(word)
    if match is None or not is_repo(match["repo"]) or ".." in (match["file"] or "").split("/"):
        raise ValueError(
            f"{word} names no repository of the hub; write hf:owner/name, hf:owner/name@revision or "
            "hf:owner/name@revision/file"
        )
    return _on_hub(match["repo"], match["revision"], (match["file"],) if match["file"] else HUB_FILES, word)


def _on_hub(repo: str, revision: str | None, files: tuple[str, ...], title: str, name: str = "") -> Source:
    folder = repo.rpartition("/")[2] + (f"@{revision}" if revision else "")
    places = tuple(f"{place}/{file}" for place in (name, folder) if place for file in files)
    key = f"{HUB}{repo}@{revision or 'main'}/{files[0]}"
    return Source(key, title, files, places, repo=repo, revision=revision)


def _of_web(word: str) -> Source:
    url, _, fragment = word.partition("#")
    url = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # as browsers do with blanks and umlauts
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"{word} is no address ({error}); write https://host/path/file.pth") from None
    if not parts.hostname or parts.username is not None:
        problem = "has a name or password in it" if parts.hostname else "has no host"
        raise ValueError(f"{url} {problem}; give https://host/path/file.pth, or fetch the file and give its path")
    known = None
    if fragment:
        kind, _, digits = fragment.partition("=")
        if kind not in DIGITS or not re.fullmatch(f"[0-9a-fA-F]{{{DIGITS[kind]}}}", digits):
            raise ValueError(
                f"{word} ends in #{fragment}, which is no hash; write #sha256= and 64 hex digits, or #md5= and 32"
            )
        known = f"{kind}:{digits.lower()}"
    file = re.sub(r"[^\w.-]", "_", unquote(Path(parts.path).name)).lstrip(".") or "weights"
    folder = f"url/{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return Source(url, url, (file,), (f"{folder}/{file[-100:]}",), url, hash=known)
