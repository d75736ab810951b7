"""YOLO data sets: a `data.yaml`, folders or lists of images, and one text file of rows per image.

A row is `class x y width height` (centre and sides), `class x0 y0 x1 y1 ...` (a polygon), or, where the YAML has
`kpt_shape`, `class x y width height` and the keypoints; all relative to the image. An image without a text file has
no objects; `labels.Labels` defines where it is searched.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from detr_exp.data import index
from detr_exp.data.content import SPLITS, Content, Split
from detr_exp.data.conventions import CENTRE_AND_SIDES
from detr_exp.data.description import Description, read_description
from detr_exp.data.files import Folder, companion, decoded, is_image
from detr_exp.data.labels import Labels
from detr_exp.data.problems import Problems, short
from detr_exp.data.rows import Images, Rows, tabulated
from detr_exp.data.table import TableSplit
from detr_exp.data.yolo_rows import RowReader
from detr_exp.values import Values

FILES = ("data.yaml", "data.yml")
_KEYS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


def yolo(
    root: str | None,
    places: Values,
    *,
    file: str | None = None,
    extra_roots: Sequence[str] = (),
    on_error: str = "error",
) -> Content:
    """A YOLO-format data set, as a source for `DataSet`.

    Args:
        root: its folder.
        places: has to be empty: the YAML file names the splits.
        file: the YAML file, relative to the root; None: `data.yaml` or `data.yml`.
        extra_roots: further folders that may contain images.
        on_error: `error`, or `skip` for images that are missing or have no readable header.

    Raises:
        ValueError: places are given, or no YAML file, one that cannot be used, or one that names folders or files that
            do not exist.
    """
    if named := [name for name in SPLITS if places.get(name)]:
        raise ValueError(
            f"data.{named[0]} is {places[named[0]]!r}, but with data=yolo the YAML file names the "
            "splits; leave it out, or name the file: data.source.file=..."
        )
    folder = Folder(root, extra_roots)
    path = folder.root / file if file else find_file(folder.root)
    if path is None or not os.path.isfile(path):
        raise ValueError(
            f"data.root is {str(root)!r}, but there is no {file or 'data.yaml'} (found: {folder.names()}); name the "
            "file: data.source.file=..."
        )
    if complaint := folder.complaint(path):
        raise ValueError(complaint)
    description = read_description(path)
    problems = Problems(str(path), on_error)
    found = {name: _entries(folder, description, name, problems) for name in SPLITS}
    problems.report()
    if not found["train"]:
        raise ValueError(
            f"{path}: it has no key train, and there is no folder train/images (found: {folder.names()}); add the key, "
            "relative to the file or to its 'path'"
        )
    said: set[Path] = set()
    read: dict[str, Callable[[], Split]] = {
        name: partial(_split, folder, description, name, entries, said, on_error)
        for name, entries in found.items()
        if entries
    }
    return Content("yolo", str(path), description.categories, read)


def find_file(root: Path) -> Path | None:
    """The YAML file of this layout in `root`."""
    return next((root / name for name in FILES if (root / name).is_file()), None)


# --------------------------------------------------------------------------------------------------------- the images


def _entries(folder: Folder, description: Description, name: str, problems: Problems) -> list[Path]:
    """The folders and lists of a split; all of them have to exist."""
    path = description.path
    entry = next((description.keys[key] for key in _KEYS[name] if description.keys.get(key)), None)
    items = entry if isinstance(entry, list) else [] if entry is None else [entry]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{path}: {name} is {short(entry)}; it is a folder, a text file of paths, or a list of them")
    if entry is None:
        usual = ("valid", "val") if name == "val" else (name,)
        there = [place for part in usual if (place := folder.root / part / "images").is_dir()]
        if len(there) > 1:
            problems.error("two folders for one split; name one of them", f"{name}: {there[0]} and {there[1]}")
        return there[:1]
    base = path.parent / str(description.keys.get("path") or "")
    found: list[Path] = []
    for item in items:
        inner = Path(*(part for part in Path(item).parts if part not in ("..", ".", os.sep)))
        tried = list(dict.fromkeys((base / item, path.parent / item, folder.root / inner)))
        moved = _moved(folder.root, item) if Path(item).is_absolute() else None
        candidates = [place for place in (*tried, *([moved] if moved else [])) if os.path.exists(place)]
        inside = [place for place in candidates if folder.inside(place)]
        if candidates and not inside:
            kind = "folders or lists outside data.root; allow their folder with data.source.extra_roots=[...]"
            problems.error(
                kind, f"{name} is {item!r}, which lies outside data.root ({os.path.realpath(candidates[0])})"
            )
        elif not candidates:
            kind = f"folders or lists that are named but do not exist; fix or drop them in {path.name}"
            problems.error(kind, f"{name} is {item!r}, but there is no {', no '.join(map(str, tried))}")
        elif any(os.path.samefile(inside[0], other) for other in found):
            problems.error("folders or lists that are named twice; drop one", f"{name}: {item!r} is {inside[0]}")
        else:
            found.append(inside[0])
            if inside[0] == moved:
                problems.warn("folders or lists were found elsewhere than named", f"{name}: {item!r} in {moved}")
    return found


def _moved(root: Path, item: str) -> Path | None:
    """Candidates below `root` for a path of another machine: what follows the folder's name, or its last parts."""
    parts = Path(item).parts[1:]
    starts = [i for i, part in enumerate(parts) if i == 0 or parts[i - 1] == root.resolve().name or len(parts) - i >= 2]
    return next((place for i in starts if os.path.exists(place := root.joinpath(*parts[i:]))), None)


