"""Names of splits, without anything that takes long to import."""

from __future__ import annotations

HELD_OUT = "held_out"  # the half of val that chooses nothing, where `metric.honest_selection` halves it
