"""A file from a URL: into a part file that goes on where it was cut, checked, and renamed when it is whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

from detr_exp.published.places import BLOCK, digests

LIMIT = 8 << 30  # bytes; no detector of today has a tenth of it
SILENCE = 20.0  # seconds without a byte
TRIES = 4  # in a row that bring nothing
PAUSE = 0.5  # seconds before the second try, doubled before each further one
NAMES = 0.8  # seconds in which the name of a host is found where there is a network
CONNECT = 10.0  # seconds
PASSING = (408, 425, 429, 500, 502, 503, 504)
UNTRUSTED = "where a proxy puts a certificate of its own in place, name its file: SSL_CERT_FILE=FILE"

logger = logging.getLogger(__name__)


class DownloadError(ValueError):
    """A file could not be had; says why, and of no file."""


class UnreachableError(DownloadError):
    """There is no network, or the host is not there."""


class RefusedError(DownloadError):
    """What a server sends is not the file meant; nothing of it is kept."""


class _Cut(Exception):
    """A transfer ended before the file was whole, and may go on."""


class _Note(NamedTuple):
    """What is kept beside a part: which version of the file it is of."""

    url: str
    etag: str | None
    size: int | None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from an encrypted to an open connection."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        kinds = ("https",) if req.full_url.startswith("https:") else ("http", "https")
        if urlsplit(newurl).scheme not in kinds:
            raise DownloadError(f"{urlsplit(req.full_url).hostname} redirects to {newurl.partition(':')[0]}: addresses")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    target: Path,
    expected: Callable[[dict[str, str], int], None],
    *,
    check: Callable[[Path], None] | None = None,
    limit: int = LIMIT,
) -> dict[str, str]:
    """Fetch `url` to `target`, which is not there yet; nobody else may do so at the same time.

    Args:
        url: of http or https.
        target: in a folder that is there.
        expected: (digests, size) -> nothing, or a `DownloadError` where the file is not the one meant.
        check: raises a `DownloadError` for a file that is not whole or of another kind; None: `refuse_broken`.
        limit: most bytes.

    Returns:
        MD5 and SHA-256 of the file.

    Raises:
        DownloadError: it cannot be had, is too large, or is another one.
    """
    part = target.with_name(f"{target.name}.part")
    while True:
        was_begun = part.exists()
        try:
            _transfer(url, part, limit)
        except RefusedError:
            _drop(part)
            raise
        try:
            (check or refuse_broken)(part)
            found = digests(part)
            expected(found, part.stat().st_size)
        except DownloadError:
            _drop(part)
            if was_begun:  # what an earlier call has left may be of another version
                continue
            raise
        os.replace(part, target)
        _drop(part)
        return found


def refuse_unreachable(url: str) -> None:
    """Find out within a second that there is no network, which clients try for minutes.

    Raises:
        UnreachableError: the host, or the proxy before it, has no name or does not take connections.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        through = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port = through.hostname or "", through.port or 80
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(NAMES)
    if not answers or isinstance(answers[0], Exception):
        why = answers[0] if answers else f"nobody knew its name within {NAMES} s"
        raise UnreachableError(f"no network: {host} is not known ({why})")
    try:
        socket.create_connection((host, port), CONNECT).close()
    except OSError as error:
        raise UnreachableError(f"{host}:{port} takes no connection ({error})") from None


def _transfer(url: str, part: Path, limit: int) -> None:
    """Fill `part` until it is whole, however often that is cut."""
    failed = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _go_on(url, part, limit)
            return
        except _Cut as cut:
            now = part.stat().st_size if part.exists() else 0
            failed = 0 if now > before else failed + 1
            if failed >= TRIES:
                kept = f"; {now} bytes of it are kept, and the same command goes on there" if now else ""
                raise DownloadError(f"{cut}, {TRIES} times in a row{kept}") from None
            logger.info("%s: %s; trying again", url, cut)
            time.sleep(PAUSE * 2 ** max(0, failed - 1))