def _listed(folder: Folder, description: Description, entry: Path, problems: Problems) -> Iterator[Path]:
    """The images of one entry: of a folder and the folders in it, or of a text file."""
    if entry.is_dir():
        yield from _in_folder(folder, entry, problems)
        return
    if complaint := folder.complaint(entry):
        raise ValueError(f"{description.path}: {complaint}")
    for line in decoded(folder.data(entry), entry).splitlines():
        if line.strip():
            item = Path(line.strip())
            tried = [entry.parent / item, description.path.parent / item, folder.root / item]
            found = next((place for place in tried if folder.exists(place)), tried[0])
            plain = Path(os.path.normpath(found))
            yield plain if folder.exists(plain) else found


def _in_folder(folder: Folder, entry: Path, problems: Problems) -> Iterator[Path]:
    images = entry / "images" if (entry / "images").is_dir() else entry
    for file in folder.files(entry, problems):
        if is_image(file.name) and file.is_relative_to(images):
            yield file
        elif is_image(file.name):
            problems.warn(f"images outside {images} were left out; name their folder too, if they are meant", str(file))
        elif not companion(file.name):
            problems.warn("files that are not read as images were left out; convert those that are images", str(file))


def _split(
    folder: Folder, description: Description, name: str, entries: list[Path], said: set[Path], on_error: str
) -> TableSplit:
    path = description.path
    problems = Problems(str(path), on_error)

    def read() -> TableSplit:
        return _read(folder, description, name, entries, Labels(folder, said), problems)

    key = {"layout": "yolo", "split": name, "entries": list(map(str, entries)), "shape": description.shape}
    split = index.split(folder, key, problems, description.categories, read)
    if not len(split):
        raise ValueError(f"{path}: no image of the {name} split can be read; a split needs at least one")
    return split


def _read(
    folder: Folder, description: Description, name: str, entries: list[Path], labels: Labels, problems: Problems
) -> TableSplit:
    categories = description.categories
    images, found = Images(), Rows("{file}:{number}", CENTRE_AND_SIDES)
    rows = RowReader(categories, description.shape)
    digest = hashlib.sha256(repr((categories, description.shape)).encode())
    times: Counter[Path] = Counter()
    for entry in entries:
        listed = list(_listed(folder, description, entry, problems))
        times.update(listed)
        if not listed:
            problems.error("no images in folders or lists that are named; fix or drop them", f"{name}: {entry}")
    used: dict[Path, list[Path]] = {}
    for file in sorted(times):
        if times[file] > 1:
            problems.warn("images that are listed more than once; each is used once", f"{file}: {times[file]} times")
        if complaint := folder.complaint(file):
            problems.image(complaint)
            continue
        try:
            size = folder.size(file)
        except ValueError as error:
            problems.image(str(error))
            continue
        used[file] = labels.of(file)
        text = b""
        if used[file]:
            if complaint := folder.complaint(used[file][0]):
                problems.error("text files that cannot be read", complaint)
                continue
            text = folder.data(used[file][0])
        index = len(images.ids)
        images.ids.append(index + 1)
        images.paths.append(str(file))
        images.sizes.append(size)
        digest.update(
            f"{os.path.relpath(file, folder.root)} {size} {len(text)} ".encode(errors="surrogateescape") + text
        )
        if text:
            rows.read(text, used[file][0], index, size, found, problems)
    labels.check(used, problems)
    rows.refuse_poses(problems)
    found.searched = labels.searched(used)
    return tabulated(images, found, categories, digest.hexdigest(), problems)
