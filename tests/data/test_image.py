"""One rule for orientation, modes and sizes of images."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from detr_exp.data.image import pixels_of, read_image, read_size
from detr_exp.data.pixels import MAX_PIXELS

ORIENTATION = 0x0112


def rotated(path: Path, orientation: int, **settings: bool) -> np.ndarray:
    """A lossless image of 6 x 4 with an orientation tag; returns the stored pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **settings)
    return pixels


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.swapaxes(0, 1)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: np.rot90(p, 2).swapaxes(0, 1)),
        (8, lambda p: np.rot90(p)),
    ],
)
@pytest.mark.parametrize(("suffix", "settings"), [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
def test_images_are_turned_upright(tmp_path, orientation, upright, suffix, settings):
    path = tmp_path / f"x.{suffix}"
    stored = rotated(path, orientation, **settings)
    pixels = upright(stored)
    assert read_size(path) == pixels.shape[:2]
    np.testing.assert_array_equal(read_image(path), pixels)
    np.testing.assert_array_equal(read_image(path, pixels.shape[:2]), pixels)
    if orientation > 4:  # annotations of the stored image keep it as stored
        np.testing.assert_array_equal(read_image(path, stored.shape[:2]), stored)


def test_an_image_of_another_size_is_refused(tmp_path):
    rotated(tmp_path / "x.png", 1)
    with pytest.raises(ValueError, match="is 6x4 pixels but annotated as 3x2"):
        read_image(tmp_path / "x.png", (2, 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("before version 13 Pillow cannot read an uncompressed YCbCr TIFF, not even its own")
    suffix = "tif" if mode in ("CMYK", "YCbCr", "LAB", "PA", "HSV") else "png"
    image = Image.new("RGB", (5, 3), (200, 200, 200))
    image = image if mode in ("LAB", "HSV", "PA") else image.convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    found = read_image(tmp_path / f"x.{suffix}")
    assert found.shape == (3, 5, 3)
    assert found.dtype == np.uint8
    if mode != "1":
        assert abs(found.astype(int) - 200).max() <= 4


def test_sixteen_bits_are_scaled_by_their_range(tmp_path):
    ramp = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0, :, 0].tolist() == [0, 100, 255]


def test_white_may_be_zero_in_sixteen_bits(tmp_path):
    ramp = np.array([[65535, 257 * 155, 0]], np.uint16)
    for orientation, expected in ((1, [0, 100, 255]), (2, [255, 100, 0])):
        Image.fromarray(ramp).save(tmp_path / "x.tif", tiffinfo={262: 0, 274: orientation})
        assert read_image(tmp_path / "x.tif")[0, :, 0].tolist() == expected
        with Image.open(tmp_path / "x.tif") as image:
            image.load()
            assert pixels_of(image)[0, :, 0].tolist() == expected


def test_floats_are_scaled_by_their_values(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 1.0, np.nan]], np.float32)).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif")[0, :, 0].tolist() == [0, 128, 255, 128]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2)])
def test_extreme_sizes(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (*size[::-1], 3)


def test_large_photographs_are_decoded_small_enough_but_not_smaller(tmp_path):
    Image.effect_noise((1600, 1200), 50).convert("RGB").save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg", (1200, 1600), (290, 390)).shape == (300, 400, 3)
    assert read_image(tmp_path / "x.jpg", (1200, 1600), (310, 390)).shape == (600, 800, 3)
    assert read_image(tmp_path / "x.jpg", (1200, 1600), (1200, 10)).shape == (1200, 1600, 3)


def test_a_turned_photograph_is_decoded_small_enough_too(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.effect_noise((1600, 800), 50).convert("RGB").save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg", (1600, 800), (390, 190)).shape == (400, 200, 3)


@pytest.mark.parametrize("size", [(48, 64), (427, 641), (33, 17), (9, 200), (1, 1)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_photographs_have_pillows_pixels(tmp_path, size, subsampling):
    """To the bit and at every scale, or published numbers would not be comparable."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, size[0] // 6), max(2, size[1] // 6), 3), np.uint8))
    photo, path = coarse.resize(size[::-1], Image.Resampling.BICUBIC), tmp_path / "x.jpg"
    for quality, settings in ((60, {}), (95, {"progressive": True}), (90, {"restart_marker_rows": 1})):
        photo.save(path, quality=quality, subsampling=subsampling, **settings)
        for scale in (scale for scale in (1, 2, 4, 8) if scale <= min(size)):
            smallest = (size[0] // scale, size[1] // scale)
            with Image.open(path) as expected:
                expected.draft(None, smallest[::-1])
                np.testing.assert_array_equal(read_image(path, size, smallest), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_photographs_of_other_kinds_too(tmp_path, mode, suffix):
    photo, path = Image.effect_noise((60, 40), 50).convert(mode), tmp_path / f"x.{suffix}"
    photo.save(path, format="jpeg")  # also under another name
    with Image.open(path) as expected:
        np.testing.assert_array_equal(read_image(path), np.asarray(expected.convert("RGB")))


def test_photographs_that_store_red_green_and_blue(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    photo.save(tmp_path / "x.jpg", keep_rgb=True, quality=95)
    with Image.open(tmp_path / "x.jpg") as expected:
        np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), np.asarray(expected))


def test_bytes_after_a_photograph_do_no_harm(tmp_path):
    Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / "x.jpg")
    plain = read_image(tmp_path / "x.jpg")
    with (tmp_path / "x.jpg").open("ab") as file:
        file.write(b"written by a camera")
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), plain)


def png_header(width: int, height: int) -> bytes:
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + data
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 60_000])
def test_huge_images_are_refused_by_their_header(tmp_path, side):
    (tmp_path / "x.png").write_bytes(png_header(side, side))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=r"x\.png"):
        read_image(tmp_path / "x.png")
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0broken", png_header(4, 4)])
def test_what_is_no_image_is_refused_with_its_path(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jpg"):
        read_image(tmp_path / "x.jpg")


def test_a_truncated_photograph_is_refused(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_image(tmp_path / "x.jpg")


def test_no_file_stays_open(tmp_path):
    rotated(tmp_path / "x.png", 1)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    kept = [read_image(tmp_path / "x.png") for _ in range(5)]
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert len(kept) == 5
    assert after == before
