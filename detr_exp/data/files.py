"""Paths in annotation files: they have to be existing regular files inside the data set's folder."""

from __future__ import annotations

import codecs
import os
import stat
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from detr_exp.data.image import SUFFIXES, read_size
from detr_exp.data.problems import Problems
from detr_exp.data.seen import Seen, listing

_CLOSED = "cannot be read"
_COMPANIONS = {".cache", ".csv", ".db", ".html", ".ini", ".json", ".md", ".npy", ".txt", ".xml", ".yaml", ".yml"}


class Folder:
    """A data set's folder, and the other folders that may contain its files.

    Args:
        root: the folder.
        extra_roots: further folders that links and paths may point into.

    Raises:
        ValueError: one of these folders does not exist.
    """

    def __init__(self, root: str | os.PathLike[str] | None, extra_roots: Sequence[str] = ()) -> None:
        if not root:
            raise ValueError("data.root is not set; give the folder of the data set: data.root=/path/to/data")
        self.root = Path(str(root)).expanduser()
        if not os.path.isdir(self.root):
            raise ValueError(f"data.root is {str(root)!r}, which is not a folder; give an existing one: data.root=...")
        if missing := [extra for extra in extra_roots if not os.path.isdir(Path(extra).expanduser())]:
            raise ValueError(
                f"data.source.extra_roots has {missing[0]!r}, which is not a folder; fix it or leave it out: "
                "data.source.extra_roots=[...]"
            )
        self.allowed = [
            Path(os.path.realpath(path)) for path in (self.root, *(Path(e).expanduser() for e in extra_roots))
        ]
        self.seen = Seen()
        self._inside: dict[str, bool] = {}
        self._entries: dict[str, tuple[list[os.DirEntry[str]], str]] = {}
        self._images: dict[Path, dict[str, list[Path]]] = {}

    def identity(self) -> dict[str, object]:
        """The folders, as values of JSON."""
        return {"root": str(self.root), "place": os.path.abspath(self.root), "allowed": list(map(str, self.allowed))}

    def inside(self, path: Path) -> bool:
        """Whether `path`, links followed, lies in the folder or an extra one."""
        real = os.path.realpath(path)
        return any(os.path.commonpath((real, root)) == str(root) for root in self.allowed)

    def complaint(self, path: Path | str) -> str | None:
        """Why `path` cannot be read as a file of this data set; None if it can."""
        above, _, name = str(path).rpartition(os.sep)
        parent, seen = above or str(Path(path).parent), self.seen
        try:
            mode = os.lstat(path).st_mode
            linked = stat.S_ISLNK(mode)
            mode = os.stat(path).st_mode if linked else mode
            if parent not in self._inside:
                self._inside[parent] = self.inside(Path(parent))
            if parent not in seen.targets:
                seen.targets[parent] = os.path.realpath(parent)
        except (OSError, ValueError):
            seen.file(path)
            return f"{str(path)!r:.400} does not exist"
        if linked or not stat.S_ISREG(mode):
            seen.file(path)
            seen.targets[str(path)] = os.path.realpath(path)
        else:
            seen.plain[parent].append(name)
        if not self._inside[parent] or (linked and not self.inside(Path(path))):
            return (
                f"{str(path)!r} lies outside data.root ({os.path.realpath(path)}); allow its folder with "
                "data.source.extra_roots=[...]"
            )
        return None if stat.S_ISREG(mode) else f"{str(path)!r} is not a regular file"

    def refuses(self, link: Path) -> str | None:
        """Why a linked folder must not be entered; None if it may."""
        if self.inside(link):
            return None
        real = os.path.realpath(link)
        return f"{str(link)!r} lies outside data.root ({real}); allow it with data.source.extra_roots=[...]"

    def entries(self, place: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, by name; listed once.

        Raises:
            OSError: it cannot be read.
        """
        name = str(place)
        if name not in self._entries:
            try:
                self._entries[name] = listing(place)
            except OSError:
                self.seen.file(place)
                raise
        entries, self.seen.listings[name] = self._entries[name]
        self.seen.targets[name] = os.path.realpath(place)
        return entries

    def is_file(self, path: Path) -> bool:
        """Whether a file is there, links followed."""
        self.seen.file(path)
        return os.path.isfile(path)

    def exists(self, path: Path) -> bool:
        """Whether anything is there, links followed."""
        self.seen.file(path)
        return os.path.exists(path)

    def data(self, path: Path) -> bytes:
        """The content of a file."""
        self.seen.file(path)
        return path.read_bytes()

    def size(self, path: Path) -> tuple[int, int]:
        """(height, width) of an image, as `read_size`."""
        self.seen.file(path)
        return read_size(path)

    def files(self, start: Path, problems: Problems) -> list[Path]:
        """Every file in a folder of the data set and below; reports folders that cannot or must not be read."""
        found, left_out = self.below(start)
        for place, reason in left_out:
            if reason.startswith(_CLOSED):
                problems.error("folders that cannot be read; change their permissions", f"{place} {reason}")
            elif self.inside(place):
                problems.warn("folders were left out, with their images", f"{place} {reason}")
            else:
                problems.error("linked folders that point outside the data set", reason)
        return found

    def below(self, start: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
        """As `files_below`, within the data set."""
        return files_below(start, self.refuses, self.entries)

    def images(self, place: Path) -> dict[str, list[Path]]:
        """The images in a folder by their name without suffix; listed once."""
        try:
            entries = self.entries(place)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        if place not in self._images:
            found = self._images.setdefault(place, {})
            for name in (entry.name for entry in entries):
                if is_image(name):
                    found.setdefault(os.path.splitext(name)[0], []).append(place / name)
        return self._images[place]

    def names(self, limit: int = 12) -> str:
        """The entries of the folder, for messages."""
        found = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in self.root.iterdir())
        return ", ".join(found[:limit]) + (f", ... ({len(found)} entries)" if len(found) > limit else "") or "nothing"


def files_below(
    start: Path,
    refuse: Callable[[Path], str | None] = lambda link: None,
    scan: Callable[[Path], Sequence[os.DirEntry[str]]] = lambda folder: listing(folder)[0],
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Every file in a folder and below, linked folders included.

    Each folder is read once, by its real path rather than through a link; links to a parent folder are not followed.

    Args:
        start: the folder.
        refuse: why a linked folder must not be entered; None where it may.
        scan: the entries of a folder, by name.

    Returns:
        the files, by the path that led to them, and the folders that were left out, each with the reason.
    """
    found: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    seen: set[str] = set()
    folders, links = deque([start]), deque[Path]()
    while folders or links:
        linked = not folders
        folder = links.popleft() if linked else folders.popleft()
        real = os.path.realpath(folder)
        if linked and (
            real in seen or f"{os.path.realpath(start)}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}")
        ):
            left_out.append((folder, f"leads to {real}, which is read already"))
            continue
        if linked and (reason := refuse(folder)):
            left_out.append((folder, reason))
            continue
        seen.add(real)
        try:
            entries = scan(folder)
        except OSError as error:
            left_out.append((folder, f"{_CLOSED} ({error.strerror})"))
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(folder / entry.name)
            elif os.path.isdir(entry):  # false for a link to itself
                links.append(folder / entry.name)
            else:
                found.append(folder / entry.name)
    return found, left_out


def is_image(name: str) -> bool:
    """Whether a file is read as an image, by its name; `._x.jpg` is what macOS keeps about `x.jpg`."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def companion(name: str) -> bool:
    """Whether a file commonly lies among images without being one."""
    hidden = name.startswith(".") and os.path.splitext(name)[1].lower() not in SUFFIXES
    return hidden or name.startswith("._") or os.path.splitext(name)[1].lower() in _COMPANIONS


def decoded(data: bytes, path: Path) -> str:
    """UTF-8 text, or UTF-16 where a mark says so.

    Raises:
        ValueError: it is neither.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
