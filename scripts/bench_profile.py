"""What remains of a training step, beside what this machine's matrix products and convolutions reach.

python scripts/bench_profile.py [--rounds 5] [--dry]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import torch
from measure import Row, Section, interleaved, is_of_the_newer_gates, run, table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from training_step import Step, batch_of, config, ours

from detr_exp.ops import products
from detr_exp.trainer.hardware import cpu_has_bf16

IMAGES, SHOWN = 2, 12
STEPS = (
    ("RT-DETRv2-R18, 320 px", 320, ("model=rtdetrv2",)),
    ("RF-DETR Nano, 384 px", 384, ("model=rfdetr", "loss=ia_bce")),
)
# kernel, channels, side of the map
CONVOLUTIONS = ((3, 256, 40), (3, 64, 160), (1, 256, 80))
DTYPES = {"fp32": torch.float32, **({"bf16": torch.bfloat16} if cpu_has_bf16() else {})}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
TEXT = f"""
The ratios are those of a float32 step (batch {IMAGES}) to the time its products and convolutions would take at the
highest fp32 rate below; what lies above 1 is what could be gained at most. Operators with less than the last share are
left out; a backward operator is counted by its own name.
"""


class Work(TorchDispatchMode):
    """Counts what products and convolutions take, in FLOP. Torch's own counter also names the modules, by hooks that
    fail where nothing of a module is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if func is torch.ops.mkldnn._linear_pointwise.default:  # which torch does not count
            self.total += 2 * args[0].numel() * args[1].shape[0]
        elif count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


def ceilings(rounds: int) -> tuple[str, dict[str, float]]:
    """A table of GFLOP/s, one thread, and the highest rate of each type in FLOP/s."""
    calls: dict[str, Callable[[], object]] = {}
    work: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        a, b = torch.randn(1600, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        calls[f"matmul {name}"] = lambda a=a, b=b: a @ b
        work[f"matmul {name}"] = 2 * 1600 * 1024 * 1024
        calls[f"onednn {name}"] = lambda a=a, b=b: products.linear(a, b, None)
        work[f"onednn {name}"] = work[f"matmul {name}"]
        for kernel, channels, side in CONVOLUTIONS:
            for layout, memory_format in LAYOUTS.items():
                conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False).to(dtype)
                conv = conv.to(memory_format=memory_format)
                x = torch.randn(1, channels, side, side, dtype=dtype).to(memory_format=memory_format)
                label = f"{kernel}{channels}{side}{layout} {name}"
                calls[label] = lambda conv=conv, x=x: conv(x)
                work[label] = 2 * (kernel * channels * side) ** 2
    with torch.no_grad():
        seconds = {name: median(times) for name, times in interleaved(calls, rounds, warmup=2).items()}
    rate = {name: f"{work[name] / seconds[name] / 1e9:.0f}" for name in calls}
    rows = [
        ["matrix product 1600 x 1024 x 1024", *(rate[f"matmul {name}"] for name in DTYPES)],
        ["the same by `ops/products.py`", *(rate[f"onednn {name}"] for name in DTYPES)],
    ]
    for kernel, channels, side in CONVOLUTIONS:
        for layout in LAYOUTS:
            label = f"{kernel}{channels}{side}{layout}"
            name = f"convolution {kernel}x{kernel}, {channels} channels, {side} x {side}, {layout}"
            rows.append([name, *(rate[f"{label} {dtype}"] for dtype in DTYPES)])
    highest = {kind: max(work[name] / seconds[name] for name in calls if name.endswith(kind)) for kind in DTYPES}
    return table(["GFLOP/s", *DTYPES], rows), highest


def shares(step: Step) -> list[tuple[str, float]]:
    """Operators by their own share of a step's CPU time."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    events = found.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    ranked = sorted(events, key=lambda event: -event.self_cpu_time_total)
    return [(event.key.removeprefix("aten::"), event.self_cpu_time_total / total) for event in ranked[:SHOWN]]


def bench(rounds: int) -> Section:
    ceiling, rates = ceilings(rounds)
    rows, columns = [], []
    gate = 1.9 if is_of_the_newer_gates() else None
    for name, side, words in STEPS:
        step = ours(batch_of(IMAGES, side), config(side, *words, "trainer.hardware.amp=null"))
        seconds = median(interleaved({"step": step}, rounds, warmup=2)["step"])
        with Work() as counted:
            step()
        work = counted.total
        detail = f"{work / 1e9:.0f} GFLOP in {seconds * 1e3:.0f} ms"
        rows.append(
            Row(
                f"{name}, float32",
                seconds * rates["fp32"] / work,
                "its products at full rate",
                gate=gate,
                detail=detail,
            )
        )
        columns.append([f"{operator} {share:.1%}" for operator, share in shares(step)])
    profiles = table([name for name, *_ in STEPS], list(zip(*columns)))
    return Section("What remains", rows, f"{TEXT}\n{profiles}\n{ceiling}")


if __name__ == "__main__":
    sys.exit(run("profile", bench, __doc__, rounds=5))
