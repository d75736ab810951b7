"""The parts of `check_gpu.py`: each measures one thing on the device of a `Size`, and gives rows for the page."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from measure import Row
from training_step import Way, batch_of, config, rfdetr, stepper, transformers

FP32 = ("trainer.hardware.amp=null",)
STATED_MAP = 0.55  # of docs/results.md: 0.583 after 40 epochs


@dataclass(frozen=True)
class Size:
    """What a part is run with: `device`, whether it is a rehearsal, and the folder of BCCD."""

    device: str
    rehearsal: bool
    data: Path | None

    def networks(self) -> list[tuple[str, tuple[str, ...], int, int, str]]:
        """(name, words, side, images, peer)."""
        if self.rehearsal:
            small = ("model.num_queries=20", "model.num_layers=2")
            seg = ("model=rfdetr_seg_tiny", "model.mask_head=null", "model.num_groups=2", "loss=ia_bce")
            return [
                ("tiny RT-DETRv2", ("model=rtdetrv2_tiny", *small), 64, 2, "transformers"),
                ("tiny RF-DETR", (*seg, *small), 64, 2, "rfdetr"),
            ]
        return [
            ("RT-DETRv2-R18, 640 px, batch 16", ("model=rtdetrv2",), 640, 16, "transformers"),
            ("RF-DETR Nano, 384 px, batch 16", ("model=rfdetr", "loss=ia_bce"), 384, 16, "rfdetr"),
        ]

    def why_not_judged(self) -> str:
        return "a rehearsal" if self.rehearsal else ""

    def config(self, side: int, *words: str) -> Any:
        return config(side, *words, hardware=self.device)


def sentence(error: BaseException) -> str:
    """An error in one line, without what would break a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200].replace("|", "/")


def missing(*packages: str) -> str:
    """Why something cannot be compared; empty where all packages are there."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def synchronize(where: str) -> None:
    import torch

    if where == "cuda":
        torch.cuda.synchronize()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, which is no float32."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ------------------------------------------------------------------------------------------------------------ parity


def parity(size: Size) -> Iterator[Row]:
    import torch

    from detr_exp import build

    # the median difference of scores and boxes, and relative differences of loss and gradient norm; of half precision
    # only the loss is judged, because other cells are selected from random weights
    gates = {"fp32": (None, 1e-4, 1e-3, 1e-2), "bf16": (torch.bfloat16, None, 0.05, None)}
    if size.device == "cuda":
        gates["fp16"] = (torch.float16, None, 0.02, None)
    for name, words, side, _, _ in size.networks():
        further = ("model.num_denoising=0",) if "rtdetr" in words[0] else ()  # its noise differs between devices
        cfg = config(side, *words, *further, *FP32)
        torch.manual_seed(0)
        network, criterion = build.network(cfg), build.criterion(cfg)
        batch = batch_of(2, side)
        images = list(batch.images.numpy())
        expected = outputs_of(network, images, "cpu", None), loss_of(network, criterion, batch, "cpu", None)
        for kind, (dtype, *limits) in gates.items():
            with exact_float32():
                found = outputs_of(network, images, size.device, dtype)
                loss, norm = loss_of(network, criterion, batch, size.device, dtype)
            apart = median_difference(expected[0], found, side)
            values = (apart, abs(loss / expected[1][0] - 1), abs(norm / expected[1][1] - 1))
            for part, value, limit in zip(("median output", "loss", "gradient norm"), values, limits, strict=True):
                yield Row(f"{name}, {kind}: {part}", value, "CPU float32", limit, skipped=size.why_not_judged())


def outputs_of(network: Any, images: Sequence[Any], where: str, dtype: Any) -> Mapping[str, Any]:
    """Outputs of an evaluation, by name."""
    from detr_exp.deploy.engines import in_torch
    from detr_exp.deploy.graph import Graph
    from detr_exp.deploy.program import Program

    graph = Graph(copy.deepcopy(network).to(where).eval(), preprocess=False, postprocess=False)
    return Program(graph, in_torch(graph, dtype)).outputs(images)


def median_difference(expected: Any, found: Any, side: int) -> float:
    import numpy as np

    from detr_exp.deploy.program import differences

    sizes = np.full((len(expected["logits"]), 2), side)
    return max(float(np.median(apart)) for apart in differences(expected, found, sizes).values())


def loss_of(network: Any, criterion: Any, batch: Any, where: str, dtype: Any) -> tuple[float, float]:
    """The loss of a batch, and the norm of its gradient."""
    import torch

    from detr_exp.trainer.evaluation import as_float32

    there = copy.deepcopy(network).to(where).train()
    batch = batch.to(torch.device(where))
    with Way(where, dtype).autocast():
        outputs = there(batch.pixels(torch.contiguous_format), batch.targets)
    loss = criterion(as_float32(outputs), batch.targets, num_boxes=len(batch.targets))["total"]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in there.parameters() if p.grad is not None])
    return float(loss), float(norm)


# ------------------------------------------------------------------------------------------------------------- steps


def waits(size: Size) -> Iterator[Row]:
    import torch

    for name, words, side, images, _ in size.networks():
        batches = batches_of(images, side, size)
        step = stepper(size.config(side, *words))
        for batch in batches:
            step([batch])
        synchronize(size.device)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if size.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            step([batches[0]])
            if size.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found = [str(one.message) for one in seen if "synchron" in str(one.message)]
        where = sorted({f"{Path(one.filename).name}:{one.lineno}" for one in seen if "synchron" in str(one.message)})
        skipped = "" if size.device == "cuda" else "a CPU does not wait"
        yield Row(f"{name}: waits in a step", len(found), gate=1, detail=", ".join(where), skipped=skipped)


def batches_of(images: int, side: int, size: Size, count: int = 4) -> list[Any]:
    """Batches with other numbers of objects, in page-locked memory as the loader's."""
    made = [batch_of(images, side, seed=seed) for seed in range(count)]
    return [batch.pin_memory() for batch in made] if size.device == "cuda" else made


