"""Gradient checkpointing of backbone and encoder: the memory it saves and the time it costs.

python scripts/bench_checkpointing.py [--rounds 3] [--dry]
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from measure import Row, Section, beside, interleaved, run
from training_step import FP32, batch_of, config, ours

from detr_exp import build
from detr_exp.trainer.memory import saved_bytes

# name, words, side in pixels, images
NETWORKS = (
    ("RT-DETRv2-R18, 320 px, batch 4", ("model=rtdetrv2",), 320, 4),
    ("RT-DETRv2-R18, 640 px, batch 2", ("model=rtdetrv2",), 640, 2),
    ("RF-DETR Nano, 384 px, batch 2", ("model=rfdetr", "loss=ia_bce"), 384, 2),
)
WORD = "trainer.hardware.gradient_checkpointing=true"
MIB = 2**20
TEXT = """
Every row is a training step with checkpointing divided by the same step without. Saved tensors are what the forward
pass keeps for the backward pass, counted once per storage. Peak memory is by how much the resident memory of a process
of its own grew from before the first step to its highest point in two steps: gradients, moments and the average of the
weights are in it. The decoder, whose queries are few, is not checkpointed. Losses and gradients are the same
(`tests/trainer/test_trainer.py`).
"""


def kept(words: tuple[str, ...], side: int, images: int) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    batch, cfg = batch_of(images, side), config(side, *words)
    torch.manual_seed(0)
    network = build.hardware(cfg).place(build.network(cfg)).train()
    criterion = build.criterion(cfg)

    def loss() -> object:
        outputs = network(batch.pixels(), batch.targets)
        return criterion(outputs, batch.targets, num_boxes=len(batch.targets), num_images=images)

    return saved_bytes(network, loss).activations


def grown(words: tuple[str, ...], side: int, images: int) -> int:
    """Bytes by which two steps let this process grow; call it in a new one."""
    torch.set_num_threads(1)
    step = ours(batch_of(images, side), config(side, *words))
    before = status("VmRSS")
    step()
    step()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes of this process by the system's account; the highest so far is `VmHWM` (`ru_maxrss` is inherited)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines[field].split()[0])


def in_new_process(words: tuple[str, ...], side: int, images: int) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(grown, words, side, images).result()


def rows_of(name: str, words: tuple[str, ...], side: int, images: int, rounds: int) -> list[Row]:
    plain, checkpointed = (*words, *FP32), (*words, *FP32, WORD)
    rows = []
    for part, measure in (("saved tensors", kept), ("peak memory", in_new_process)):
        ours_, other = measure(checkpointed, side, images), measure(plain, side, images)
        detail = f"{ours_ / MIB:.0f} / {other / MIB:.0f} MiB"
        rows.append(Row(f"{name}: {part}", ours_ / other, "without", detail=detail))
    batch = batch_of(images, side)
    steps = {"with": ours(batch, config(side, *checkpointed)), "without": ours(batch, config(side, *plain))}
    return [*rows, beside(f"{name}: time", interleaved(steps, rounds), "with", "without")]


def bench(rounds: int) -> Section:
    rows = [row for network in NETWORKS for row in rows_of(*network, rounds)]
    return Section("Gradient checkpointing", rows, TEXT)


if __name__ == "__main__":
    sys.exit(run("checkpointing", bench, __doc__, rounds=3))
