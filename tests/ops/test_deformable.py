"""Deformable sampling against a loop written for reading, and against itself in its other form."""

import math

import pytest
import torch

from detr_exp.ops import deformable
from detr_exp.ops.deformable import deformable_sample, sample_by_grid, sample_by_rows

SHAPES = [(5, 7), (3, 4), (1, 2), (1, 1)]
POINTS = [2, 3, 1, 2]


def inputs(shapes=SHAPES, points=POINTS, batch=2, queries=5, heads=3, width=4, dtype=torch.float64, margin=0.4):
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in shapes)
    value = torch.randn(batch, cells, heads, width, generator=generator, dtype=dtype)
    span = (batch, queries, heads, sum(points))
    locations = torch.rand(*span, 2, generator=generator, dtype=dtype) * (1 + 2 * margin) - margin
    weights = torch.rand(*span, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def one_by_one(value, shapes, locations, weights, points, method):
    """The definition, one point after another."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    out = value.new_zeros(batch, queries, heads, width)
    level_of = [level for level, count in enumerate(points) for _ in range(count)]
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                for p, level in enumerate(level_of):
                    (h, w), start = shapes[level], starts[level]
                    x, y = locations[b, q, head, p].tolist()
                    if method == "discrete":
                        column = min(max(math.trunc(x * w + 0.5), 0), w - 1)
                        line = min(max(math.trunc(y * h + 0.5), 0), h - 1)
                        corners = [(column, line, 1.0)]
                    else:
                        left, top = math.floor(x * w - 0.5), math.floor(y * h - 0.5)
                        dx, dy = x * w - 0.5 - left, y * h - 0.5 - top
                        corners = [
                            (left + i, top + j, (dx if i else 1 - dx) * (dy if j else 1 - dy))
                            for i in (0, 1)
                            for j in (0, 1)
                        ]
                    for column, line, share in corners:
                        if 0 <= column < w and 0 <= line < h:
                            row = value[b, start + line * w + column, head]
                            out[b, q, head] += weights[b, q, head, p] * share * row
    return out.flatten(2)


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_equals_the_definition_on_rectangles_with_points_outside(method):
    value, locations, weights = (tensor.detach() for tensor in inputs())
    expected = one_by_one(value, SHAPES, locations, weights, POINTS, method)
    sampled = deformable_sample(value, SHAPES, locations, weights, POINTS, method)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sample", [sample_by_grid, sample_by_rows])
def test_gradients(sample):
    value, locations, weights = inputs(batch=1, queries=3, heads=2, width=2)
    assert torch.autograd.gradcheck(lambda v, x, w: sample(v, SHAPES, x, w, POINTS), (value, locations, weights))


def test_discrete_gradients_reach_value_and_weights_but_not_locations():
    value, locations, weights = inputs(batch=1, queries=3, heads=2, width=2)

    def sample(v, w):
        return deformable_sample(v, SHAPES, locations, w, POINTS, "discrete")

    assert torch.autograd.gradcheck(sample, (value, weights))
    sample(value, weights).sum().backward()
    assert locations.grad is None


def test_both_forms_agree_where_locations_fall_exactly_on_cells():
    """Cell centres and borders are where a floor can go either way; powers of two keep the arithmetic exact."""
    shapes, points = [(4, 8)], [4]
    value, _, weights = inputs(shapes, points, batch=1, queries=6, heads=1)
    steps = torch.arange(24, dtype=torch.float64).view(1, 6, 1, 4)
    locations = torch.stack([(steps % 17) / 16, (steps % 9) / 8], dim=-1).requires_grad_()
    results = []
    for sample in (sample_by_grid, sample_by_rows):
        out = sample(value, shapes, locations, weights, points)
        results.append((out, *torch.autograd.grad(out.square().sum(), (value, locations, weights))))
    for by_grid, by_rows in zip(*results):
        torch.testing.assert_close(by_rows, by_grid, rtol=0, atol=1e-12)


def test_half_precision_stays_close_to_float32():
    value, locations, weights = (tensor.detach().float() for tensor in inputs())
    exact = deformable_sample(value, SHAPES, locations, weights, POINTS)
    rounded = deformable_sample(value.bfloat16(), SHAPES, locations, weights, POINTS)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_a_location_that_is_not_a_number_harms_only_itself(method):
    value, locations, weights = (tensor.detach() for tensor in inputs())
    expected = deformable_sample(value, SHAPES, locations, weights, POINTS, method)
    locations[0, 0, 0, 0] = torch.tensor([math.nan, math.inf])
    sampled = deformable_sample(value, SHAPES, locations, weights, POINTS, method)
    torch.testing.assert_close(sampled[:, 1:], expected[:, 1:], rtol=0, atol=0)


def test_few_points_with_gradients_go_through_the_grid(monkeypatch):
    called = []
    monkeypatch.setattr(deformable, "sample_by_rows", lambda *args: called.append("rows"))
    monkeypatch.setattr(deformable, "sample_by_grid", lambda *args: called.append("grid"))
    for width, points, grad in [(32, [4, 4, 4], True), (16, [2], True), (16, [2], False)]:
        value, locations, weights = inputs([(2, 2)] * len(points), points, width=width)
        with torch.set_grad_enabled(grad):
            deformable_sample(value, [(2, 2)] * len(points), locations, weights, points)
    assert called == ["rows", "grid", "rows"]


def test_unknown_method_names_the_known_ones():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match=r"'cubic'.*bilinear, discrete"):
        deformable_sample(value, SHAPES, locations, weights, POINTS, "cubic")