def steps(size: Size) -> Iterator[Row]:
    graphs = {"mode": "reduce-overhead"}
    forms: dict[str, Mapping[str, Any] | None] = {"eager": None, "compiled": {}, "CUDA graphs": graphs}
    if size.rehearsal:  # code generation takes minutes
        forms = {name: form if form is None else {"backend": "eager"} for name, form in forms.items()}
    for name, words, side, images, peer in size.networks():
        batches = batches_of(images, side, size)
        theirs = best_of_peer(peer, batches[0], size.config(side, *words), size)
        for form, compiled in forms.items():
            part = f"{name}: {form}"
            try:
                rate, memory = rate_of(stepper(size.config(side, *words), compiled), batches, size)
            except Exception as error:  # the other forms are measured all the same
                yield Row(part, math.nan, fault=sentence(error))
                continue
            detail = f"{rate:.4g} images/s, {memory:.2f} GiB"
            if isinstance(theirs, str):
                yield Row(part, math.nan, peer, detail=detail, skipped=theirs)
            else:
                beside = f"{detail} / {theirs[1]}: {theirs[0]:.4g} images/s, {theirs[2]:.2f} GiB"
                yield Row(part, theirs[0] / rate, peer, gate=1.0, detail=beside, skipped=size.why_not_judged())


def best_of_peer(peer: str, batch: Any, cfg: Any, size: Size) -> tuple[float, str, float] | str:
    """(images/s, form, GiB) of the peer's faster form; a sentence where there is none."""
    import torch

    if reason := missing(peer) or ("its networks have one size" if size.rehearsal and peer == "rfdetr" else ""):
        return reason
    found, reason = [], ""
    for compiled in (False, True)[: 1 if size.rehearsal else 2]:
        way = Way(size.device, torch.bfloat16, compiled)
        try:
            step = transformers(batch, cfg, way) if peer == "transformers" else rfdetr(batch, way)
            rate, memory = rate_of(lambda _, step=step: step(), [batch], size)
            found.append((rate, "compiled" if compiled else "eager", memory))
        except Exception as error:
            reason = sentence(error)
    return max(found) if found else f"{peer} fails: {reason}"


