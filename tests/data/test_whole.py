"""Damaged files are distinguished from flat and padded ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from detr_exp.data.image import ImageError, read_image
from detr_exp.data.whole import is_cut_short

KINDS = [
    ("JPEG", {"quality": 90}),
    ("JPEG", {"quality": 75, "optimize": True}),
    ("JPEG", {"quality": 90, "progressive": True}),
    ("JPEG", {"quality": 90, "restart_marker_rows": 1}),
    ("PNG", {}),
    ("WEBP", {"quality": 80}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {"compression": "packbits"}),
    ("TIFF", {"compression": "jpeg"}),
    ("TIFF", {"compression": "tiff_deflate"}),
]


def saved(image: Image.Image, kind: str, settings: dict) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def textured(noise: bool = True) -> Image.Image:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (100, 120, 3) if noise else (10, 12, 3), dtype=np.uint8))
    return image if noise else image.resize((300, 240))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_half_a_file_is_damaged(kind, settings, noise):
    content = saved(textured(noise), kind, settings)
    half = len(content) // 2
    for spoiled in (content[:half], content[:half] + bytes(len(content) - half)):
        with pytest.raises(ImageError):
            read_image(spoiled)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("trailer", [bytes(4096), b"\0" * 100 + b"SEFT", b"\0" * 80 + b"\xff\xd9"])
def test_bytes_behind_an_image_do_no_harm(kind, settings, trailer):
    content = saved(textured(), kind, settings)
    np.testing.assert_array_equal(read_image(content + trailer), read_image(content))


@pytest.mark.parametrize(("kind", "settings"), [*KINDS, ("WEBP", {"quality": 100, "method": 0})])
@pytest.mark.parametrize("level", [0, 90, 255])
def test_flat_images_are_whole(kind, settings, level):
    flat = np.full((700, 900, 3), level, np.uint8)
    assert abs(read_image(saved(Image.fromarray(flat), kind, settings)).astype(int) - level).max() <= 2
    flat[:100, :120] = np.asarray(textured())  # and those with a flat border
    assert read_image(saved(Image.fromarray(flat), kind, settings)).shape == flat.shape


@pytest.mark.parametrize("progressive", [False, True])
def test_zeros_inside_a_photograph(progressive):
    content = saved(textured(noise=progressive), "JPEG", {"quality": 90, "progressive": progressive})
    third = len(content) // 3
    with pytest.raises(ImageError, match="nothing but zeros"):
        read_image(content[:third] + bytes(third) + content[2 * third :])


def test_a_photograph_that_ends_without_its_mark_is_left_to_pillow():
    content = saved(textured(), "JPEG", {"quality": 90})
    assert content.endswith(b"\xff\xd9")
    without = content[:-2] + b"some camera's words"
    with Image.open(io.BytesIO(without)) as image:
        np.testing.assert_array_equal(read_image(without), np.asarray(image))


def test_videos_that_are_shorter_than_they_say():
    box = (24).to_bytes(4, "big") + b"ftyp" + bytes(16)
    for last in (
        (16).to_bytes(4, "big") + b"mdat" + bytes(8),
        (1).to_bytes(4, "big") + b"mdat" + (24).to_bytes(8, "big") + bytes(8),
    ):
        assert not is_cut_short(io.BytesIO(box + last))
        assert not is_cut_short(io.BytesIO(box + last + bytes(99)))
        assert is_cut_short(io.BytesIO((box + last)[:-1]))
    riff = b"RIFF" + (20).to_bytes(4, "little") + b"AVI " + bytes(16)
    assert not is_cut_short(io.BytesIO(riff))
    assert is_cut_short(io.BytesIO(riff[:-1]))
    assert not is_cut_short(io.BytesIO(b"\x1a\x45\xdf\xa3" + bytes(30)))
