"""Realistic data sets and the expected result of each: for `test_malformed.py`."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as codec

from .conftest import document, write_image


class Case(NamedTuple):
    """What is written, and what must come of it: an `error` or a `warning` with these words, or `fine`."""

    name: str
    write: Callable[[Path], object]
    outcome: str
    words: str = ""
    on_error: str = "error"


# ------------------------------------------------------------------------------------------------------------- COCO


def coco(**changes: Any) -> Callable[[Path], object]:
    """A Roboflow-style set whose training file has other values for some keys; `val` changes that of validation."""

    def write(root: Path) -> None:
        for split, content in (("train", changes), ("valid", changes.get("val"))):
            if content is None:
                continue
            for i, name in enumerate(("a.png", "b.png")):
                write_image(root / split / name, seed=i)
            written = {**document(), **{k: v for k, v in content.items() if k != "val"}}
            (root / split / "_annotations.coco.json").write_text(json.dumps(written))

    return write


def one(**changes: Any) -> Callable[[Path], object]:
    """A set whose first annotation has other values; the value `...` takes a key away."""
    first = {**document()["annotations"][0], **changes}
    return coco(annotations=[{k: v for k, v in first.items() if v is not ...}, document()["annotations"][1]])


def image(**changes: Any) -> Callable[[Path], object]:
    """A set whose first image is described otherwise."""
    first = {**document()["images"][0], **changes}
    return coco(images=[{k: v for k, v in first.items() if v is not ...}, document()["images"][1]])


def categories(*entries: Any) -> Callable[[Path], object]:
    return coco(categories=[*entries, *document()["categories"]])


def raw(data: bytes) -> Callable[[Path], object]:
    """Bytes in place of the training file."""

    def write(root: Path) -> None:
        coco()(root)
        (root / "train" / "_annotations.coco.json").write_bytes(data)

    return write


def again(change: Callable[[str], bytes]) -> Callable[[Path], object]:
    """The training file in another encoding."""
    return raw(change(json.dumps(document(), ensure_ascii=False, indent=1)))


def file(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in place of the first image."""

    def write(root: Path) -> None:
        coco()(root)
        path = root / "train" / "a.png"
        path.unlink()
        make(path)

    return write


def other(root: Path) -> Path:
    """The second image of a sound set."""
    coco()(root)
    return root / "train" / "b.png"


