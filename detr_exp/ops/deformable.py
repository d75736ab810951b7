"""Multi-scale deformable sampling: the core of deformable attention.

Legend: B images, S cells of all levels, Q queries, H heads, P points of all levels, D width.

For every query and head the result is a sparse weighted sum of rows of the value map,
`out[b, q, h] = sum_p weight[b, q, h, p] * value_h(location[b, q, h, p])` (Deformable DETR, eq. 3; RT-DETRv2 allows
another number of points on every level). Bilinear interpolation reads four rows per point. `embedding_bag` computes
such sums: on the value in the layout of its projection, for all levels in one call, and on CPU several times faster
than `grid_sample`, which is used on other devices, in exports and where it is faster.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_exp.ops.transfer import filled

Shapes = list[tuple[int, int]]

METHODS = ("bilinear", "discrete")


def deformable_sample(
    value: Tensor,
    spatial_shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    points_per_level: list[int],
    method: str = "bilinear",
) -> Tensor:
    """Weighted sum of the values sampled at `locations`.

    Args:
        value: `[B, S, H, D / H]`, the cells of all levels one after another, each level row by row.
        spatial_shapes: (height, width) of each level; their areas add up to S.
        locations: `[B, Q, H, P, 2]` (x, y) in 0..1 of the image, points level by level; outside the map the value
            is zero (bilinear) or that of the nearest cell (discrete).
        weights: `[B, Q, H, P]`.
        points_per_level: points on each level; they add up to P.
        method: "bilinear", where the centre of cell i lies at (i + 0.5) / size, or "discrete", which reads the single
            cell `trunc(location * size + 0.5)`; then locations have no gradient.

    Returns:
        `[B, Q, D]`, heads side by side.
    """
    if method not in METHODS:
        raise ValueError(f"unknown sampling method {method!r}; use one of {', '.join(METHODS)}")
    if method == "discrete":
        return sample_nearest(value, spatial_shapes, locations, weights, points_per_level)
    if _rows_pay(value, locations):
        return sample_by_rows(value, spatial_shapes, locations, weights, points_per_level)
    return sample_by_grid(value, spatial_shapes, locations, weights, points_per_level)


def _rows_pay(value: Tensor, locations: Tensor) -> bool:
    """Whether summing rows is faster than `grid_sample`, as measured on CPU: in the forward pass always, in the
    backward pass unless there are few points."""
    needs_grad = torch.is_grad_enabled() and (value.requires_grad or locations.requires_grad)
    return _bags_are_native(value) and (not needs_grad or value.shape[-1] * locations.shape[-2] >= 128)


def _bags_are_native(value: Tensor) -> bool:
    """Whether to use `embedding_bag`: it is vectorised on CPU, but cannot be exported."""
    return value.device.type == "cpu" and not _exporting()


def _exporting() -> bool:
    return torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def sample_by_grid(
    value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor, points_per_level: list[int]
) -> Tensor:
    """Bilinear `deformable_sample` as one `grid_sample` per level."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    dtype = torch.promote_types(value.dtype, locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in spatial_shapes], dim=-1)
    grids = (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1).split(points_per_level, dim=-2)
    sampled = [
        F.grid_sample(level.unflatten(-1, shape), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for level, grid, shape in zip(maps, grids, spatial_shapes)
    ]
    by_head = weights.to(dtype).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    summed = (torch.cat(sampled, dim=-1) * by_head).sum(-1)
    return summed.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


def sample_by_rows(
    value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor, points_per_level: list[int]
) -> Tensor:
    """Bilinear `deformable_sample` as sums of the four rows around each point."""
    batch, queries, heads, points = weights.shape
    layout = _layout(spatial_shapes, points_per_level, heads, locations.dtype, value.device)
    summed = _BilinearRows.apply(
        value.reshape(-1, value.shape[-1]),
        locations.reshape(batch * queries, heads * points, 2),
        weights.to(locations.dtype).reshape(batch * queries, heads * points),
        _first_rows(value, queries),
        layout,
    )
    return summed.view(batch, queries, -1)


def sample_nearest(
    value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor, points_per_level: list[int]
) -> Tensor:
    """Discrete `deformable_sample`; each axis is clamped by its own size."""
    batch, queries, heads, points = weights.shape
    layout = _layout(spatial_shapes, points_per_level, heads, locations.dtype, value.device)
    location = locations.detach().reshape(batch * queries, heads * points, 2)
    x = _on_map((location[..., 0] * layout.width + 0.5).trunc(), layout.width - 1)
    y = _on_map((location[..., 1] * layout.height + 0.5).trunc(), layout.height - 1)
    rows = (_rows(x, y, layout) + _first_rows(value, queries)).view(-1, points)
    shares = weights.to(value.dtype).reshape(-1, points)
    table = value.reshape(-1, value.shape[-1])
    if _bags_are_native(value):
        summed = F.embedding_bag(rows, table, mode="sum", per_sample_weights=shares)
    else:
        summed = (table[rows.long()] * shares[..., None]).sum(-2)
    return summed.view(batch, queries, -1)


class _Layout(NamedTuple):
    """Properties of the level of every point, for all heads: `[H * P]` each."""

    width: Tensor  # cells in a row
    height: Tensor
    last_x: Tensor  # the last cell that has a right neighbour
    last_y: Tensor
    has_x: Tensor  # 1 where the level has a second column, else 0
    has_y: Tensor
    first: Tensor  # table row of the level's first cell, int32
    below: Tensor  # table rows from a cell to the one below it, int32
    heads: int  # table rows from a cell to its right neighbour


class _BilinearRows(torch.autograd.Function):
    """Sum of the four rows around each point, weighted; `[B * Q * H, D / H]`.

    One autograd function, which saves a few tensors instead of those of forty operations. The backward pass consists of
    row sums as well: the table's gradient sums rows of the output's gradient, sorted by the row that was read; those of
    weights and locations are inner products of the output's gradient with a sum of four rows per point.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, locations: Tensor, weights: Tensor, first_rows: Tensor, layout: _Layout
    ) -> Tensor:
        x, dx = _cell(locations[..., 0] * layout.width - 0.5, layout.last_x)
        y, dy = _cell(locations[..., 1] * layout.height - 0.5, layout.last_y)
        row = _rows(x, y, layout) + first_rows
        right = layout.has_x.to(torch.int32) * layout.heads
        below = row + layout.has_y.to(torch.int32) * layout.below
        rows = torch.stack([row, row + right, below, below + right], dim=-1)
        shares_x, shares_y = _shares(dx, layout.has_x), _shares(dy, layout.has_y)
        factors = _corners(shares_x, [weights * share for share in shares_y]).to(table.dtype)
        ctx.layout = layout
        ctx.save_for_backward(table, rows, factors, weights, dx, dy)
        bags = (weights.shape[0] * layout.heads, -1)
        return F.embedding_bag(rows.view(bags), table, mode="sum", per_sample_weights=factors.view(bags))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, rows, factors, weights, dx, dy = ctx.saved_tensors
        layout = ctx.layout
        grad = grad.contiguous()
        bags, points = len(grad), rows[0].numel() // 4 // layout.heads
        shares_x, shares_y = _shares(dx, layout.has_x), _shares(dy, layout.has_y)

        def along(share_x: list[Tensor], share_y: list[Tensor]) -> Tensor:
            corners = _corners(share_x, share_y).to(table.dtype).view(-1, 4)
            summed = F.embedding_bag(rows.view(-1, 4), table, mode="sum", per_sample_weights=corners)
            products = torch.bmm(summed.view(bags, points, -1), grad[..., None])
            return products.view(weights.shape).to(weights.dtype)

        grad_weights = along(shares_x, shares_y)
        grad_x = along(_slopes(dx, layout.has_x), shares_y) * weights * layout.width
        grad_y = along(shares_x, _slopes(dy, layout.has_y)) * weights * layout.height
        grad_table = _sum_by_row(grad, rows.view(bags, -1), factors.view(bags, -1), len(table))
        return grad_table, torch.stack([grad_x, grad_y], dim=-1), grad_weights, None, None


def _cell(position: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The lower of the two cells around a position, clamped to the map, and the distance from it (in cells)."""
    cell = _on_map(position.floor(), last)
    return cell, position - cell


def _on_map(cell: Tensor, last: Tensor) -> Tensor:
    """Cells of an axis, clamped to 0 .. `last`.

    fmax and fmin drop NaN: a non-finite location must not become a row outside the table. They cannot be
    exported.
    """
    if _exporting():
        return torch.minimum(cell.clamp(min=0), last)
    return cell.fmax(torch.zeros_like(last)).fmin(last)


def _shares(distance: Tensor, has_neighbour: Tensor) -> list[Tensor]:
    """Weights of the lower and the upper cell: a hat function of the distance, which is zero outside the map."""
    return [(1 - distance.abs()).clamp_(min=0), (has_neighbour - (distance - 1).abs()).clamp_(min=0)]


def _slopes(distance: Tensor, has_neighbour: Tensor) -> list[Tensor]:
    """Derivatives of `_shares` by the distance; right-hand ones at discontinuities."""
    sign = torch.where(distance < 0, 1.0, -1.0)
    lower = torch.where((distance >= -1) & (distance < 1), sign, 0)
    upper = torch.where((distance >= 0) & (distance < 2), torch.where(distance < 1, 1.0, -1.0), 0)
    return [lower.to(distance.dtype), upper.to(distance.dtype) * has_neighbour]


def _corners(share_x: list[Tensor], share_y: list[Tensor]) -> Tensor:
    """Products of the shares of (left, right) and (top, bottom), in the order of the rows: `[..., 4]`."""
    return torch.stack([y * x for y in share_y for x in share_x], dim=-1)


def _sum_by_row(grad: Tensor, rows: Tensor, factors: Tensor, num_rows: int) -> Tensor:
    """`out[rows[n, k]] += factors[n, k] * grad[n]` for all n and k; `[num_rows, D]`."""
    flat = rows.flatten()
    ordered = flat.sort(stable=True).indices
    counts = torch.zeros(num_rows + 1, dtype=torch.int32, device=rows.device)
    counts.index_add_(0, flat + 1, torch.ones_like(flat))
    offsets = counts.cumsum(0, dtype=torch.int32)
    bag = torch.div(ordered, rows.shape[1], rounding_mode="floor").to(torch.int32)
    factor = factors.flatten().index_select(0, ordered)
    return F.embedding_bag(bag, grad, offsets, mode="sum", per_sample_weights=factor, include_last_offset=True)


def _rows(x: Tensor, y: Tensor, layout: _Layout) -> Tensor:
    """Table rows of the cells (x, y) of the first image; int32."""
    return y.to(torch.int32) * layout.below + x.to(torch.int32) * layout.heads + layout.first


def _first_rows(value: Tensor, queries: int) -> Tensor:
    """Table row at which the image of each query begins: `[B * Q, 1]` int32."""
    batch, cells, heads, _ = value.shape
    images = torch.arange(batch, dtype=torch.int32, device=value.device) * (cells * heads)
    return images.repeat_interleave(queries, output_size=batch * queries)[:, None]


def _layout(shapes: Shapes, points: list[int], heads: int, dtype: torch.dtype, device: torch.device) -> _Layout:
    # Cached: every one of these numbers is a call for the device.
    build = _build_layout if torch.compiler.is_compiling() else _cached_layout
    return build(tuple(shapes), tuple(points), heads, dtype, device)


def _build_layout(
    shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], heads: int, dtype: torch.dtype, device: torch.device
) -> _Layout:
    columns: list[Tensor] = []
    first = 0
    for (height, width), count in zip(shapes, points):
        level = (width, height, max(width - 2, 0), max(height - 2, 0), int(width > 1), int(height > 1))
        columns.append(filled([*level, first * heads, width * heads], device)[:, None].expand(-1, count))
        first += height * width
    table = torch.cat(columns, dim=1).repeat(1, heads)
    head = torch.arange(heads, device=device).repeat_interleave(sum(points))
    width, height, last_x, last_y, has_x, has_y = table[:6].to(dtype)
    first_row, below = (table[6] + head).to(torch.int32), table[7].to(torch.int32)
    return _Layout(width, height, last_x, last_y, has_x, has_y, first_row, below, heads)


_cached_layout = lru_cache(maxsize=64)(_build_layout)
