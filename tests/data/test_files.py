"""Folders of a data set: which files are images, and which folders are read."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from detr_exp.data.files import Folder, companion, files_below, is_image
from detr_exp.data.image import SUFFIXES

# videos, pages, measurements and drawings that Pillow knows, or only names
NO_IMAGES = {"BUFR", "EPS", "FITS", "FLI", "GBR", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def test_what_pillow_opens_counts_as_an_image():
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    others = {suffix for suffix in known if Image.registered_extensions()[suffix] in NO_IMAGES}
    assert known - others <= SUFFIXES
    assert {".jpg", ".tif", ".jp2", ".gif", ".webp", ".jfif"} <= SUFFIXES


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("a.JPG", True, False),
        ("._a.jpg", False, True),
        (".a.jpg", False, False),
        (".DS_Store", False, True),
        ("a.heic", False, False),
        ("a.txt", False, True),
        ("photo", False, False),
        (".hidden.yaml", False, True),
    ],
)
def test_names(name, counts, expected):
    assert is_image(name) is counts
    assert companion(name) is expected


def test_a_folder_is_entered_once_and_by_its_own_name(tmp_path):
    for place in ("z", "a/deep"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.jpg").touch()
    (tmp_path / "b").symlink_to("z")
    (tmp_path / "z" / "round").symlink_to("..")
    (tmp_path / "dead").symlink_to("nowhere")
    found, left_out = files_below(tmp_path)
    assert sorted(os.path.relpath(file, tmp_path) for file in found) == ["a/deep/x.jpg", "dead", "z/x.jpg"]
    assert sorted(path.name for path, _ in left_out) == ["b", "round"]


def test_a_link_to_what_lies_above_is_not_entered(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "y.jpg").touch()
    (tmp_path / "set" / "images" / "up").symlink_to("../..")
    (tmp_path / "set" / "images" / "aside").symlink_to("../../other")
    (tmp_path / "set" / "images" / "itself").symlink_to("itself")
    found, left_out = files_below(tmp_path / "set" / "images")
    assert [file.name for file in found] == ["itself", "y.jpg"]
    assert [path.name for path, _ in left_out] == ["up"]


def test_an_extra_root_has_to_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"extra_roots has .*nowhere"):
        Folder(tmp_path, [str(tmp_path / "nowhere")])


def test_a_name_that_no_disk_has_is_a_folder_that_is_not_there():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="not a folder"):
            Folder(name)
