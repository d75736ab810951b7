"""Recognise the layout of a data set from its folder."""

from __future__ import annotations

from collections.abc import Sequence

from detr_exp.data import coco, voc, yolo
from detr_exp.data.content import SPLITS, Content
from detr_exp.data.files import Folder
from detr_exp.values import Values


def auto(root: str | None, places: Values, *, extra_roots: Sequence[str] = (), on_error: str = "error") -> Content:
    """Recognise the layout of `root` and read it, as a source for `DataSet`.

    Args:
        root: folder of the data set.
        places: has to be empty: the layout defines where the splits are.
        extra_roots: further folders that may contain images.
        on_error: `error`, or `skip` for images that are missing or have no readable header.

    Raises:
        ValueError: places are given, or no layout is recognised; the message lists what was searched and what is there.
    """
    if named := [name for name in SPLITS if places.get(name)]:
        raise ValueError(
            f"data.{named[0]} is {places[named[0]]!r}, but data=auto finds the splits itself; "
            "leave it out, or choose the layout: data=coco"
        )
    folder = Folder(root, extra_roots)
    if coco.find_layout(folder.root):
        return coco.coco(root, {name: {} for name in SPLITS}, extra_roots=extra_roots, on_error=on_error)
    if yolo.find_file(folder.root):
        return yolo.yolo(root, {}, extra_roots=extra_roots, on_error=on_error)
    if voc.find_layout(folder.root):
        return voc.voc(root, {}, extra_roots=extra_roots, on_error=on_error)
    raise ValueError(
        f"data.root is {str(root)!r}, whose layout is not known. Looked for: train/{coco.ROBOFLOW} and "
        f"annotations/instances_train*.json (COCO), {' or '.join(yolo.FILES)} (YOLO), ImageSets/Main and "
        f"train/*.xml (Pascal VOC). Found: {folder.names()}. Choose the folder above or below, or "
        "name the files: data=coco data.train.annotations=... data.train.images=... or data=yolo data.source.file=...; "
        "YOLO labels that come with classes.txt or obj.names need a data.yaml with names: [...], train: and val:"
    )
