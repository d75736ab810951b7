"""Weights from a network that behaves like real ones: cut, slow, refused, wrong; with caches that others use too."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from detr_exp.published import download, fetch, places
from detr_exp.published.download import DownloadError
from detr_exp.published.source import of_word

PAGE = "/release/tiny.pth"


def fetched(word: str) -> Path:
    found = fetch.fetch(word)
    assert found is not None
    return found.path


def left_overs(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if ".part" in path.name]


@pytest.fixture
def url(host: Any, content: bytes) -> str:
    host.files[PAGE] = content
    return f"{host.url}{PAGE}"


def test_once_fetched_it_is_there_without_a_network(host: Any, url: str, content: bytes, cache: Path) -> None:
    path = fetched(url)
    assert path.read_bytes() == content
    assert cache in path.parents
    assert left_overs(cache) == []
    host.plan = ["404"] * 9
    assert fetched(url) == path
    assert host.transfers() == 1
    record = json.loads((cache / places.RECORD).read_text())
    assert record[url] == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


# what the server does, one word a request -> how many requests it takes to get the whole file
GOOD = {
    "cut at half": (["cut"], 2),
    "cut three times": (["cut", "cut", "cut"], 4),
    "cut where Range is refused": (["cut", "no range"], 2),
    "cut twice where Range is refused": (["cut no range", "cut no range", "no range"], 4),
    "500, then right": (["500"], 2),
    "503 thrice, then right": (["503", "503", "503"], 4),
    "429, then right": (["429"], 2),
    "slow": (["slow"], 1),
    "no answer, then right": (["silent"], 2),
    "nothing sent, then right": (["nothing"], 2),
    "without a length": (["no length"], 1),
    "a redirect": (["to /elsewhere"], 2),
    "a redirect and a cut": (["to /elsewhere", "cut", "to /elsewhere"], 4),
}


@pytest.mark.parametrize(("plan", "requests"), GOOD.values(), ids=GOOD)
def test_it_comes_whole(plan: list[str], requests: int, host: Any, url: str, content: bytes, cache: Path) -> None:
    host.files["/elsewhere"] = content
    host.plan = list(plan)
    assert fetched(url).read_bytes() == content
    assert left_overs(cache) == []
    if "no range" not in " ".join(plan):
        assert host.transfers() == requests


def test_a_cut_transfer_goes_on_where_it_was(host: Any, url: str, content: bytes) -> None:
    host.plan = ["cut"]
    fetched(url)
    (_, _, first), (_, _, second) = host.asked
    assert "Range" not in first
    assert second["Range"] == f"bytes={len(content) // 2}-"
    assert second["If-Range"].strip('"') == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("etags", [True, False])
def test_a_part_of_another_version_is_not_gone_on_with(host: Any, url: str, content: bytes, etags: bool) -> None:
    """With an entity tag the server sends the whole; without one the length tells."""
    host.etags = etags
    host.plan = ["cut", "404"]
    with pytest.raises(ValueError, match="404"):
        fetched(url)
    host.files[PAGE] = content.replace(b"weight", b"height") if etags else content + content
    assert fetched(url).read_bytes() == host.files[PAGE]


# what the server does for ever, or once -> what is said, besides where the file comes from and where to put it
BAD = {
    "cut for good": (
        ["cut"] + ["nothing"] * 9,
        r"4 times in a row; \d+ bytes of it are kept, and the same command goes",
    ),
    "404": (["404"], "answers 404 .it is not there."),
    "403": (["403"], "answers 403 .it is not for everybody."),
    "401": (["401"], "answers 401 .it needs a login."),
    "500 for good": (["500"] * 9, r"answers 500 .*4 times in a row"),
    "no answer for good": (["silent"] * 9, r"connection broke .*timed out.*4 times in a row"),
    "a page of the web": (["page"], "a page of the web in place of the file"),
    "a shorter file": (["short"], "no whole file of tensors"),
    "too large": (["huge"], r"at most 8 GiB are fetched"),
    "a redirect to a file": (["to file:///etc/passwd"], "not allowed"),
    "redirects without end": ([f"to {PAGE}"] * 20, "redirect"),
}


@pytest.mark.parametrize(("plan", "message"), BAD.values(), ids=BAD)
def test_it_says_why_it_does_not_come(plan: list[str], message: str, host: Any, url: str, cache: Path) -> None:
    host.plan = list(plan)
    with pytest.raises(ValueError, match=message) as caught:
        fetched(url)
    said = str(caught.value)
    assert url in said
    assert "tiny.pth" in said
    assert str(cache) in said
    assert f"python -m detr_exp.weights fetch {url}" in said
    assert not list(cache.rglob("tiny.pth"))
    assert not (cache / places.RECORD).exists()


def test_wrong_bytes_are_not_kept(host: Any, url: str, content: bytes, cache: Path) -> None:
    wanted = hashlib.sha256(content).hexdigest()
    host.plan = ["other"]
    with pytest.raises(ValueError, match=f"its sha256 is [0-9a-f]{{64}}, published is {wanted}"):
        fetched(f"{url}#sha256={wanted}")
    assert not list(cache.rglob("tiny.pth*"))
    assert fetched(f"{url}#sha256={wanted}").read_bytes() == content
    md5 = hashlib.md5(content).hexdigest()
    assert fetched(f"{url}#md5={md5}").read_bytes() == content


def test_a_part_with_wrong_bytes_is_begun_anew(host: Any, url: str, content: bytes, cache: Path) -> None:
    host.etags = False
    host.plan = ["cut", "404"]
    with pytest.raises(ValueError, match="404"):
        fetched(url)
    (part,) = cache.rglob("*.part")
    part.write_bytes(bytes(part.stat().st_size))
    assert fetched(f"{url}#sha256={hashlib.sha256(content).hexdigest()}").read_bytes() == content


def test_a_file_that_changes_after_its_first_use_is_refused(host: Any, url: str, content: bytes, cache: Path) -> None:
    path = fetched(url)
    changed = content.replace(b"weight", b"height")
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"is another file: .*at the first use it was .*weights\.lock\.json.*move it"):
        fetched(url)
    assert path.read_bytes() == changed  # whoever wrote it
    path.unlink()
    host.files[PAGE] = changed
    with pytest.raises(ValueError, match="at the first use it was"):
        fetched(url)
    (cache / places.RECORD).unlink()
    assert fetched(url).read_bytes() == changed


def test_a_file_of_somebody_in_the_way_is_never_touched(host: Any, url: str, content: bytes, cache: Path) -> None:
    place = places.own_place(of_word(url))
    place.parent.mkdir(parents=True)
    place.write_bytes(b"my own")
    with pytest.raises(ValueError, match=r"is another file.*move it away"):
        fetched(f"{url}#sha256={hashlib.sha256(content).hexdigest()}")
    assert place.read_bytes() == b"my own"
    assert host.asked == []
    place.unlink()
    place.mkdir()
    with pytest.raises(ValueError, match="is a folder; move it away"):
        fetched(url)


def test_links_of_the_user_stay(host: Any, url: str, content: bytes, cache: Path, tmp_path: Path) -> None:
    big_disk = tmp_path / "big disk"
    big_disk.mkdir()
    cache.parent.mkdir(parents=True)
    cache.symlink_to(big_disk)
    path = fetched(url)
    assert cache.is_symlink()
    assert next(big_disk.rglob("tiny.pth")).read_bytes() == content
    path.unlink()
    path.symlink_to(big_disk / "elsewhere.pth")  # leads nowhere yet
    assert fetched(url).read_bytes() == content
    assert path.is_symlink()
    assert (big_disk / "elsewhere.pth").read_bytes() == content


def test_a_cache_that_cannot_be_written_to(
    host: Any, url: str, content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = fetched(url)
    with monkeypatch.context() as read_only:
        read_only.setattr(Path, "mkdir", refuse)
        assert fetched(url) == path
        host.files["/new.pth"] = content
        with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\).*XDG_CACHE_HOME=FOLDER"):
            fetched(f"{host.url}/new.pth")


def test_a_full_disk(host: Any, url: str, content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = download.shutil.disk_usage(cache.parent.parent.parent)
    with monkeypatch.context() as full:
        full.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ValueError, match=rf"needs {len(content)} bytes, and .* has 1000 left; free space"):
            fetched(url)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(download.os, "fsync", refuse)
        with pytest.raises(ValueError, match=r"cannot be written to \(No space left on device\); free space"):
            fetched(url)
    assert fetched(url).read_bytes() == content


@pytest.mark.parametrize("why", ["told", "no name", "no connection"])
def test_without_a_network_the_answer_comes_at_once(
    why: str, url: str, content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetched(url)
    if why == "told":
        monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    assert fetched(url) == path  # what is here needs none
    word = "http://127.0.0.1:9/x/tiny.pth" if why == "no connection" else "https://weights.invalid/x/tiny.pth"
    digits = "a" * 64
    begun = time.monotonic()
    with pytest.raises(ValueError, match="is not on this machine, and") as caught:
        fetched(f"{word}#sha256={digits}")
    assert time.monotonic() - begun < 1
    said = str(caught.value)
    assert f"tiny.pth (size unknown, sha256:{digits}) from {word}; put it at {cache}" in said
    assert ("DETR_EXP_OFFLINE is set" in said) == (why == "told")
    assert not any(path.name.startswith(".tiny") for path in cache.rglob("*") if path.parent != fetched(url).parent)


def test_a_name_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    begun = time.monotonic()
    with pytest.raises(DownloadError, match="nobody knew its name"):
        download.refuse_unreachable("https://weights.invalid/x")
    assert time.monotonic() - begun < 1


def test_a_proxy_is_asked_in_place_of_the_host(host: Any, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", host.url)
    monkeypatch.delenv("no_proxy", raising=False)
    word = "http://weights.invalid/tiny.pth"
    host.files[word] = content
    assert fetched(word).read_bytes() == content


def fetch_elsewhere(url: str, count: int) -> list[subprocess.Popen[str]]:
    code = f"from detr_exp.published.fetch import fetch; print(fetch({url!r}).sha256)"
    words = [sys.executable, "-c", code]
    return [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_processes_one_downloads(count: int, host: Any, url: str, content: bytes) -> None:
    host.plan = ["slow"]
    ends = [process.communicate(timeout=60) for process in fetch_elsewhere(url, count)]
    assert {out.strip() for out, _ in ends} == {hashlib.sha256(content).hexdigest()}, ends
    assert host.transfers() == 1


def test_killed_in_mid_transfer_it_goes_on(host: Any, url: str, content: bytes, cache: Path) -> None:
    host.files[PAGE] = content * 40
    host.plan = ["slow"]
    (process,) = fetch_elsewhere(url, 1)
    for _ in range(1000):
        if any(path.stat().st_size for path in cache.rglob("*.part")):
            break
        time.sleep(0.02)
    process.kill()
    process.communicate()
    (part,) = cache.rglob("*.part")
    kept = part.stat().st_size
    assert 0 < kept < len(content) * 40
    assert fetched(url).read_bytes() == content * 40
    assert host.asked[-1][2]["Range"] == f"bytes={kept}-"


# ------------------------------------------------------------------------------------------------- names of the table


@pytest.fixture
def listed(host: Any, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts entries whose files this server has in the place of the table."""
    from detr_exp.published import table

    with open(table.TABLE, encoding="utf-8") as file:
        columns = file.readline().strip()
    host.files["/r/one.pth"] = content

    def put(hash_: str = "unknown") -> None:
        (tmp_path / "table.csv").write_text(
            f"{columns}\n"
            f"one_coco,detector,,rtdetrv2_tiny,tiny,80,COCO,AP 1,MIT,{host.url}/r/one.pth,{hash_},unknown,,,\n"
            f"two_coco,detector,,rtdetrv2_tiny,tiny,80,COCO,AP 2,MIT,{host.url}/r/two.pth,{hash_},unknown,,,\n"
        )
        for known in (table.table, table.names):
            known.cache_clear()

    monkeypatch.setattr(table, "TABLE", tmp_path / "table.csv")
    put()
    yield put
    for known in (table.table, table.names):
        known.cache_clear()


