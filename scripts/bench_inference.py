"""Inference of one image beside transformers, rfdetr and ONNX Runtime.

Where DETR_EXP_CHECKPOINT names a checkpoint whose data are at hand, the accuracy in bf16 is measured too.

    python scripts/bench_inference.py [--rounds 7] [--dry]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench_profile import ceilings
from measure import Row, Section, beside, interleaved, is_of_the_newer_gates, run, why_bf16_is_not_judged
from training_step import FP32, config, rfdetr_network, transformers_network

from detr_exp.trainer.hardware import cpu_has_bf16

CHECKPOINT = "DETR_EXP_CHECKPOINT"
BF16_IS_THERE, SKIPPED = cpu_has_bf16(), why_bf16_is_not_judged()
# name, words, side, peer, gates: folded in float32 beside the peer; then fastest form and folded in float32 beside ONNX
# Runtime, on AMD's processors with AVX-512 and on others
NETWORKS = (
    ("RT-DETRv2-R18, 640 px", ("model=rtdetrv2",), 640, "transformers", 0.80, ((0.50, 1.05), (0.35, None))),
    ("D-FINE-S, 640 px", ("model=dfine_s",), 640, "transformers", 0.75, ((None, None), (0.35, None))),
    ("D-FINE-N, 640 px", ("model=dfine_n",), 640, "transformers", 0.75, ((None, None), (0.35, None))),
    ("RF-DETR Nano, 384 px", ("model=rfdetr", "loss=ia_bce"), 384, "rfdetr", 0.99, ((0.52, 1.00), (0.55, None))),
)
FORMS = ("folded", *(["compiled_bf16"] if BF16_IS_THERE else []), "onnx")
TEXT = """
One image as a tensor in, logits and boxes out; random weights. "Folded" has its norms folded into convolutions
(`Detector.folded`, as `predict` uses it) in float32 and channels-last; the peer runs its network as it comes, in
evaluation mode. "Fastest" is folded, compiled, bf16 and channels-last (`compiled_bf16` of
`python -m detr_exp.benchmark`), and ONNX Runtime runs the file that `python -m detr_exp.export` makes of the same
network in float32. On AMD's processors with AVX-512 the products are
oneDNN's and gates of their own hold; elsewhere those of bf16 are meant for processors that multiply it in tiles (AMX),
and processors that do not know it are left out. "Products alone" is the floor: what products and convolutions of the
network would take at the highest rate of the type that a product or convolution reached in the same run.

Where RF-DETR Nano's fastest form spends its time, one image on 2026-11-29, the AMD EPYC below: products by oneDNN's own
log, the least of 5 images, the rest by torch's profiler, the least of 7 (commit 680c9d2); calls by `perf`, 25 images
(commit 7d29e56).

| part | ms | GFLOP/s |
| --- | --: | --: |
| transformer: queries, keys, values, 12 products 580 x 384 x 1152 | 12.4 | 497 |
| output of attention, 12 products 580 x 384 x 384 | 4.1 | 497 |
| first layer and GELU, 12 products 580 x 384 x 1536 | 18.4 | 446 |
| second layer, 12 products 580 x 1536 x 384 | 16.5 | 498 |
| products of scores, and of shares and values, in 9 windowed and 3 global blocks | 6.6 | 409 |
| patches, projector, decoder and heads | 9.3 | 473 |
| softmax, float32 inside, a third of it exponentials | 6.6 | |
| norms, sums, changes of layout and of type | 4 | |
| calls of 114 products and some 80 kernels: look-ups in oneDNN and torch 5%, memory 3%, guards and Python 1.5% | 8 | |

All products have the rate of the floor but for GELU and for scores, whose rows are short. The error function, softmax
in float32 and a call of oneDNN for each product are what remains. Tried: with torch's attention kernel for bfloat16 the
network takes 1.28 times as long; dividing after the product with values rounds twice, and global blocks are slower with
it. The ratio depends on what else the machine does: 0.521, 0.541, 0.567 and 0.575 in four runs (89 to 96 ms) while
others worked on both cores, and above the gate in each.