def _go_on(url: str, part: Path, limit: int) -> None:
    """One request for what `part` lacks.

    Raises:
        _Cut: it brought less.
        DownloadError: it will never bring it.
    """
    note = _read_note(part)
    have = part.stat().st_size if part.exists() and note.url == url else 0
    if have and have == note.size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "detr_exp", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if note.etag:
            request.add_header("If-Range", note.etag)
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=SILENCE) as answer:
            _receive(answer, url, part, have, note, limit)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            _drop(part)
            raise _Cut("the server has no such part of it") from None
        if error.code in PASSING:
            raise _Cut(f"the server answers {error.code} ({error.reason})") from None
        told = {401: "it needs a login", 403: "it is not for everybody", 404: "it is not there", 410: "it is gone"}
        raise DownloadError(f"the server answers {error.code} ({told.get(error.code, error.reason)})") from None
    except (HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"the certificate of {urlsplit(url).hostname} is not trusted ({reason.verify_message}); {UNTRUSTED}"
            ) from None
        raise _Cut(f"the connection broke ({reason or type(error).__name__})") from None


def _receive(answer: HTTPResponse, url: str, part: Path, have: int, note: _Note, limit: int) -> None:
    """Append what a server sends, or begin anew where it sends the whole."""
    length = answer.headers.get("Content-Length")
    size = int(length) if length and length.isdigit() else None
    if answer.status == 206:
        begin, _, total = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
        size = int(total) if total.isdigit() else None
        if not begin.startswith(f"{have}-") or (note.size is not None and size != note.size):
            _drop(part)
            raise _Cut("the server sent another part than was asked for")
    else:
        have = 0
    _refuse_too_large(size, have, part, limit)
    etag = answer.headers.get("ETag")
    with _own_disk(part):
        if not have:
            part.unlink(missing_ok=True)
        note = _Note(url, None if (etag or "W/").startswith("W/") else etag, size)
        Path(f"{part}.json").write_text(json.dumps(note), encoding="utf-8")
        file = open(part, "ab")  # noqa: SIM115 - what goes wrong from here on is the server's
    received = have
    with file, _bar(part.name.removesuffix(".part"), have, size) as advance:
        while block := answer.read1(BLOCK):  # what is there, so that a cut loses none of it
            received += len(block)
            if received == len(block) and block.lstrip()[:1] == b"<":
                raise RefusedError("the server sent a page of the web in place of the file")
            if received > limit:
                raise RefusedError(f"it is larger than {limit / 2**30:g} GiB, the most that is fetched")
            with _own_disk(part):
                file.write(block)
            advance(len(block))
        with _own_disk(part):
            file.flush()
            os.fsync(file.fileno())
    if size is not None and received < size:
        raise _Cut(f"the connection ended after {received} of {size} bytes")


def _refuse_too_large(size: int | None, have: int, part: Path, limit: int) -> None:
    if size is None:
        return
    if size > limit:
        raise DownloadError(f"it has {size} bytes, and at most {limit / 2**30:g} GiB are fetched")
    if size - have > (free := shutil.disk_usage(part.parent).free):
        raise DownloadError(f"it needs {size - have} bytes, and {part.parent} has {free} left; free space")


@contextmanager
def _own_disk(part: Path) -> Iterator[None]:
    """Tell what this machine cannot write from what a server does not send."""
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{part.parent} cannot be written to ({error.strerror}); free space") from error


def refuse_broken(path: Path) -> None:
    """Refuse a file that is truncated, or not one of tensors; only its first and last bytes are read.

    Raises:
        DownloadError: says so.
    """
    with open(path, "rb") as file:
        head = file.read(256)
        whole = head[:1] == b"\x80"
        if head.startswith(b"PK"):
            whole = zipfile.is_zipfile(file)
        elif head[8:9] == b"{":
            whole = _is_whole_safetensors(file)
    if not whole:
        raise DownloadError(f"it is no whole file of tensors (it begins with {head[:12]!r})")


def _is_whole_safetensors(file: IO[bytes]) -> bool:
    """Whether all bytes are there that the header, JSON after its length, names."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > end - 8:
        return False
    try:
        tensors = [entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"]
        return end == 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def _read_note(part: Path) -> _Note:
    try:
        return _Note(*json.loads(Path(f"{part}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return _Note("", None, None)


def _drop(part: Path) -> None:
    for path in (part, Path(f"{part}.json")):
        with suppress(OSError):
            path.unlink()


@contextmanager
def _bar(name: str, have: int, size: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left where somebody looks on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=size, completed=have)
        yield lambda count: progress.advance(task, count)
