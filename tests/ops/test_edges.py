"""Bins of edge distances: the published positions, the published targets, and that one is the other's inverse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detr_exp.ops.edges import boxes_from_edges, edge_positions, edges_from_boxes

# The right half, rounded, for 32 bins up to half a box: by scale.
PUBLISHED = {
    4.0: "0 .07599 .157754 .245731 .340394 .44225 .551846 .66977 .796655 .933182 1.080084 1.238149 1.408225 1.591225 "
    "1.788131 2 4",
    8.0: "0 .113264 .239356 .37973 .536003 .709976 .903654 1.119269 1.359305 1.626528 1.924018 2.255202 2.623898 "
    "3.034354 3.491299 4 8",
}


@pytest.mark.parametrize("scale", PUBLISHED)
def test_positions_are_the_published_ones(scale: float) -> None:
    positions = edge_positions(32, 0.5, scale)
    assert positions.dtype == torch.float64
    torch.testing.assert_close(
        positions[16:], torch.tensor([*map(float, PUBLISHED[scale].split())]).double(), atol=6e-7, rtol=0
    )
    base = (0.5 * scale + 1) ** (2 / 30)
    written = [
        -scale,
        *(1 - base ** (16 - n) for n in range(1, 16)),
        0,
        *(base ** (n - 16) - 1 for n in range(17, 32)),
        scale,
    ]
    torch.testing.assert_close(positions, torch.tensor(written, dtype=torch.float64), atol=1e-12, rtol=0)


@given(bins=st.integers(2, 32), bound=st.floats(0.1, 2), scale=st.floats(0.5, 16))
def test_positions_ascend_and_mirror(bins: int, bound: float, scale: float) -> None:
    positions = edge_positions(2 * bins, bound, scale)
    assert len(positions) == 2 * bins + 1
    assert (positions.diff() > 0).all()
    assert torch.equal(positions, -positions.flip(0))
    assert math.isclose(positions[-2], bound * scale)
    assert positions[-1] == 2 * bound * scale


@pytest.mark.parametrize("bins", [0, 2, 31])
def test_bins_that_do_not_mirror_are_refused(bins: int) -> None:
    with pytest.raises(ValueError, match=r"model\.num_bins=32"):
        edge_positions(bins, 0.5, 4.0)


def test_targets_are_the_published_ones() -> None:
    """A row of left edges, the right ones far enough outside that every box has a size."""
    left = torch.tensor([-9, -4, -3.9, 0, 0.05, 1.9, 2.0001, 3, 4, 5], dtype=torch.float64)
    distances = torch.stack([left, *[torch.full_like(left, 9)] * 3], -1)
    reference = torch.tensor([0.4, 0.6, 0.3, 0.2], dtype=torch.float64).expand(len(left), 4)
    boxes = boxes_from_edges(distances, reference, 4.0)
    lower, share = edges_from_boxes(boxes, reference, edge_positions(32, 0.5, 4.0), 4.0)
    bins = [0, 0, 0.05, 16, 16.65798, 30.52801, 31.00005, 31.5, 32, 32]
    assert (lower[:, 0] + share[:, 0]).tolist() == pytest.approx(bins, abs=1e-5)
    assert torch.equal(lower[:, 1:], torch.full((10, 3), 31))
    assert torch.equal(share[:, 1:], torch.ones(10, 3).double())


@given(data=st.data(), scale=st.sampled_from([4.0, 8.0]))
def test_the_two_bins_of_a_box_make_that_box(data: st.DataObject, scale: float) -> None:
    """Within the outermost positions; those beyond become the outermost."""
    sides = st.lists(st.floats(-0.45, 1.4), min_size=4, max_size=4)
    distances = torch.tensor(data.draw(sides), dtype=torch.float64) * scale
    reference = torch.tensor([0.4, 0.6, 0.3, 0.2], dtype=torch.float64)
    positions = edge_positions(32, 0.5, scale)
    lower, share = edges_from_boxes(boxes_from_edges(distances, reference, scale), reference, positions, scale)
    made = (1 - share) * positions[lower] + share * positions[lower + 1]
    torch.testing.assert_close(made, distances.clamp(-scale, scale), atol=1e-6, rtol=0)
    assert not made.requires_grad


def test_no_gradient_reaches_the_targets() -> None:
    reference = torch.tensor([0.5, 0.5, 0.2, 0.2], requires_grad=True)
    lower, share = edges_from_boxes(reference * 1.1, reference, edge_positions(32, 0.5, 4.0), 4.0)
    assert not share.requires_grad
    assert not lower.is_floating_point()


def test_boxes_are_those_of_the_written_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    reference = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    x, y, width, height = reference.unbind(-1)
    left, top, right, bottom = (2 + distances).unbind(-1)
    low = torch.stack([x - left * width / 4, y - top * height / 4], -1)
    high = torch.stack([x + right * width / 4, y + bottom * height / 4], -1)
    made = boxes_from_edges(distances, reference, 4.0)
    torch.testing.assert_close(made, torch.cat([(low + high) / 2, high - low], -1), atol=1e-12, rtol=0)