def rate_of(
    step: Callable[[list[Any]], object], batches: list[Any], size: Size, warm: int = 12, counted: int = 30
) -> tuple[float, float]:
    """Images a second in `counted` steps after those to warm up, and peak GiB."""
    import torch

    gc.collect()
    warm, counted = (2, 1) if size.rehearsal else (warm, counted)
    if size.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for batch in islice(cycle(batches), warm):
        step([batch])
    synchronize(size.device)
    started = time.perf_counter()
    for batch in islice(cycle(batches), counted):
        step([batch])
    synchronize(size.device)
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() / 2**30 if size.device == "cuda" else math.nan
    torch._dynamo.reset()
    return counted * len(batches[0]) / seconds, memory


def batch_size(size: Size) -> Iterator[Row]:
    import torch

    from detr_exp import build
    from detr_exp.trainer.batch_size import find_batch_size

    for name, words, side, _, _ in size.networks():
        square, hardware = f"model.image_size=[{side},{side}]", f"trainer/hardware={size.device}"
        auto = ("trainer.batch_size=auto", "tracker=none", "data=shapes", "data.num_workers=0", "data.train=256")
        cfg = build.compose([*words, square, hardware, *auto])
        with tempfile.TemporaryDirectory() as folder:
            run, settings = build.run(cfg, Path(folder)), build.trainer(cfg).settings
            network = settings.hardware.place(run.network)
            images, accumulated = find_batch_size(settings, run, network)
        del run, network
        detail, share = f"{images} images, accumulated {accumulated} times", math.nan
        if size.device == "cuda":
            _, memory = rate_of(stepper(size.config(side, *words)), batches_of(images, side, size, 1), size, 2, 1)
            share = memory * 2**30 / torch.cuda.get_device_properties(0).total_memory
            detail += f"; a step takes {memory:.1f} GiB"
        skipped = "" if size.device == "cuda" else "memory of a CPU is estimated"
        part = f"{name.partition(', batch')[0]}: memory of a step with batch_size=auto"
        yield Row(part, share, "that of the device", gate=1.0, detail=detail, skipped=skipped)


# ----------------------------------------------------------------------------------------------- engines, ranks, data


def engines(size: Size) -> Iterator[Row]:
    import numpy as np
    import torch

    from detr_exp import build
    from detr_exp.deploy import engines as files
    from detr_exp.deploy.forms import in_form

    if reason := missing("onnxruntime", "onnxscript"):
        yield Row("ONNX Runtime", math.nan, skipped=reason)
        return
    import onnxruntime

    wanted = ("CPUExecutionProvider",) if size.rehearsal else ("CUDAExecutionProvider", "TensorrtExecutionProvider")
    there = onnxruntime.get_available_providers()
    for name, words, side, _, _ in size.networks():
        torch.manual_seed(0)
        network = build.network(config(side, *words)).eval()
        inputs = [np.random.default_rng(0).random((1, 3, side, side), dtype=np.float32)]
        with tempfile.TemporaryDirectory() as folder:
            program = in_form(network, "folded", Path(folder))
            files.write("onnx", program.graph, Path(folder) / "model.onnx", facts={})
            fast = in_form(network.to(size.device), "bf16", Path(folder))
            ours = milliseconds(partial(fast.run, inputs), size)
            for provider in wanted:
                part = f"{name.partition(', batch')[0]}, one image: folded bf16"
                if provider not in there:
                    yield Row(part, math.nan, provider, skipped=f"this onnxruntime has no {provider}")
                    continue
                session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), providers=[provider])
                given = {session.get_inputs()[0].name: inputs[0]}
                theirs = milliseconds(partial(session.run, None, given), size)
                yield Row(part, ours / theirs, provider, detail=f"{ours:.3g} / {theirs:.3g} ms")


