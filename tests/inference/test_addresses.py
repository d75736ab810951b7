"""Images and videos behind addresses, with a server on this machine."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp.inference import images
from detr_exp.inference.images import open_source


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save(file, kind)
    return file.getvalue()


CONTENT = {
    "/photo.png": encoded("PNG"),
    "/p": encoded("JPEG"),
    "/page.jpg": b"\n <!doctype html><p>log in",
    "/text.jpg": b"not an image at all",
    "/cut.mp4": b"\0\0\0\x18ftypmp42 and no more",
    "/large.png": encoded("PNG") + bytes(3000),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(self.path)
            self.send_response(200 if path in CONTENT else 404)
            if path != "/large.png":
                self.send_header("Content-Length", str(len(CONTENT.get(path, b""))))
            self.end_headers()
            self.wfile.write(CONTENT.get(path, b""))

        def log_message(self, *words: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DETR_EXP_OFFLINE", raising=False)
    yield f"http://127.0.0.1:{made.server_port}", asked
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("path", ["/photo.png", "/p?width=40&token=geheim"])
def test_an_image_is_downloaded_once(server: tuple[str, list[str]], path: str) -> None:
    address, asked = server
    for _ in range(2):
        items, count = open_source(address + path)
        (item,) = items
        assert (count, item.moves) == (1, False)
        assert item.read().shape == (30, 40, 3)
        assert "geheim" not in item.name + item.stem
    assert asked == [path]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/absent.jpg", "404"),
        ("/page.jpg", "a page of the web"),
        ("/text.jpg", "neither an image nor a video .*b'not an"),
        ("/large.png", "larger than"),
    ],
)
def test_what_is_no_image_is_not_kept(
    server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, told: str
) -> None:
    monkeypatch.setattr(images, "LARGEST_DOWNLOAD", 2000)
    with pytest.raises(ValueError, match=rf"{path} cannot be had: .*{told}.*; give another address"):
        open_source(server[0] + path)
    assert [found.name for found in tmp_path.rglob("*") if found.is_file() and not found.name.endswith(".lock")] == []


def test_a_video_that_cannot_be_decoded_is_refused(server: tuple[str, list[str]]) -> None:
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        open_source(server[0] + "/cut.mp4")


def test_offline_only_the_cache_is_used(server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    address, asked = server
    open_source(f"{address}/photo.png")
    monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    open_source(f"{address}/photo.png")
    with pytest.raises(ValueError, match="DETR_EXP_OFFLINE is set"):
        open_source(f"{address}/p")
    assert asked == ["/photo.png"]


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="takes no connection"):
        open_source("http://127.0.0.1:1/photo.png")