def pixels(mode: str, size: tuple[int, int] = (60, 40), **saving: Any) -> Callable[[Path], object]:
    """The first image in another mode; its name keeps saying PNG."""

    def make(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
        drawn = Image.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
        (drawn or Image.fromarray(noise).convert(mode)).save(path, **saving)

    return file(make)


def sized(width: int, height: int) -> Callable[[Path], object]:
    def write(root: Path) -> None:
        first, second = document()["images"]
        there = {"id": 9, "image_id": 12, "category_id": 3, "bbox": [5, 5, 20, 20]}
        changes = {"width": width, "height": height}
        coco(images=[{**first, **changes}, second], annotations=[*document()["annotations"], there])(root)
        write_image(root / "train" / "a.png", (height, width))

    return write


def bomb(path: Path) -> None:
    """A PNG of 60000 x 60000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b"")]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def turned(path: Path) -> None:
    """Stored upright as 60 x 40, with a tag that says it is to be turned by a quarter."""
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, "JPEG", exif=tags)


def cut(path: Path) -> None:
    write_image(path)
    path.write_bytes(path.read_bytes()[:2000])


def leaving(path: Path) -> None:
    write_image(path.parents[2] / "elsewhere.png")
    path.symlink_to(path.parents[2] / "elsewhere.png")


POINTS = {"id": 7, "name": "cup", "keypoints": ["rim", "foot"]}


def posed(points: Any, **category: Any) -> Callable[[Path], object]:
    first = {**document()["annotations"][0], "keypoints": points}
    return coco(annotations=[first], categories=[{**POINTS, **category}])


SAID = 40 * 60
GOOD = codec.encode(np.asfortranarray(np.eye(40, 60, dtype=np.uint8)))["counts"].decode()
COCO = [
    Case("empty file", raw(b""), "error", "not readable JSON"),
    Case("cut file", raw(b'{"images": ['), "error", "not readable JSON"),
    Case("list", raw(b"[]"), "error", "holds a list"),
    Case("deep nesting", raw(b"[" * 200_000), "error", "not readable JSON"),
    Case("endless number", raw(b'{"images": ' + b"9" * 6000 + b"}"), "error", "not readable JSON"),
    Case("latin-1", raw(b'{"images": ["\xe9"]}'), "error", "save it as UTF-8"),
    Case("no images", coco(images=None), "error", "no list 'images'"),
    Case("zero images", coco(images=[], annotations=[]), "error", "lists no images"),
    Case("no category", coco(categories=[]), "error", "at least one class"),
    Case("category id twice", categories({"id": 3, "name": "x"}), "error", "id or name occurs twice"),
    Case("category name twice", categories({"id": 9, "name": "cup"}), "error", "id or name occurs twice"),
    Case("category without name", categories({"id": 9}), "error", "an integer id and a name"),
    Case("category with blank name", categories({"id": 9, "name": " "}), "error", "an integer id and a name"),
    Case("category id as text", categories({"id": "9", "name": "x"}), "error", "an integer id and a name"),
    Case("category id as list", categories({"id": [9], "name": "x"}), "error", "an integer id and a name"),
    Case("category as text", categories("x"), "error", "an integer id and a name"),
    Case(
        "keypoints of a category",
        categories({**POINTS, "id": 9, "name": "x", "keypoints": 3}),
        "error",
        "list of names",
    ),
    Case("image id twice", image(id=12), "error", "its id occurs twice"),
    Case("image id as text", image(id="x"), "error", "integer id and a file_name"),
    Case("image as text", coco(images=["x", *document()["images"]]), "error", "integer id and a file_name"),
    Case("file name as number", image(file_name=5), "error", "integer id and a file_name"),
    Case("no such file", image(file_name="gone.png"), "error", "gone.png"),
    Case("one file missing", file(lambda path: None), "error", "does not exist"),
    Case("way up and out", image(file_name="../../etc/passwd"), "error", "passwd"),
    Case("absolute path", image(file_name="/etc/passwd"), "error", "outside data.root"),
    Case("link out", file(leaving), "error", "extra_roots"),
    Case("named pipe", file(lambda path: os.mkfifo(path)), "error", "not a regular file"),
    Case("folder as file", file(lambda path: path.mkdir()), "error", "not a regular file"),
    Case("NUL in a name", image(file_name="a\0.png"), "error", "does not exist"),
    Case("endless name", image(file_name="a" * 5000), "error", "does not exist"),
    Case("control characters", image(file_name="\x1b[2Ja.png"), "error", r"\\x1b\[2Ja"),
    Case("width 0", image(width=0), "error", "its size is 0 x 40"),
    Case("width negative", image(width=-60), "error", "its size is -60"),
    Case("width infinite", image(width=math.inf), "error", "its size is inf"),
    Case("width with a fraction", image(width=59.9), "error", "its size is 59.9"),
    Case("width as text", image(width="60"), "error", "its size is '60'"),
    Case("gigantic size", image(width=10**6, height=10**6), "error", "134 megapixels"),
    Case("size exchanged", image(width=40, height=60), "error", "60x40 pixels but annotated as 40x60"),
    Case("annotation as number", coco(annotations=[5]), "error", "annotation number 1 is a int"),
    Case("annotation of no image", one(image_id=404), "error", "there is no image 404"),
    Case("image id as object", one(image_id={}), "error", "there is no image"),
    Case("undefined category", one(category_id=5), "error", "category 5 is not one"),
    Case("category as object", one(category_id={}), "error", "is not one of them"),
    Case("no bbox", one(bbox=...), "error", "its bbox is None"),
    Case("bbox of three", one(bbox=[1, 2, 3]), "error", "its bbox is"),
    Case("bbox as text", one(bbox=["1", "2", "3", "4"]), "error", "its bbox is"),
    Case("bbox too large a number", one(bbox=[1, 2, 3, 10**400]), "error", "its bbox is"),
    Case("iscrowd as text", one(iscrowd="no"), "error", "its iscrowd is 'no'"),
    Case("keypoints of another number", posed([1, 2, 2]), "error", "1 keypoints, its category 2"),
    Case("keypoints not finite", posed([1, math.nan, 2, 3, 4, 2]), "error", "not finite numbers"),
    Case("keypoints as text", posed("abc"), "error", "not finite numbers"),
    Case("visibility 7", posed([1, 2, 7, 3, 4, 2]), "error", "visibility 7"),
    Case("categories of validation", coco(val={"categories": [5]}), "error", "category 5"),
    Case("box nan", one(bbox=[math.nan, 1, 2, 3]), "warning", "not finite were dropped .1.: annotation 1"),
    Case("box infinite", one(bbox=[1, 1, math.inf, 3]), "warning", "not finite were dropped"),
    Case("box huge", one(bbox=[-1e300, -1e300, 2e300, 1.7e308]), "fine"),
    Case("box without area", one(bbox=[5, 5, 0, 9]), "warning", "without area were dropped"),
    Case("box of negative size", one(bbox=[5, 5, -3, 9]), "warning", "without area were dropped"),
    Case("box outside", one(bbox=[100, 100, 3, 3]), "warning", "outside their image were dropped"),
    Case("box across the edge", one(bbox=[-10, -10, 30, 30]), "fine"),
    Case("polygon nan", one(segmentation=[[1, 2, math.nan, 4, 5, 6]]), "warning", "replaced by their box"),
    Case("polygon of two points", one(segmentation=[[1, 2, 3, 4]]), "warning", "replaced by their box"),
    Case("polygon as text", one(segmentation=["abc"]), "warning", "replaced by their box"),
    Case("polygon nested", one(segmentation=[[[1, 2], [3, 4], [5, 6]]]), "warning", "replaced by their box"),
    Case("segmentation as text", one(segmentation="abc"), "warning", "replaced by their box"),
    Case("far vertex", one(segmentation=[[10, 5, 3e8, 5, 30, 15]]), "fine"),
    Case("polygon without area", one(segmentation=[[10, 5, 20, 5, 30, 5]]), "fine"),
    Case("runs too long", one(segmentation={"size": [40, 60], "counts": [0, SAID + 1]}), "warning", "replaced by"),
    Case("runs negative", one(segmentation={"size": [40, 60], "counts": [SAID + 5, -5]}), "warning", "replaced by"),
    Case("runs of another size", one(segmentation={"size": [4, 6], "counts": [0, 24]}), "warning", "replaced by"),
    Case("runs of negative size", one(segmentation={"size": [-40, -60], "counts": [2400]}), "warning", "replaced by"),
    Case("runs gigantic", one(segmentation={"size": [10**6, 10**6], "counts": [10**12]}), "warning", "replaced by"),
    Case("runs compressed badly", one(segmentation={"size": [40, 60], "counts": "zzzz"}), "warning", "replaced by"),
    Case("runs cut off", one(segmentation={"size": [40, 60], "counts": "P"}), "warning", "replaced by"),
    Case("runs not ASCII", one(segmentation={"size": [40, 60], "counts": "é\0"}), "warning", "replaced by"),
    Case("runs compressed well", one(segmentation={"size": [40, 60], "counts": GOOD}), "fine"),
    Case("annotation id twice", one(id=2), "warning", "annotation ids occur twice"),
    Case("annotation without id", one(id=...), "fine"),
    Case("without iscrowd and area", one(iscrowd=..., area=...), "fine"),
    Case("area nonsense", one(area="big"), "fine"),
    Case("crowd", one(iscrowd=1), "fine"),
    Case("skeleton of other points", posed([1, 2, 2, 3, 4, 2], skeleton=[[1, 9]]), "warning", "skeletons"),
    Case("keypoint outside", posed([1, 2, 2, 300, 4, 2]), "warning", "outside their image are not trained on"),
    Case("keypoints without names", posed([1, 2, 2, 3, 4, 2], keypoints=[]), "warning", "mirror pairs are not known"),
    Case(
        "other ids in validation",
        coco(val={"categories": [{"id": 3, "name": "cup"}, {"id": 7, "name": "ball"}]}),
        "warning",
        "mapped by name",
    ),
    Case(
        "more classes in validation",
        coco(
            val={
                "categories": [*document()["categories"], {"id": 9, "name": "x"}],
                "annotations": [{**document()["annotations"][0], "category_id": 9}],
            }
        ),
        "warning",
        "left out .1.: category 9",
    ),
    Case(
        "fewer classes in validation",
        coco(val={"categories": [{"id": 7, "name": "cup"}], "annotations": document()["annotations"][:1]}),
        "fine",
    ),
    Case("no objects in validation", coco(val={"annotations": []}), "warning", "no object to measure on"),
    Case(
        "heading of categories",
        coco(
            categories=[
                {"id": 0, "name": "things"},
                {"id": 3, "name": "ball", "supercategory": "things"},
                {"id": 7, "name": "cup", "supercategory": "none"},
            ]
        ),
        "warning",
        "only parents of others",
    ),
    Case("ids with gaps from zero", categories({"id": 0, "name": "x"}, {"id": 1000, "name": "y"}), "fine"),
    Case("class name with control characters", categories({"id": 9, "name": "\x1b[2J\n"}), "fine"),
    Case("no objects at all", coco(annotations=[]), "error", "no object to train on.*2 images, 0 annotations"),
    Case(
        "nothing but crowds",
        coco(annotations=[{**a, "iscrowd": 1} for a in document()["annotations"]]),
        "error",
        "no object to train on.*2 crowd or ignored",
    ),
    Case("500 objects in an image", coco(annotations=document()["annotations"] * 250), "warning", "occur twice"),
    Case("no size", image(width=..., height=...), "fine"),
    Case("size as float", image(width=60.0), "fine"),
    Case("byte-order mark", again(lambda text: text.encode("utf-8-sig")), "fine"),
    Case("UTF-16", again(lambda text: text.encode("utf-16")), "fine"),
    Case("CRLF", again(lambda text: text.replace("\n", "\r\n").encode()), "fine"),
]

IMAGES = [
    Case("text for an image", file(lambda path: path.write_text("hello")), "error", "not a readable image"),
    Case("empty image", file(lambda path: path.touch()), "error", "not a readable image"),
    Case("cut image", file(cut), "error", "cannot be decoded"),
    Case("image bomb", file(bomb), "error", "exceeds limit|megapixels"),
    Case("text for an image, skipped", file(lambda path: path.write_text("x")), "error", "left out.*no object", "skip"),
    Case("another image cut, skipped", lambda root: other(root).write_text("x"), "warning", "left out", "skip"),
    Case("cut image, skipped", file(cut), "fine", on_error="skip"),
    Case("other size, skipped", image(width=40, height=60), "error", "left out.*no object to train on", "skip"),
    Case("pipe, skipped", file(lambda path: os.mkfifo(path)), "error", "not a regular file.*no object to", "skip"),
    Case("unknown rule for bad images", coco(), "error", "use error or skip", "ignore"),
    Case("JPEG named PNG", pixels("RGB", format="JPEG"), "fine"),
    Case("grey", pixels("L"), "fine"),
    Case("palette", pixels("P"), "fine"),
    Case("one bit", pixels("1"), "fine"),
    Case("transparent", pixels("RGBA"), "fine"),
    Case("CMYK", pixels("CMYK", format="JPEG"), "fine"),
    Case("16 bit", pixels("I;16"), "fine"),
    Case("frames", pixels("RGB", format="GIF", save_all=True, append_images=[Image.new("RGB", (60, 40))]), "fine"),
    Case("turned by its tag", file(turned), "fine"),
    Case("spoiled tags", pixels("RGB", format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff"), "fine"),
    Case("1 x 1", sized(1, 1), "warning", "outside their image"),
    Case("8000 x 4", sized(8000, 4), "warning", "outside their image"),
    Case("name that is not ASCII", image(file_name="größe 猫.png"), "error", "größe 猫"),
]

# ------------------------------------------------------------------------------------------------------------- YOLO


def yolo(rows: str | bytes = "1 0.5 0.5 0.2 0.4\n", description: str = "names: [a, b]\ntrain: train/images\n"):
    def write(root: Path) -> None:
        for i, name in enumerate(("p.png", "q.png")):
            write_image(root / "train" / "images" / name, seed=i)
        (root / "train" / "labels").mkdir()
        (root / "train" / "labels" / "p.txt").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        (root / "data.yaml").write_text(description)

    return write


def described(lines: str) -> Callable[[Path], object]:
    return yolo(description=f"names: [a, b]\ntrain: train/images\n{lines}\n")


def listing(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Images named by a text file."""

    def write(root: Path) -> None:
        yolo(description="names: [a, b]\ntrain: list.txt\n")(root)
        make(root / "list.txt")

    return write


def labels(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in place of a text file of rows."""

    def write(root: Path) -> None:
        yolo()(root)
        path = root / "train" / "labels" / "p.txt"
        path.unlink()
        make(path)

    return write


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
YOLO = [
    Case("YAML bomb", yolo(description=f"{LAUGHS}names: *a11\ntrain: train/images\n"), "error", "names is"),
    Case("YAML tag", yolo(description="names: !!python/object/apply:os.getcwd []"), "error", "not readable YAML"),
    Case("YAML date", described("made: 2026-99-99"), "error", "not readable YAML"),
    Case("YAML list", yolo(description="- a\n"), "error", "holds a list"),
    Case("names missing", yolo(description="train: train/images\n"), "error", "names is None"),
    Case("name twice", yolo(description="names: [a, a]\ntrain: train/images\n"), "error", "name twice"),
    Case("names with a gap", yolo(description="names: {0: a, 2: b}\ntrain: train/images\n"), "error", "0 .. 1"),
    Case("nc of another number", described("nc: 7"), "error", "nc is 7"),
    Case("endless keypoints", described("kpt_shape: [900000000, 3]"), "error", "kpt_shape"),
    Case("keypoints of one number", described("kpt_shape: [3, 1]"), "error", "kpt_shape"),
    Case("flip_idx of another number", described("kpt_shape: [3, 2]\nflip_idx: [0]"), "error", "flip_idx"),
    Case("class out of range", yolo("2 .5 .5 .1 .1"), "error", r"p.txt:1: class 2 is not one of 0 \.\. 1"),
    Case("pixels in place of parts", yolo("0 320 240 20 40"), "error", "p.txt:1: 320 is outside"),
    Case("not a number", yolo("0 nan .5 .1 .1"), "error", "nan is outside"),
    Case("words", yolo("cat .5 .5 .1 .1"), "error", "not a number"),
    Case("four columns", yolo("0 .5 .5 .1"), "error", "4 columns"),
    Case("even polygon", yolo("0 .1 .1 .2 .2 .3 .3 .4"), "error", "8 columns"),
    Case("bytes that are no text", yolo(b"0 \xff\xfe .5"), "error", "save it as UTF-8"),
    Case("rows in a folder", labels(lambda path: path.mkdir()), "error", "not a regular file"),
    Case("rows in a pipe", labels(lambda path: os.mkfifo(path)), "error", "not a regular file"),
    Case("rows by a dead link", labels(lambda path: path.symlink_to("nowhere")), "error", "does not exist"),
    Case("list with a missing image", listing(lambda p: p.write_text("train/images/z.png")), "error", "z.png"),
    Case("list in a pipe", listing(lambda path: os.mkfifo(path)), "error", "not a regular file"),
    Case("list that leads out", listing(lambda path: path.write_text("/etc/passwd")), "error", "outside data.root"),
    Case("list in latin-1", listing(lambda path: path.write_bytes(b"\xe9.png")), "error", "save it as UTF-8"),
    Case("empty list", listing(lambda path: path.touch()), "error", "no images"),
    Case(
        "row without area", yolo("1 .5 .5 .1 .1\n0 .5 .5 0 .1"), "warning", "without area were dropped .1.: .*p.txt:2"
    ),
    Case("validation that is not there", described("val: valid/images"), "error", "'valid/images', but there is no"),
    Case("rows with CRLF, mark and spaces", yolo("\ufeff0\t.5  .5 .1 .1\r\n\r\n"), "fine"),
    Case("no rows", yolo(""), "error", "no object to train on.*1 of 2 images have a label file"),
    Case("polygons and boxes", yolo("0 .1 .1 .5 .1 .5 .8\n1 .5 .5 .2 .4"), "fine"),
    Case("a hair outside", yolo("0 1.004 .5 .1 .1"), "fine"),
]

# -------------------------------------------------------------------------------------------------------------- VOC

THING = "<object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>{}</xmax><ymax>25</ymax></bndbox></object>"


def voc(text: str | bytes = "", xmax: str = "30", size: str = "") -> Callable[[Path], object]:
    def write(root: Path) -> None:
        write_image(root / "train" / "a.png")
        data = text or f"<annotation>{size}{THING.format(xmax)}</annotation>"
        (root / "train" / "a.xml").write_bytes(data if isinstance(data, bytes) else data.encode())

    return write


ENTITIES = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'
VOC = [
    Case("entities", voc(ENTITIES), "error", "entities"),
    Case("entities in UTF-16", voc(ENTITIES.encode("utf-16")), "error", "entities"),
    Case("no XML", voc("hello"), "error", "not readable XML"),
    Case("unknown encoding", voc(b'<?xml version="1.0" encoding="klingon"?><a/>'), "error", "not readable XML"),
    Case("corner as text", voc(xmax="wide"), "error", "object 1: its bndbox needs four numbers"),
    Case("size of another image", voc(size="<size><width>9</width><height>9</height></size>"), "error", "says 9x9"),
    Case("corner not finite", voc(xmax="nan"), "error", "not finite were dropped.*no object to train on"),
    Case("unknown size", voc(size="<size><width>0</width><height>0</height></size>"), "fine"),
    Case("VOC in UTF-16", voc(f"<annotation>{THING.format(30)}</annotation>".encode("utf-16")), "fine"),
    Case("VOC without objects", voc("<annotation/>"), "error", "no object to train on"),
]
ROOTS = [
    Case("nothing there", lambda root: None, "error", "layout is not known. Looked for.*Found: nothing"),
    Case("only images", lambda root: write_image(root / "x.png"), "error", "Found: x.png"),
    Case(
        "training file is a folder",
        lambda root: (root / "train/_annotations.coco.json").mkdir(parents=True),
        "error",
        "layout is not known",
    ),
]
CASES = [*COCO, *IMAGES, *YOLO, *VOC, *ROOTS]