def milliseconds(call: Callable[[], object], size: Size) -> float:
    """Median of some calls; they end with a copy to the host."""
    times = []
    for _ in range(3 if size.rehearsal else 60):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times[len(times) // 3 :])[len(times) // 3]


def ranks(size: Size) -> Iterator[Row]:
    """Gradient norm and loss of a step of two ranks, and of one process that accumulates their batches."""
    name, words, side, _, _ = size.networks()[1]  # no batch norms, whose statistics would differ
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [
            sys.executable,
            str(Path(__file__).with_name("check_gpu.py")),
            "--device",
            size.device,
            "--rank",
            folder,
        ]
        command += ["--rehearse"] * size.rehearsal
        started = [subprocess.Popen(command, env={**os.environ, **environment, "RANK": str(rank)}) for rank in range(2)]
        statuses = [process.wait() for process in started]
        if any(statuses):
            yield Row(f"{name}: two ranks", math.nan, fault=f"ranks ended with {statuses}")
            return
        together = json.loads((Path(folder) / "0.json").read_text(encoding="utf-8"))
    step = stepper(size.config(side, *words, *FP32))
    alone = numbers_of(step([batch_of(2, side, seed=seed) for seed in range(2)]))
    apart = {part: abs(together[part] / value - 1) for part, value in alone.items()}
    for part, value in apart.items():
        yield Row(f"{name}: {part} of two ranks by gloo", value, "one process", 1e-3)


def one_rank(folder: Path, size: Size) -> None:
    """What each of the ranks does."""
    import torch.distributed as dist

    _, words, side, _, _ = size.networks()[1]
    dist.init_process_group("gloo")
    step = stepper(size.config(side, *words, *FP32))
    found = numbers_of(step([batch_of(2, side, seed=dist.get_rank())]))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def numbers_of(result: Any) -> dict[str, float]:
    terms, _ = result
    return {"loss": float(terms[-2]), "gradient norm": float(terms[-1])}


def training(size: Size) -> Iterator[Row]:
    from detr_exp import build
    from detr_exp.training import train_in

    part = f"RT-DETRv2-R18, BCCD, 40 epochs: {STATED_MAP} of the val mAP"
    if size.data is None and not size.rehearsal:
        yield Row(part, math.nan, skipped="no images: --data <BCCD>")
        return
    words = [f"trainer/hardware={size.device}", "tracker=none", "trainer.progress_bar=none", "trainer.num_pictures=0"]
    if size.rehearsal:
        words += ["model=rtdetrv2_tiny", "model.image_size=[64,64]", "model.num_queries=20", "data=shapes"]
        words += ["data.source.size=64", "data.train=4", "data.val=2", "data.test=0", "data.num_workers=0"]
        words += ["trainer.batch_size=2", "trainer.epochs=1"]
    else:
        words += ["model=rtdetrv2", "model.image_size=[320,320]", "data=auto", f"data.root={size.data}"]
        words += ["data/augment=rtdetr", "data.augment.vertical_flip=0.5", "optim.lr=3e-4", "optim/scheduler=cosine"]
        words += ["trainer.epochs=40", "trainer.eval_interval=20", "trainer.batch_size=4", "trainer.hardware.amp=bf16"]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        reached = train_in(Path(folder), build.compose(words)) or 0.0
    detail = f"mAP {reached:.3f} in {time.perf_counter() - started:.0f} s"
    ratio = STATED_MAP / reached if reached > 0 else math.inf
    yield Row(part, ratio, gate=1.0, detail=detail, skipped=size.why_not_judged())


PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    "parity": parity,
    "waits": waits,
    "steps": steps,
    "batch_size": batch_size,
    "engines": engines,
    "ranks": ranks,
    "training": training,
}
