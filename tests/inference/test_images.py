"""Paths of results of images, and frames as a player shows them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from detr_exp.inference.images import _upright, result_stems


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["p/1.jpg"], ["1"]),
        (["p/a/1.jpg", "p/b/1.jpg"], ["a/1", "b/1"]),
        (["p/1.jpg", "p/1.png", "p/2.jpg"], ["1.jpg", "1.png", "2"]),
        (["p/1.jpg", "p/1.png", "p/1.jpg.png"], ["1.jpg", "1.png", "1.jpg.png"]),
        (["p/x.jpg", "p/X.jpg"], ["x.jpg", "X.jpg"]),
        (["a.b/1.jpg", "a/b/1.jpg"], ["a.b/1", "a/b/1"]),
        (["p/x.png", "p/x.jpg/1.png", "p/y.jpg", "p/y.txt/1.jpg"], ["x.png", "x.jpg/1", "y.jpg", "y.txt/1"]),
        (["p/x.png", "p/x.jpg/1.png", "p/x.png.txt/1.png"], ["x_1-2", "x.jpg/1", "x.png.txt/1"]),
        ([f"p/{'m' * 251}.jpg"], ["m" * 251]),
        ([f"p/{'m' * 251}.jpg", f"p/{'m' * 251}.png"], [f"{'m' * 200}_1-2", f"{'m' * 200}_2-2"]),
    ],
)
def test_no_two_images_share_a_result_path(paths: list[str], expected: list[str]) -> None:
    actual = result_stems([Path(path) for path in paths])
    assert actual == expected
    assert len(set(actual)) == len(actual)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_shown_as_their_matrix_says(turns: int, mirrored: bool) -> None:
    """Each pixel goes where the matrix sends it, up to the corner that is moved back to (0, 0)."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    linear = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns) @ np.diag([-1 if mirrored else 1, 1])
    (a, c), (b, d) = linear.tolist()
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], np.int32)
    frame = SimpleNamespace(to_ndarray=lambda format: pixels, side_data={"DISPLAYMATRIX": matrix.tobytes()})
    shown = _upright(frame)
    ys, xs = np.indices(pixels.shape[:2])
    moved = linear @ np.stack([xs.ravel(), ys.ravel()])
    moved -= moved.min(1, keepdims=True)
    expected = np.zeros_like(shown)
    expected[moved[1], moved[0]] = pixels.reshape(-1, 3)
    assert np.array_equal(shown, expected)