On an Intel Xeon with AMX (2026-11-30, commit 81707eb, 7 rounds, not quiet) the fastest forms took 0.219 (R18), 0.350
(Nano), 0.410 (D-FINE-S) and 0.795 (D-FINE-N) of ONNX Runtime's time, and Nano in float32 0.897. D-FINE misses its gate
of 0.35 there: its products need 17 of 56 ms, the rest goes into limits of activations, pads and small calls.
"""


def rows_of(
    name: str,
    words: tuple[str, ...],
    side: int,
    peer: str,
    gate: float,
    beside_onnx: tuple[tuple, ...],
    rates: Mapping[str, float],
    rounds: int,
) -> list[Row]:
    import torch

    from detr_exp import build
    from detr_exp.deploy.forms import in_form
    from detr_exp.model.operations import gigaflops

    torch.manual_seed(0)
    cfg = config(side, *words, *FP32)
    network = build.hardware(cfg).place(build.network(cfg)).eval()
    images = torch.rand(1, 3, side, side)
    with TemporaryDirectory() as folder:
        forms = {form: in_form(network, form, Path(folder)) for form in FORMS}
        calls: dict[str, Callable[[], object]] = {
            form: (lambda program=program: program.run([images.numpy()])) for form, program in forms.items()
        }
        calls[peer] = peers_call(peer, config(side, *words), images)
        times = interleaved(calls, rounds, warmup=2)
        work = gigaflops(forms["folded"].graph.network)
    fastest, folded = beside_onnx[0 if is_of_the_newer_gates() else 1]
    return [
        beside(f"{name}: folded, float32", times, "folded", peer, gate=gate),
        beside(f"{name}: fastest", times, "compiled_bf16", "onnx", gate=fastest, skipped=SKIPPED),
        beside(f"{name}: folded, float32", times, "folded", "onnx", gate=folded),
        *(floor(f"{name}: products alone, {kind}", work, rate, median(times["onnx"])) for kind, rate in rates.items()),
    ]


def floor(part: str, work: float, rate: float, peer: float) -> Row:
    """What `work` GFLOP take at `rate` FLOP/s, beside seconds of ONNX Runtime."""
    seconds = work * 1e9 / rate
    detail = f"{seconds * 1e3:.4g} / {peer * 1e3:.4g} ms; {work:.3g} GFLOP at {rate / 1e9:.0f} GFLOP/s"
    return Row(part, seconds / peer, "onnx", detail=detail)


def peers_call(peer: str, cfg: Any, images: Any) -> Callable[[], object]:
    """An evaluation by the peer's own network."""
    import torch

    network = transformers_network(cfg) if peer == "transformers" else rfdetr_network()[0]
    network.eval()

    @torch.inference_mode()
    def call() -> object:
        return network(images)

    return call


def accuracy(checkpoint: str) -> list[Row]:
    """How much mAP folding and bf16 lose on the validation split of a checkpoint's data; compiling changes neither."""
    import torch

    from detr_exp import build
    from detr_exp.deploy.export import evaluated
    from detr_exp.deploy.forms import in_form
    from detr_exp.inference.detector import load

    detector = load(checkpoint)
    detector.network.to(memory_format=torch.contiguous_format)
    data = build.data(detector.cfg)
    metric = build.metric(detector.cfg, data, detector.network)("val")
    exact, fast = (
        evaluated(metric, data.split("val"), in_form(detector.network, form, Path()), form)["mAP"]
        for form in ("eager", "bf16")
    )
    detail = f"{exact:.4f} in float32, {fast:.4f} in bf16, {Path(checkpoint).name}"
    return [Row("mAP lost by folding and bf16", exact - fast, "float32", gate=0.005, detail=detail)]


def bench(rounds: int) -> Section:
    rows: list[Row] = []
    _, rates = ceilings(rounds)
    for network in NETWORKS:
        rows += rows_of(*network, rates, rounds)
    if CHECKPOINT in os.environ:
        rows += accuracy(os.environ[CHECKPOINT])
    return Section("Inference", rows, TEXT, packages=("torch", "transformers", "rfdetr", "onnxruntime"))


if __name__ == "__main__":
    sys.exit(run("inference", bench, __doc__))
