"""Sine positions."""

import math

import pytest
import torch

from detr_exp.model.layer.position import sine_position_embedding


def test_rows_come_first_and_are_the_slow_axis_of_a_rectangle():
    height, width, dim, temperature = 2, 3, 8, 100.0
    embedding = sine_position_embedding(
        height, width, dim, temperature, dtype=torch.float64, device=torch.device("cpu")
    )
    assert embedding.shape == (6, 8)
    for row in range(height):
        for column in range(width):
            speeds = [1.0, temperature**-0.5]
            expected = [f(place * speed) for place in (row, column) for f in (math.sin, math.cos) for speed in speeds]
            assert embedding[row * width + column].tolist() == pytest.approx(expected, abs=1e-12)


def test_channels_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match=r"6 channels.*multiple of 4.*model\.neck\.hidden_dim"):
        sine_position_embedding(2, 2, 6, 1e4, dtype=torch.float32, device=torch.device("cpu"))
