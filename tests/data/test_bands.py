"""Files of any number of channels: TIFFs in every arrangement, and NumPy files."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_exp.data import bands
from detr_exp.data.image import ImageError, read_image, read_size, refuse_size


def tiff(values: np.ndarray, *, apart: bool = False, packed: bool = False, tile: int | None = None) -> bytes:
    """A TIFF of `[H, W, C]` values, as programs for satellite images write it."""
    height, width, count = values.shape
    parts = [values[..., i : i + 1] for i in range(count)] if apart else [values]
    if tile is not None:
        down, across = (-(-side // tile) * tile for side in (height, width))
        parts = [np.pad(part, ((0, down - height), (0, across - width), (0, 0))) for part in parts]
        parts = [
            part[y : y + tile, x : x + tile]
            for part in parts
            for y in range(0, down, tile)
            for x in range(0, across, tile)
        ]
    data = [zlib.compress(part.tobytes()) if packed else part.tobytes() for part in parts]
    out = bytearray(b"II*\0\0\0\0\0")
    offsets = []
    for one in data:
        offsets.append(len(out))
        out += one + bytes(len(one) % 2)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags: dict[int, Sequence[int]] = {256: [width], 257: [height], 258: [8 * values.itemsize] * count, 262: [1]}
    tags |= {259: [8 if packed else 1], 277: [count], 284: [2 if apart else 1], 339: [kind] * count}
    lengths = [len(one) for one in data]
    if tile is None:
        tags |= {273: offsets, 278: [height], 279: lengths}
    else:
        tags |= {322: [tile], 323: [tile], 324: offsets, 325: lengths}
    struct.pack_into("<I", out, 4, len(out))
    return bytes(out) + bands._directory(tags, len(out), "<")


def noise(channels: int, kind: type = np.uint8) -> np.ndarray:
    values = np.random.default_rng(channels).random((20, 37, channels))
    return values.astype(kind) if kind is np.float32 else (values * 255).astype(kind)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
def test_every_arrangement_of_a_tiff_is_read(channels: int, kind: type) -> None:
    values = noise(channels, kind)
    for arrangement in ({}, {"apart": True}, {"packed": True}, {"tile": 16}, {"tile": 16, "apart": True}):
        content = tiff(values, **arrangement)
        assert bands.shape_of(content) == values.shape
        np.testing.assert_array_equal(bands.read(content), values)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_compressions_and_differences(compression: str, predictor: int) -> None:
    values, file = noise(4), io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", compression=compression, tiffinfo={317: predictor})
    np.testing.assert_array_equal(bands.read(file.getvalue()), values)


def test_pages_of_one_band_are_channels(tmp_path: Path) -> None:
    """As OpenCV writes several bands (`imwritemulti`); for colours the first page is the image, as before."""
    values = noise(5)
    pages = [Image.fromarray(values[..., i]) for i in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", channels=5), values)
    refuse_size(tmp_path / "a.tif", (20, 37), 5)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), values[..., :1].repeat(3, 2))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", channels=1), values[..., :1])
    with pytest.raises(ImageError, match=r"has 5 channels, but data\.channels is 4"):
        read_image(tmp_path / "a.tif", channels=4)
    pages[1] = pages[1].resize((9, 9))  # a thumbnail
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match=r"has 1 channels, but data\.channels is 5"):
        read_image(tmp_path / "b.tif", channels=5)


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_files_become_bytes_in_their_channels(tmp_path: Path, channels: int) -> None:
    values = noise(channels)
    (tmp_path / "a.tif").write_bytes(tiff(values))
    np.save(tmp_path / "b.npy", values)
    np.save(tmp_path / "first.npy", np.moveaxis(values, -1, 0))
    (tmp_path / "deep.tif").write_bytes(tiff(values.astype(np.uint16) * 257))
    np.save(tmp_path / "float.npy", values.astype(np.float32) / 255)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_image(path, channels=channels), values, err_msg=path.name)
        np.testing.assert_array_equal(read_image(path.read_bytes(), (20, 37), channels=channels), values)
        assert read_size(path) == (20, 37)
        refuse_size(path, (20, 37), channels)


def test_colours_and_grey_become_each_other_and_nothing_else_is_guessed(tmp_path: Path) -> None:
    colours = noise(3)
    Image.fromarray(colours).save(tmp_path / "a.png")
    np.save(tmp_path / "grey.npy", colours[..., :1])
    grey = read_image(tmp_path / "a.png", channels=1)
    assert grey.shape == (20, 37, 1)
    np.testing.assert_allclose(grey[..., 0], colours @ [0.299, 0.587, 0.114], atol=1)
    flat = np.repeat(colours[..., :1], 3, 2)
    Image.fromarray(flat).save(tmp_path / "flat.png")
    np.testing.assert_array_equal(read_image(tmp_path / "flat.png", channels=1), flat[..., :1])
    np.testing.assert_array_equal(read_image(tmp_path / "grey.npy"), flat)
    four = noise(4)
    Image.fromarray(four).save(tmp_path / "four.png")
    np.testing.assert_array_equal(read_image(tmp_path / "four.png", channels=4), four)
    np.testing.assert_array_equal(read_image(tmp_path / "four.png"), four[..., :3])
    (tmp_path / "eight.tif").write_bytes(tiff(noise(8)))
    for name, channels, found in (("a.png", 4, 3), ("grey.npy", 4, 1), ("eight.tif", 3, 8), ("eight.tif", 4, 8)):
        said = rf"has {found} channels, but data\.channels is {channels}; .* data\.channels={found}"
        with pytest.raises(ImageError, match=said):
            read_image(tmp_path / name, channels=channels)
        with pytest.raises(ImageError, match=said):
            refuse_size(tmp_path / name, (20, 37), channels)


def test_damaged_and_unknown_files_are_refused(tmp_path: Path) -> None:
    content = tiff(noise(5), packed=True)
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_image(content.replace(content[20:60], bytes(40)), channels=5)
    with pytest.raises(ImageError, match=r"cannot be decoded|not a readable image"):
        read_image(content[: len(content) // 2], channels=5)
    np.save(tmp_path / "object.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ImageError):
        read_image(tmp_path / "object.npy", channels=4)
    np.save(tmp_path / "range.npy", noise(4).astype(np.float32))
    with pytest.raises(ImageError, match=r"in 0\.\.1"):
        read_image(tmp_path / "range.npy", channels=4)
    with pytest.raises(ImageError, match="annotated as 5x5"):
        read_image(content, (5, 5), channels=5)
