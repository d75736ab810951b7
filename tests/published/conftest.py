"""A server on this machine that plays release page, bucket and hub, and does what a test has planned."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import file_download as client

from detr_exp.published import download, table


@dataclass
class Host:
    """The server.

    Attributes:
        url: its address.
        files: path -> content.
        plan: what to do with the next requests, in order; then everything goes well.
        asked: method, path and headers of every request.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    etags: bool = True

    def transfers(self) -> int:
        return sum(method == "GET" for method, _, _ in self.asked)


def handler(host: Host) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(is_head=True)

        def do_GET(self) -> None:
            self.answer(is_head=False)

        def answer(self, is_head: bool) -> None:
            host.asked.append((self.command, self.path, dict(self.headers)))
            deed = host.plan.pop(0) if host.plan else "whole"
            path = self.path.partition("?")[0]
            if deed.isdigit():
                self.send_error(int(deed))
            elif deed == "silent":
                time.sleep(1.0)
            elif deed.startswith("to "):
                self.send_response(302)
                self.send_header("Location", deed[3:])
                if path in host.files:  # the hub says of large files what they are before it sends the client elsewhere
                    self.send_header("X-Linked-ETag", f'"{hashlib.sha256(host.files[path]).hexdigest()}"')
                    self.send_header("X-Linked-Size", str(len(host.files[path])))
                    self.send_header("X-Repo-Commit", "c" * 40)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif path not in host.files:
                repo = path.partition("/resolve/")[0]
                is_there = any(file.startswith(f"{repo}/") for file in host.files)
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if is_there else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.send(host.files[path], deed, is_head)

        def send(self, content: bytes, deed: str, is_head: bool) -> None:
            if deed == "page":
                content = b"<!DOCTYPE html><title>Sign in</title>"
            if deed == "other":
                content = content[:-9] + bytes(9)
            begin, given = 0, self.headers.get("Range", "")
            if given.startswith("bytes=") and deed not in ("no range", "cut no range"):
                begin = int(given[6:].partition("-")[0])
            if begin >= len(content) > 0:
                self.send_error(416)
                return
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            if self.headers.get("If-Range") not in (None, etag):
                begin = 0
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            if host.etags:
                self.send_header("ETag", etag)
            self.send_header("X-Repo-Commit", "c" * 40)
            if deed != "no length":
                length = len(content) - begin - (1000 if deed == "short" else 0)
                self.send_header("Content-Length", str(10**12 if deed == "huge" else length))
            self.end_headers()
            if is_head:
                return
            body = content[begin:]
            if deed.startswith("cut"):
                body = body[: len(body) // 2]
            if deed == "nothing":
                body = b""
            if deed == "slow":
                for start in range(0, len(body), len(body) // 4):
                    self.wfile.write(body[start : start + len(body) // 4])
                    self.wfile.flush()
                    time.sleep(0.05)
                return
            with suppress(OSError):  # who asked has gone
                self.wfile.write(body)

    return Handler


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def encrypted(host: Host, tmp_path: Path) -> Iterator[str]:
    """The address of the same server behind a certificate that it has signed itself, which is in `cert.pem`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = "-keyout key.pem -out cert.pem"
    subprocess.run(["openssl", *words.split(), *files.split()], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(host))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def content() -> bytes:
    """A small file as torch writes it."""
    file = io.BytesIO()
    torch.save({"weight": torch.arange(20000.0)}, file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our cache, empty, and clients without patience."""
    for name in ("DETR_EXP_WEIGHTS", "DETR_EXP_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(download, "SILENCE", 0.3)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    return tmp_path / "cache" / "detr_exp" / "weights"


@pytest.fixture
def hub(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The server plays the hub, whose cache is empty."""
    monkeypatch.setattr(constants, "ENDPOINT", host.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", host.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE, raising=False)
    return host


@pytest.fixture
def served(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a file of the table on the server; hashes are those of the real files, so there are none."""
    with open(table.TABLE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def put(name: str, content: object, on_hub: bool = False) -> None:
        file = io.BytesIO()
        if not isinstance(content, bytes):
            torch.save(content, file)
        (row,) = (row for row in rows if row["name"] == name)
        path = f"/{row['hub']}/resolve/main/{row['hub_file']}" if on_hub else f"/{name}/{Path(row['url']).name}"
        host.files[path] = content if isinstance(content, bytes) else file.getvalue()
        row |= {"url": "" if on_hub else f"{host.url}{path}", "hash": "unknown"}
        with open(tmp_path / "table.csv", "w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(row))
            writer.writeheader()
            writer.writerows(rows)
        table.table.cache_clear()
        table.names.cache_clear()

    monkeypatch.setattr(table, "TABLE", tmp_path / "table.csv")
    monkeypatch.setattr(download, "SILENCE", 60.0)  # these files are large
    yield put
    table.table.cache_clear()
    table.names.cache_clear()
