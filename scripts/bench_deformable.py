"""Deformable sampling beside one `grid_sample` per level, which is what every peer does.

python scripts/bench_deformable.py [--rounds 9] [--dry]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from measure import Row, Section, beside, interleaved, run

from detr_exp.ops.deformable import deformable_sample, sample_by_grid, sample_by_rows

# what, levels (height, width), points on each, images, queries, heads, width of a head; gates with and without backward
SHAPES = (
    ("RT-DETR 640 px, 500 queries", [(80, 80), (40, 40), (20, 20)], [4, 4, 4], 2, 500, 8, 32, (0.45, 0.22)),
    ("RF-DETR training, 3900 queries", [(24, 24)], [2], 2, 3900, 16, 16, (None, None)),
)
TEXT = """
The sum of bilinear samples that all decoder layers are made of. Ours adds up rows of the value map by `embedding_bag`,
in one autograd function, and takes `grid_sample` where few points make that the faster one (RF-DETR's training), so
that its ratio is 1 there. Both give the same numbers (tested in `tests/ops/test_deformable.py`, checked here).
"""


def rows_of(name, shapes, points, images, queries, heads, width, gates, rounds: int) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in shapes)
    value = torch.randn(images, cells, heads, width, generator=g, requires_grad=True)
    locations = torch.rand(images, queries, heads, sum(points), 2, generator=g, requires_grad=True)
    weights = torch.rand(images, queries, heads, sum(points), generator=g).softmax(-1).requires_grad_()
    upstream = torch.randn(images, queries, heads * width, generator=g)
    arguments = (value, shapes, locations, weights, points)

    def both(sample: Callable) -> Callable[[], None]:
        def call() -> None:
            value.grad = locations.grad = weights.grad = None
            sample(*arguments).backward(upstream)

        return call

    def forward(sample: Callable) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                sample(*arguments)

        return call

    with torch.no_grad():
        differ = not torch.allclose(sample_by_rows(*arguments), sample_by_grid(*arguments), atol=1e-4)
    fault = "other values" if differ else ""
    rows = []
    for part, made, gate in (("forward and backward", both, gates[0]), ("forward", forward, gates[1])):
        times = interleaved({"ours": made(deformable_sample), "grid_sample": made(sample_by_grid)}, rounds)
        rows.append(beside(f"{name}, {part}", times, peer="grid_sample", gate=gate, fault=fault))
    return rows


def bench(rounds: int) -> Section:
    rows = [row for shape in SHAPES for row in rows_of(*shape, rounds)]
    return Section("Deformable sampling", rows, TEXT)


if __name__ == "__main__":
    sys.exit(run("deformable", bench, __doc__, rounds=9))
