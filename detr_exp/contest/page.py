"""The page of the proof suite."""

from __future__ import annotations

from collections.abc import Sequence

from detr_exp.values import Values


def render(cells: Sequence[Values]) -> str:
    """A table of all cells, in Markdown.

    Args:
        cells: finished ones; see `cells.make`.
    """
    lines = [
        "# Proof suite",
        "",
        "| set | contender | seed | mAP | AP50 | epochs | CPU minutes |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for one in cells:
        numbers = f"{one['mAP']:.4f} | {one['AP50']:.4f} | {one['epochs']} | {one['cpu_seconds'] / 60:.1f}"
        lines.append(f"| {one['set']} | {one['contender']} | {one['seed']} | {numbers} |")
    return "\n".join(lines) + "\n"
