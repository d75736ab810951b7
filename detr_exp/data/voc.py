"""Pascal VOC: one XML file per image, and text files that list the images of a split.

Two layouts: the development kit (`VOC2007/Annotations`, `ImageSets/Main`, `JPEGImages`, one or several years), and a
folder per split with images and XML files side by side, as labelling tools export it. Objects marked difficult are
neither trained on nor counted against a detector, as in the challenge, unless requested.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from detr_exp.data import index
from detr_exp.data.content import SPLITS, Category, Content, Split
from detr_exp.data.conventions import TWO_CORNERS
from detr_exp.data.files import Folder, companion, decoded, files_below, is_image
from detr_exp.data.image import ImageError
from detr_exp.data.problems import Problems, short
from detr_exp.data.rows import Images, Rows, tabulated
from detr_exp.data.seen import Stamp, stamp_of
from detr_exp.data.table import TableSplit

# The classes of the challenge; used where the files have no others.
# fmt: off
CHALLENGE = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on
_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
_LARGEST_XML = 2**22


class _Pair(NamedTuple):
    image: Path
    annotation: Path


class _Tree(NamedTuple):
    root: ElementTree.Element
    stamp: Stamp  # of the file, from before it was read


def voc(
    root: str | None,
    places: Mapping[str, str | Sequence[str] | None],
    *,
    names: Sequence[str] | None = None,
    one_based: bool = False,
    use_difficult: bool = False,
    extra_roots: Sequence[str] = (),
    on_error: str = "error",
) -> Content:
    """A Pascal VOC data set, as a source for `DataSet`.

    Args:
        root: the development kit, one of its years, or a folder with a folder per split.
        places: per split text files relative to the root, an image's name or `image annotation` a line; None: by the
            layout. The kit's `trainval` trains and its `test` validates where it is annotated, else `train` and `val`.
        names: the classes in order; None: the challenge's 20, or all that the training files have, sorted.
        one_based: corners are pixels counted from 1, both of them inside the box, as in the challenge's own files; most
            tools write distances from the upper left corner instead.
        use_difficult: objects marked difficult are trained on and counted like any others.
        extra_roots: further folders that may contain images.
        on_error: `error`, or `skip` for images that are missing or have no readable header.

    Raises:
        ValueError: no training images, or a file that cannot be used.
    """
    folder = Folder(root, extra_roots)
    problems = Problems(str(folder.root), on_error)
    pairs = {name: _pairs(folder, name, places.get(name), problems) for name in SPLITS}
    problems.report()
    if not pairs["train"]:
        raise ValueError(
            f"data.root is {str(root)!r}, but there is no ImageSets/Main/trainval.txt and no train/*.xml (found: "
            f"{folder.names()}); name the list: data.train=VOC2007/ImageSets/Main/trainval.txt"
        )
    trees: dict[Path, _Tree] = {}
    categories = _categories(folder, pairs["train"], names, trees)
    read: dict[str, Callable[[], Split]] = {
        name: partial(_split, folder, found, categories, one_based, use_difficult, trees, on_error)
        for name, found in pairs.items()
        if found
    }
    return Content("voc", str(folder.root), categories, read)


def find_layout(root: Path) -> list[Path]:
    """The folders below `root` that are in this layout: years of the kit, or `train` with XML files."""
    years = sorted(
        path.parent.parent for path in [root / "ImageSets/Main", *root.glob("VOC*/ImageSets/Main")] if path.is_dir()
    )
    return years or ([root / "train"] if _has_xml(root / "train") else [])


def _has_xml(part: Path) -> bool:
    return part.is_dir() and any(_is_xml(file) for file in files_below(part)[0])


def _is_xml(file: Path) -> bool:
    return file.suffix.lower() == ".xml" and not file.name.startswith(".")


def _pairs(folder: Folder, name: str, place: str | Sequence[str] | None, problems: Problems) -> list[_Pair]:
    root = folder.root
    if place is not None:
        files = [root / file for file in ([place] if isinstance(place, str) else place)]
        for file in files:
            if complaint := folder.complaint(file):
                raise ValueError(f"data.{name}: {complaint}; it is taken relative to data.root")
        return [pair for file in files for pair in _listed(folder, file)]
    years = find_layout(root)
    if years and (years[0] / "ImageSets").is_dir():
        return [pair for file in _kit_lists(years, name, problems) for pair in _listed(folder, file)]
    parts = [root / part for part in _FOLDERS[name] if _has_xml(root / part)]
    if len(parts) > 1:
        problems.error("two folders for one split; remove one", f"{name}: {parts[0]} and {parts[1]}")
    return _side_by_side(folder, parts[0], problems) if parts else []


def _side_by_side(folder: Folder, part: Path, problems: Problems) -> list[_Pair]:
    """The XML files in a folder and below, each with its image; reports images without one."""
    files = folder.files(part, problems)
    pairs = [_Pair(_image(folder, file.with_suffix("")), file) for file in sorted(files) if _is_xml(file)]
    used = {pair.image for pair in pairs}
    for file in files:
        if is_image(file.name) and file not in used:
            kind = "images without XML file were left out; give those without objects an empty <annotation/>"
            problems.warn(kind, str(file))
        elif not is_image(file.name) and not companion(file.name):
            problems.warn("files that are not read as images were left out; convert those that are images", str(file))
    return pairs


def _kit_lists(years: list[Path], name: str, problems: Problems) -> list[Path]:
    """The lists of a split: trainval and test where some year has an annotated test set, else train and val."""
    tests = [path for year in years if (path := _list(year, "test")) is not None and _annotated(path)]
    if name == "val":
        return tests or [path for year in years if (path := _list(year, "val")) is not None]
    if name == "test":
        return []
    kind = "trainval" if tests else "train"
    for year in years:
        if name == "train" and _list(year, kind) is None:
            problems.warn(f"years without ImageSets/Main/{kind}.txt were left out", str(year))
    return [path for year in years if (path := _list(year, kind)) is not None]


def _list(year: Path, kind: str) -> Path | None:
    path = year / "ImageSets" / "Main" / f"{kind}.txt"
    return path if os.path.isfile(path) else None


def _annotated(file: Path) -> bool:
    first = decoded(file.read_bytes(), file).split()
    return bool(first) and os.path.isfile(file.parent.parent.parent / "Annotations" / f"{first[0]}.xml")


def _listed(folder: Folder, file: Path) -> Iterator[_Pair]:
    for line in decoded(file.read_bytes(), file).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].lower().endswith(".xml"):
            yield _Pair(folder.root / words[0], folder.root / words[1])
        elif words:
            # lists of one class add a flag whether it is in the image; names may have spaces
            name, year = line.strip(), file.parent.parent.parent
            has_flag = len(words) == 2 and words[1] in ("-1", "0", "1")
            if has_flag and not os.path.isfile(year / "Annotations" / f"{name}.xml"):
                name = words[0]
            yield _Pair(_image(folder, year / "JPEGImages" / name), year / "Annotations" / f"{name}.xml")


def _image(folder: Folder, stem: Path) -> Path:
    """The image of this name, whatever its suffix."""
    usual = stem.with_name(f"{stem.name}.jpg")
    if os.path.isfile(usual) or not os.path.isdir(stem.parent):
        return usual
    return next(iter(folder.images(stem.parent).get(stem.name, ())), usual)


def _categories(
    folder: Folder, pairs: list[_Pair], names: Sequence[str] | None, trees: dict[Path, _Tree]
) -> list[Category]:
    if names is None:
        problems = Problems(str(folder.root))

        def read() -> tuple[list[Category], int]:
            found: set[str] = set()
            for pair in pairs:
                tree = _tree(folder, pair.annotation, problems)
                if tree is not None:
                    trees[pair.annotation] = tree
                    found |= {_text(item, "name") for item in tree.root.iter("object")} - {""}
            names = CHALLENGE if found <= set(CHALLENGE) else sorted(found)
            return [Category(i, name) for i, name in enumerate(names)], len(pairs)

        return index.categories(folder, {"layout": "voc", "pairs": _digest(pairs)}, problems, read)
    strange = [name for name in names if isinstance(name, (bool, float)) or name is None]
    if strange:
        raise ValueError(
            f"data.source.names has {strange[0]!r}, which is no text; put it in quotes: data.source.names=['no','1e3']"
        )
    if isinstance(names, str) or len({str(name) for name in names}) != len(names):
        raise ValueError(
            f"data.source.names is {short(names)}; give every class once, as a list: data.source.names=[cat,dog]"
        )
    return [Category(i, str(name)) for i, name in enumerate(names)]


def _split(
    folder: Folder,
    pairs: list[_Pair],
    categories: list[Category],
    one_based: bool,
    use_difficult: bool,
    trees: dict[Path, _Tree],
    on_error: str,
) -> TableSplit:
    problems = Problems(str(folder.root), on_error)

    def read() -> TableSplit:
        return _read(folder, pairs, categories, one_based, use_difficult, trees, problems)

    key = {"layout": "voc", "pairs": _digest(pairs), "one_based": one_based, "use_difficult": use_difficult}
    return index.split(folder, key, problems, categories, read)


def _digest(pairs: list[_Pair]) -> str:
    return hashlib.sha256(
        "\0".join(f"{image}\0{annotation}" for image, annotation in pairs).encode("utf-8", "surrogateescape")
    ).hexdigest()


def _read(
    folder: Folder,
    pairs: list[_Pair],
    categories: list[Category],
    one_based: bool,
    use_difficult: bool,
    trees: dict[Path, _Tree],
    problems: Problems,
) -> TableSplit:
    images, rows = Images(), Rows("{file}: object {number}", TWO_CORNERS)
    number_of = {category.name: category.id for category in categories}
    digest = hashlib.sha256(repr((categories, one_based, *["difficult"] * use_difficult)).encode())
    marked = 0
    for pair in pairs:
        if complaint := folder.complaint(pair.image):
            problems.image(complaint)
            continue
        tree = trees.pop(pair.annotation, None)
        tree = _tree(folder, pair.annotation, problems) if tree is None else tree
        if tree is None:
            continue
        folder.seen.stamps[str(pair.annotation)] = tree.stamp
        try:
            size = _agreed(tree.root, folder.size(pair.image))
        except ImageError as error:
            problems.image(str(error))
            continue
        except ValueError as error:
            problems.error("the size in an annotation is that of its image", f"{pair.annotation}: {error}")
            continue
        images.ids.append(len(images.ids) + 1)
        images.paths.append(str(pair.image))
        images.sizes.append(size)
        digest.update(f"{pair.image.name} {size}".encode() + ElementTree.tostring(tree.root))
        rows.files.append(str(pair.annotation))
        for place, item in enumerate(tree.root.iter("object"), 1):
            where = f"{pair.annotation}: object {place}"
            try:
                category, box = _object(item, number_of, one_based)
            except ValueError as error:
                problems.error("objects have a known name and a bndbox of four numbers", f"{where}: {error}")
                continue
            difficult = _text(item, "difficult").lower() in ("1", "true")
            marked += difficult
            rows.add(len(images.ids) - 1, category, box, place, crowd=difficult and not use_difficult)
    rows.searched = f"objects in {len(pairs)} XML files such as {pairs[0].annotation}"
    if marked and not use_difficult:
        rows.searched += f"; {marked} are marked difficult: data.source.use_difficult=true takes them like others"
        kind = "objects marked difficult are neither trained on nor counted; else: data.source.use_difficult=true"
        problems.note(kind, f"{marked} of {len(rows)}")
    return tabulated(images, rows, categories, digest.hexdigest(), problems)


def _tree(folder: Folder, file: Path, problems: Problems) -> _Tree | None:
    kind = "annotations that cannot be read; export them again"
    if complaint := folder.complaint(file):
        problems.error(kind, complaint)
        return None
    stamp = stamp_of(file)
    data = folder.data(file)
    try:
        # as text where a mark says UTF-16: an entity must not hide behind an encoding
        text = decoded(data, file).encode() if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else data
        if len(data) > _LARGEST_XML or b"<!ENTITY" in text:
            raise ValueError(f"{len(data)} bytes, or entities of its own; an annotation has neither")
        return _Tree(ElementTree.fromstring(data), stamp)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        problems.error(kind, f"{str(file)!r} is not readable XML ({error})")
        return None


def _agreed(tree: ElementTree.Element, size: tuple[int, int]) -> tuple[int, int]:
    """The size of the image in the orientation of the annotation; zeros mean that the size is unknown.

    Raises:
        ValueError: the annotation was made for another size.
    """
    try:
        said = round(float(_text(tree, "size/height"))), round(float(_text(tree, "size/width")))
    except (ValueError, OverflowError):
        return size
    if min(said) <= 0 or said == size:
        return size
    if said == size[::-1]:
        return said
    raise ValueError(f"it says {said[1]}x{said[0]}, its image has {size[1]}x{size[0]} pixels")


def _object(
    item: ElementTree.Element, number_of: Mapping[str, int], one_based: bool
) -> tuple[int, tuple[float, float, float, float]]:
    name = _text(item, "name")
    if name not in number_of:
        raise ValueError(f"class {short(name)} is not one of {short(list(number_of))}; add it to data.source.names")
    try:
        x0, y0, x1, y1 = (float(_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise ValueError("its bndbox needs four numbers xmin, ymin, xmax, ymax") from None
    if one_based:
        x0, y0 = x0 - 1, y0 - 1
    return number_of[name], (x0, y0, x1 - x0, y1 - y0)


def _text(item: ElementTree.Element, path: str) -> str:
    return (item.findtext(path) or "").strip()
