"""Training steps beside those of transformers and rfdetr, in float32 and in bf16.

python scripts/bench_steps.py [--rounds 5] [--dry]
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from measure import (
    Row,
    Section,
    beside,
    interleaved,
    is_of_the_newer_gates,
    memory_as_it_comes,
    run,
    why_bf16_is_not_judged,
)
from training_step import BF16, batch_of, config, ours, rfdetr, transformers

from detr_exp.trainer.hardware import cpu_has_bf16
from detr_exp.trainer.memory import keep_freed_memory

RTDETR = ("model=rtdetrv2",)
DFINE = ("model=dfine_s", "loss=dfine")
DFINE_N = ("model=dfine_n", "loss=dfine")
RFDETR = ("model=rfdetr", "loss=ia_bce")
IMAGES = 2
BF16_IS_THERE, SKIPPED = cpu_has_bf16(), why_bf16_is_not_judged()
# name, words, side, peer, gates in float32 and in bf16: on AMD's processors with AVX-512, and on others
NETWORKS = (
    ("RT-DETRv2-R18, 320 px", RTDETR, 320, "transformers", ((0.68, 0.42), (0.92, 0.62))),
    ("RT-DETRv2-R18, 640 px", RTDETR, 640, "transformers", ((0.74, 0.52), (0.95, 0.52))),
    ("D-FINE-S, 320 px", DFINE, 320, "transformers", ((0.75, 0.62), (0.75, 0.62))),
    ("D-FINE-N, 320 px", DFINE_N, 320, "transformers", ((0.75, 0.62), (0.75, 0.62))),
    ("RF-DETR Nano, 384 px", RFDETR, 384, "rfdetr", ((0.60, 0.33), (0.98, 0.65))),
)
TEXT = """
A step is forward pass, criterion, backward pass, clipping, AdamW and the average of the weights, on two images with
some seven objects each; ours is the trainer's own, as it is configured by default for the precision. The peers always
compute in float32 and train as their authors do: `torch.optim.AdamW` as it comes, an average tensor by tensor; without
Lightning or the `Trainer` of transformers, which would come on top. Ours keeps freed memory, as the trainer has it; for
the peers the allocator is set as glibc adapts it by itself. On AMD's processors with AVX-512 the products are oneDNN's
(`trainer.hardware.products=auto`) and the gates are closer; elsewhere those of bf16 are meant for processors that
multiply it in tiles (AMX), and where the processor does not know bf16, it is left out.
Depthwise convolutions are trained in float32 under bf16, too, because oneDNN's gradients of stride 2 and of 5 x 5
cells are slow in bf16: at 256 px and batch 4, D-FINE-N takes 0.84 s beside 1.05 s before, RT-DETRv2 tiny on
EfficientNet-Lite0 0.62 s beside 1.20 s (least of 5 rounds in turns, 2026-11-29, commit 46530a4, one thread of an Intel
Xeon with AMX; on AMD not measured).
"""


def rows_of(
    name: str, words: tuple[str, ...], side: int, peer: str, gates: tuple[tuple[float, float], ...], rounds: int
) -> list[Row]:
    batch = batch_of(IMAGES, side)
    plain = config(side, *words, "trainer.hardware.amp=null")
    contenders = {
        "fp32": ours(batch, plain),
        **({"bf16": ours(batch, config(side, *words, *BF16))} if BF16_IS_THERE else {}),
        peer: transformers(batch, plain) if peer == "transformers" else rfdetr(batch),
    }
    prepare: dict[str, Callable[[], object]] = {
        name: (lambda step=step: (keep_freed_memory(), step())) for name, step in contenders.items() if name != peer
    }
    times = interleaved(contenders, rounds, warmup=1, prepare=prepare | {peer: memory_as_it_comes})
    fp32, bf16 = gates[0 if is_of_the_newer_gates() else 1]
    return [
        beside(f"{name}, float32", times, "fp32", peer, gate=fp32),
        beside(f"{name}, bf16", times, "bf16", peer, gate=bf16, skipped=SKIPPED),
    ]


def bench(rounds: int) -> Section:
    rows: list[Row] = []
    for network in NETWORKS:
        rows += rows_of(*network, rounds)
        gc.collect()
    return Section("Training step", rows, TEXT, packages=("torch", "transformers", "rfdetr"))


if __name__ == "__main__":
    sys.exit(run("steps", bench, __doc__))
