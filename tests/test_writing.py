"""Files that are the old ones or the new ones at every instant."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from pathlib import Path
from typing import IO

import pytest

from detr_exp.writing import caches, remove_left_overs, write

# what people call files, and as long as a system allows
NAMES = ["a.txt", "x" * 255, "[a-z]*.json", "größe 画.csv", ".hidden", "-f", "a\nb", "\udcff\udcfe.txt"]


def test_caches_have_a_place_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert caches() == Path("/elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/of")
    assert caches() == Path("/home/of/.cache")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # a number without a name, as containers have
    assert caches().is_relative_to(tempfile.gettempdir())


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_and_nothing_beside_it(tmp_path: Path, name: str) -> None:
    for content in ("größe", b"\0\xff", ""):
        write(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == [name]


def test_a_failure_half_way_leaves_the_file_of_before(tmp_path: Path) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"a could not be written .*No space left.*; free space or set"):
        write(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a", "before")
    with pytest.raises(ValueError, match="the previous a is untouched"):
        write(tmp_path / "a", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "a", set()
    write(path, "0" * 100_000)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            text = path.read_text()
            seen.add((len(text), len(set(text))))

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=lambda n=n: [write(path, str(n) * 100_000) for _ in range(20)]) for n in range(1, 4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert seen == {(100_000, 1)}
    assert os.listdir(tmp_path) == ["a"]


def test_links_are_followed_and_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there/file").read_text() == "text"
    (tmp_path / "usual").write_text("")
    assert stat.S_IMODE((tmp_path / "there/file").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write(tmp_path / "pipe", "text")
    reader.join(5)
    assert read == [b"text"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write(Path("/dev/null"), "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    def killed(file: IO[bytes]) -> None:
        raise KeyboardInterrupt

    (tmp_path / "worst").mkdir()
    for path in (tmp_path / "checkpoint.pth", tmp_path / "worst" / "step.jpg"):
        with pytest.raises(KeyboardInterrupt):
            write(path, killed)
    others = [tmp_path / name for name in (".film.mp4.part", "a.0123456789ab.part", ".b.0123456789zz.part")]
    for path in others:
        path.touch()
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 5
    (tmp_path / "run").mkdir()
    others += [tmp_path / "run" / name for name in (".lock", ".of_another_run.0123456789ab.part")]
    for path in others:
        path.touch()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "[a].db", killed)
    remove_left_overs(tmp_path / "[a].db")
    assert not list(tmp_path.glob(".[[]a*"))
    assert list(tmp_path.glob(".checkpoint*")), "that of another file"
    remove_left_overs(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
