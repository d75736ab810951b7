"""What the criterion asks of the device: operators, and transfers to the host.

python scripts/bench_criterion.py [--rounds 7] [--dry]
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from measure import Row, Section, beside, interleaved, run
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import FP32, Step, batch_of, config

from detr_exp import build
from detr_exp.matcher import hungarian

SIDE, IMAGES = 320, 2
WAITS = ("aten.item", "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal")
ALLOCATIONS = (
    *("aten.empty", "aten.zeros", "aten.ones", "aten.full", "aten.new_", "aten.arange", "aten.scalar_tensor"),
    *("aten.lift_fresh", "aten.detach"),
)
UPSTREAM = 1232
TEXT = f"""
RT-DETRv2-R18 with denoising, batch {IMAGES}: three decoder layers, the encoder, three layers of denoising queries.
Every operator is a launch on a GPU. Views and allocations are not counted; the official code dispatches {UPSTREAM}. A
transfer is a wait for the device: the costs go to the host in one copy, and nothing else asks for a value (no `item`,
`nonzero`, or index by a mask) in the forward pass and the criterion.
"""


class Operators(TorchDispatchMode):
    """Counts the operators that do something, and those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, returns = str(func), func._schema.returns
        is_view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        indices = [i for a in args if isinstance(a, (list, tuple)) for i in a if isinstance(i, torch.Tensor)]
        by_mask = name.startswith("aten.index.") and any(index.dtype == torch.bool for index in indices)
        self.waits += name.startswith(WAITS) or by_mask
        self.count += not is_view and not name.startswith(ALLOCATIONS)
        return func(*args, **(kwargs or {}))


def parts() -> tuple[Step, Step]:
    """The forward pass, and the criterion on its outputs."""
    torch.manual_seed(0)
    cfg = config(SIDE, "model=rtdetrv2", *FP32)
    network, criterion, batch = build.network(cfg).train(), build.criterion(cfg), batch_of(IMAGES, SIDE)
    pixels, targets = batch.pixels(), batch.targets
    outputs = network(pixels, targets)
    return lambda: network(pixels, targets), lambda: criterion(outputs, targets, num_boxes=len(targets))


def bench(rounds: int) -> Section:
    forward, criterion = parts()
    with Operators() as ours:
        criterion()
    with mock.patch.object(hungarian, "to_host", wraps=hungarian.to_host) as to_host, Operators() as both:
        forward()
        criterion()
    transfers = to_host.call_count + both.waits
    times = interleaved({"ours": criterion, "forward pass": forward}, rounds)
    rows = [
        Row("operators of the criterion", ours.count, gate=250, detail=f"{UPSTREAM} upstream"),
        Row("transfers to the host, forward pass and criterion", transfers, gate=1),
        beside("time of the criterion", times, peer="forward pass"),
    ]
    return Section("Criterion", rows, TEXT)


if __name__ == "__main__":
    sys.exit(run("criterion", bench, __doc__))
