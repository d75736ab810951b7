"""The forms in which a network can run, and how long it takes in each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from detr_exp.deploy.program import Program
    from detr_exp.protocols import Network

EXPORTED = ("onnx", "torchscript", "openvino")
FORMS = ("eager", "folded", "bf16", "compiled", "compiled_bf16", *EXPORTED)
WARMUP = 3
OF_MEDIAN, OF_NORMAL = math.sqrt(math.pi / 2), 1.4826  # error of a median and of a mean; deviation and its median


def in_form(network: Network, form: str, folder: Path) -> Program:
    """A copy of the network in a form, ready to run."""
    import copy

    import torch
    import torch._inductor.config

    from detr_exp.deploy import engines
    from detr_exp.deploy.graph import Graph
    from detr_exp.deploy.program import Program
    from detr_exp.ops import products

    copied = copy.deepcopy(network)
    if form != "eager":
        copied.deploy()
    graph = Graph(copied, preprocess=False, postprocess=False).eval()
    if form in EXPORTED:
        copied.cpu().to(memory_format=torch.contiguous_format)
        path = folder / f"model{engines.SUFFIX[form]}"
        engines.write(form, graph, path, facts={})
        return Program(graph, engines.open_file(form, path, torch.get_num_threads()))
    if form != "eager":
        copied.to(memory_format=torch.channels_last)
        products.pack(copied.modules())
    run = engines.in_torch(graph, torch.bfloat16 if form.endswith("bf16") else None)
    if form.startswith("compiled"):
        copied.compile()
        # weights become constants, converted and laid out for oneDNN once; an option of `compile` would come too late
        # for the part of torch that reads the code, which does so in the first call for a shape. On the CPU the code
        # between operators is C++, too: Python's takes as long as some of them
        on_cpu = graph.network.pixel_mean.device.type == "cpu"
        run = torch._inductor.config.patch(freezing=True, cpp_wrapper=on_cpu)(run)
    return Program(graph, run)


def image_to_time(path: str | None, channels: int = 3) -> np.ndarray:
    """`[H, W, channels]` uint8; None: noise of 640 x 480 pixels."""
    import numpy as np

    from detr_exp.inference.detector import as_image

    noise = np.random.default_rng(0).integers(0, 256, (480, 640, channels), dtype=np.uint8)
    return noise if path is None else as_image(path, channels)


def interleaved(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each round of several calls, after a few that are not measured.

    A round makes each call once, so that what else the machine does meets all of them.
    """
    for call in calls:
        for _ in range(WARMUP):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, of_call in zip(calls, times):
            start = time.perf_counter()
            call()
            of_call.append(time.perf_counter() - start)
    return times


def median_of(times: Sequence[float]) -> tuple[float, float]:
    """The median and its standard error, from a width that few slow rounds do not change, as if it were normal."""
    import numpy as np

    median = float(np.median(times))
    deviation = OF_NORMAL * float(np.median(np.abs(np.array(times) - median)))
    return median, OF_MEDIAN * deviation / math.sqrt(len(times))