def test_places_of_the_user_come_first(
    listed: Any, host: Any, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setenv("DETR_EXP_WEIGHTS", os.pathsep.join(map(str, folders)))
    for place in ("b/one_coco.pth", "a/one.pth", "a/one_coco/one.pth"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(content)
        assert fetched("one_coco") == tmp_path / place
    assert host.asked == []


@pytest.mark.parametrize("packed", [None, save], ids=["torch", "safetensors"])
def test_half_a_file_is_not_taken_for_the_published_one(
    packed: Any, listed: Any, host: Any, content: bytes, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an interrupted download of another program leaves it, where no hash is published."""
    whole = content if packed is None else packed({"weight": torch.arange(20000.0)})
    users, torchs = tmp_path / "users" / "one.pth", tmp_path / "torch" / "hub" / "checkpoints" / "one.pth"
    for place in (users, torchs):
        place.parent.mkdir(parents=True)
        place.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("DETR_EXP_WEIGHTS", str(users.parent))
    with pytest.raises(ValueError, match=r"users/one\.pth cannot be used: .*no whole file of tensors.*move it away"):
        fetched("one_coco")
    assert not (cache / places.RECORD).exists()
    users.write_bytes(whole)
    assert fetched("one_coco") == users
    (cache / places.RECORD).unlink()
    users.unlink()
    assert fetched("one_coco").read_bytes() == content  # from the server
    assert torchs.read_bytes() == whole[: len(whole) // 2]


def test_torchs_folder_is_looked_into_and_others_files_there_are_left(
    listed: Any, host: Any, content: bytes, tmp_path: Path
) -> None:
    place = tmp_path / "torch" / "hub" / "checkpoints" / "one.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert fetched("one_coco") == place
    listed(f"md5:{hashlib.md5(content).hexdigest()}")
    place.write_bytes(b"of another project")
    assert fetched("one_coco").read_bytes() == content
    assert place.read_bytes() == b"of another project"
    assert host.transfers() == 1


def test_published_hashes_are_checked(listed: Any, content: bytes) -> None:
    listed(f"md5:{'0' * 32}")
    with pytest.raises(ValueError, match=rf"its md5 is {hashlib.md5(content).hexdigest()}, published is 0+"):
        fetched("one_coco")


def test_names_of_the_other_kind_are_refused(listed: Any) -> None:
    with pytest.raises(ValueError, match=r"weights of a detector; use model\.weights=one_coco"):
        fetch.fetch("one_coco", "backbone")
    assert fetch.fetch("three_coco") is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hf:owner", "names no repository"),
        ("hf:/etc/passwd", "names no repository"),
        ("hf:./models/mine", "names no repository"),
        ("hf:a..b/c", "names no repository"),
        ("hf:a/b/../../c.pth", "names no repository"),
        ("https://a.b:99999/x.pth", r"no address \(Port out of range.*write https://host"),
        ("https://[::1/x.pth", "no address"),
        ("https:///x.pth", "has no host"),
        ("https://me:secret@a.b/x.pth", r"https://\S+ has a name or password in it"),
        ("https://a.b/x.pth#sha256=12", "is no hash"),
        ("https://a.b/x.pth#crc=12", "is no hash"),
    ],
)
def test_addresses_that_are_none(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch.fetch(word)


@pytest.mark.parametrize("name", ["..%2f..%2fx", "%2e%2e", "", "a%00b", "x" * 300, "ü.pth"])
def test_a_url_leads_into_the_cache(name: str, cache: Path) -> None:
    place = places.own_place(of_word(f"https://a.b/{name}"))
    assert place.resolve().parent.parent == (cache / "url").resolve()
    assert len(place.name) <= 100


def test_a_url_may_be_written_with_blanks_and_umlauts(host: Any, content: bytes) -> None:
    host.files["/my%20gew%C3%BCrz.pth"] = content
    assert fetched(f"{host.url}/my gewürz.pth") == fetched(f"{host.url}/my%20gew%C3%BCrz.pth")
    assert host.transfers() == 1


def test_a_certificate_that_nobody_knows(
    encrypted: str, host: Any, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.files[PAGE] = content
    monkeypatch.setattr(download, "PAUSE", 30.0)  # it is not tried again
    with pytest.raises(ValueError, match=r"certificate of localhost is not trusted \(self.signed.*SSL_CERT_FILE=FILE"):
        fetched(f"{encrypted}{PAGE}")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert fetched(f"{encrypted}{PAGE}").read_bytes() == content
