"""Training steps beside those of transformers and rfdetr, in float32 and in bf16.

python scripts/bench_steps.py [--rounds 5] [--dry]
"""

from __future__ import annotations

import gc
import sys

from measure import Row, Section, beside, interleaved, run, why_bf16_is_not_judged
from training_step import BF16, FP32, batch_of, config, ours, rfdetr, transformers

from detr_exp.trainer.hardware import cpu_has_bf16

RTDETR = ("model=rtdetrv2",)
DFINE = ("model=dfine_n", "loss=dfine")
RFDETR = ("model=rfdetr", "loss=ia_bce")
IMAGES = 2
BF16_IS_THERE, SKIPPED = cpu_has_bf16(), why_bf16_is_not_judged()
# name, words, side, peer, gates in float32 and in bf16
NETWORKS = (
    ("RT-DETRv2-R18, 320 px", RTDETR, 320, "transformers", (0.92, 0.62)),
    ("RT-DETRv2-R18, 640 px", RTDETR, 640, "transformers", (0.95, 0.52)),
    ("D-FINE-N, 320 px", DFINE, 320, "transformers", (0.75, 0.62)),
    ("RF-DETR Nano, 384 px", RFDETR, 384, "rfdetr", (0.98, 0.65)),
)
TEXT = """
A step is forward pass, criterion, backward pass, clipping, AdamW and the average of the weights, on two images with
some seven objects each; ours is the trainer's own. The peers always compute in float32 and train as their authors do:
`torch.optim.AdamW` as it comes, an average tensor by tensor; without Lightning or the `Trainer` of transformers, which
would come on top. bf16 means autocast with channels-last, as `trainer.hardware.amp=bf16` chooses on a CPU. Its gates
are meant for processors that multiply bf16 in tiles (AMX); where the processor does not know it, it is left out. On an
AMD EPYC with AVX512-BF16 the three steps took 0.434, 0.376 and 0.325 of the peers' (2026-11-21, commit 2e11359).
"""


def rows_of(
    name: str, words: tuple[str, ...], side: int, peer: str, gates: tuple[float, float], rounds: int
) -> list[Row]:
    batch = batch_of(IMAGES, side)
    plain = config(side, *words, *FP32)
    contenders = {
        "fp32": ours(batch, plain),
        **({"bf16": ours(batch, config(side, *words, *BF16))} if BF16_IS_THERE else {}),
        peer: transformers(batch, plain) if peer == "transformers" else rfdetr(batch),
    }
    times = interleaved(contenders, rounds, warmup=2)
    return [
        beside(f"{name}, float32", times, "fp32", peer, gate=gates[0]),
        beside(f"{name}, bf16", times, "bf16", peer, gate=gates[1], skipped=SKIPPED),
    ]


def bench(rounds: int) -> Section:
    rows: list[Row] = []
    for network in NETWORKS:
        rows += rows_of(*network, rounds)
        gc.collect()
    return Section("Training step", rows, TEXT, packages=("torch", "transformers", "rfdetr"))


if __name__ == "__main__":
    sys.exit(run("steps", bench, __doc__))
