"""How fast a network is: `python -m detr_exp.benchmark checkpoint=...|experiment=...|published=true`."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.config.compose import CONF_DIR
from detr_exp.deploy.forms import FORMS, image_to_time, in_form, interleaved
from detr_exp.writing import write

USAGE = """\
Measure the speed of a network: eager, folded, compiled and exported.

  python -m detr_exp.benchmark checkpoint=RUN_FOLDER
  python -m detr_exp.benchmark experiment=rtdetrv2_r18vd_120e_coco benchmark.forms=[folded,onnx]
  python -m detr_exp.benchmark model=rfdetr 'model.image_size=[256,256]' trainer/hardware=cpu
  python -m detr_exp.benchmark published=true benchmark.forms=[folded]             every published recipe in one table

  checkpoint              a file, a run folder (its best checkpoint) or a run id
  at                      at.layers=2 at.queries=100 at.image_size=[320,320]: a smaller member of the network, without
                          training; or at.name=..., of a point that detr_exp.pareto has found
  benchmark.forms         eager: as trained, float32 | folded: norms folded into convolutions | bf16: folded, bfloat16
                          compiled, compiled_bf16: folded, by torch.compile, which takes minutes
                          onnx, torchscript, openvino: exported files, on the CPU
  benchmark.batch_sizes   for the throughput
  benchmark.rounds        more rounds make the median and the 95th percentile more stable
  benchmark.image         for the end-to-end latency: from an image in memory to detections in pixels; null: noise
  trainer/hardware        auto, cpu, cuda, mps; trainer.hardware.threads=1

Times are milliseconds per image, wall clock. Memory is the additional memory of one forward pass, in MiB. GFLOPs
count two per multiply-add. The table is also written as benchmark.json.
"""

if TYPE_CHECKING:
    import numpy as np

    from detr_exp.protocols import Labels, Network


@dataclass(frozen=True)
class Measured:
    """One form of one network.

    Attributes:
        name: of checkpoint, recipe or network.
        form: see `conf/benchmark.yaml`.
        parameters: of the form; fewer after folding and dropping parts that only training uses.
        gflops: 10^9 operations of one evaluation of one image.
        median, p95: milliseconds of the network alone, for one image.
        all_median, all_p95: including pre- and postprocessing.
        throughput: batch size -> images a second, of the network alone.
        memory: MiB that an evaluation needs beyond the memory used before; None where the system does not report it.
    """

    name: str
    form: str
    parameters: int
    gflops: float
    median: float
    p95: float
    all_median: float
    all_p95: float
    throughput: dict[int, float]
    memory: float | None


def benchmark(cfg: DictConfig) -> None:
    """Measure, and write `benchmark.json` into Hydra's output folder."""
    benchmark_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def benchmark_in(folder: Path, cfg: DictConfig) -> list[Measured]:
    """Measure all forms of one network, or of all published ones, and write `benchmark.json`.

    Args:
        folder: made if absent.
        cfg: see `conf/benchmark.yaml`.

    Raises:
        ValueError: a form is unknown, or a network cannot be built.
    """
    from detr_exp import build
    from detr_exp.data.fit import sizes_of, written
    from detr_exp.trainer.console import Console

    wanted = list(cfg.benchmark.forms)
    for form in wanted:
        if form not in FORMS:
            raise ValueError(f"benchmark.forms has {form!r}; use some of {', '.join(FORMS)}")
    hardware, console = build.hardware(cfg), Console("rich")
    rows: list[Measured] = []
    with console.progress("measuring", len(wanted) * (len(published()) if cfg.published else 1)) as meter:
        for name, network in networks(cfg):
            hardware.place(network).eval()
            if sizes := sizes_of(network):
                console.line(f"{name} at {written(sizes[:1])} of {written(sizes)}; choose another: at.image_size=...")
            image = image_to_time(cfg.benchmark.image, len(network.pixel_mean))
            if not rows:
                height, width = image.shape[:2]
                console.line(f"{hardware.describe()}; {width} x {height} px image; {cfg.benchmark.rounds} rounds")
            for form in wanted:
                rows.append(measure(name, network, form, image, cfg.benchmark.batch_sizes, cfg.benchmark.rounds))
                meter(partial(list, [f"{name} {form}"]))
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "benchmark.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.line(table(rows))
    console.line(f"written to {folder / 'benchmark.json'}")
    return rows


def networks(cfg: DictConfig) -> Iterator[tuple[str, Network]]:
    """The networks to measure, with their names, one at a time."""
    from detr_exp import build
    from detr_exp.data.fit import use_one_size
    from detr_exp.inference.detector import load
    from detr_exp.inference.members import chosen
    from detr_exp.model.member import become

    if cfg.checkpoint is not None and not cfg.published:
        _refuse_another(cfg.checkpoint)
        detector = load(cfg.checkpoint, hardware=build.hardware(cfg), allow_targets=cfg.allow_targets, at=cfg.at)
        yield " ".join(filter(None, (detector.path.stem, detector.at))), detector.network
        return
    asked = chosen(cfg.at, None)
    if not cfg.published:
        cfg.model.weights = None
    built = map(of_recipe, published()) if cfg.published else [build.network(cfg, _labels(cfg, 80))]
    for name, network in zip(published() if cfg.published else [type_name(cfg)], built):
        become(network, asked.member)
        if asked.member.image_size is not None:
            use_one_size(network)
        yield " ".join(filter(None, (name, asked.name))), network


def _refuse_another(checkpoint: str) -> None:
    """Refuse words of the command line that describe a network, where that of a checkpoint is measured.

    Raises:
        ValueError: there is one.
    """
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    if idle := [word for word in words if word.startswith(("model", "experiment="))]:
        raise ValueError(
            f"{idle[0]} describes a network, but that of checkpoint={checkpoint} is measured; leave one of them out. A "
            "smaller member of it: at.layers=..., at.queries=..., at.image_size=[height,width]"
        )


LABELS = {"keypoint": 1, "_voc": 20, "_obj365": 366}  # in the data of recipes that are not for COCO


def published() -> list[str]:
    """Recipes of published networks."""
    files = sorted((CONF_DIR / "experiment").glob("*.yaml"))
    return [path.stem for path in files if "# Published: nothing" not in path.read_text(encoding="utf-8")]


def of_recipe(name: str) -> Network:
    """The network of a published recipe with random weights, with the number of labels of its data."""
    from detr_exp import build

    cfg = build.compose([f"experiment={name}", "model.weights=null", "model.backbone.pretrained=false"])
    labels = next((number for word, number in LABELS.items() if word in name), 80)
    return build.network(cfg, _labels(cfg, labels))


def measure(
    name: str, network: Network, form: str, image: np.ndarray, batch_sizes: Sequence[int], rounds: int
) -> Measured:
    """Time one form of a network; `network` does not change."""
    import numpy as np

    from detr_exp.model.operations import gigaflops

    with TemporaryDirectory() as folder:
        program = in_form(network, form, Path(folder))
        inputs = program.inputs([image])
        memory = peak_memory(partial(program.run, inputs))
        (alone,) = interleaved([partial(program.run, inputs)], rounds)
        (whole,) = interleaved([partial(program.detect, [image])], rounds)
        batches = {size: program.inputs([image] * size) for size in batch_sizes}
        throughput = {
            size: size / float(np.median(interleaved([partial(program.run, batch)], rounds)))
            for size, batch in batches.items()
        }
    return Measured(
        name=name,
        form=form,
        parameters=sum(parameter.numel() for parameter in program.graph.network.parameters()),
        gflops=gigaflops(program.graph.network),
        median=1e3 * float(np.median(alone)),
        p95=1e3 * float(np.quantile(alone, 0.95)),
        all_median=1e3 * float(np.median(whole)),
        all_p95=1e3 * float(np.quantile(whole, 0.95)),
        throughput=throughput,
        memory=memory,
    )


def peak_memory(call: Callable[[], object]) -> float | None:
    """Peak MiB that `call` needs beyond the memory used before; None where the system does not report it."""
    import torch

    call()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return freed memory, so that it counts when it is allocated again
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def table(rows: Sequence[Measured]) -> str:
    """Rows under a head, aligned."""
    sizes = list(rows[0].throughput) if rows else []
    cells = [
        ["", "form", "parameters", "GFLOPs", "median", "p95", "with all steps", "p95"]
        + [f"images/s at {size}" for size in sizes]
        + ["MiB"]
    ]
    for row in rows:
        numbers = [row.gflops, row.median, row.p95, row.all_median, row.all_p95]
        cells.append(
            [row.name, row.form, f"{row.parameters:,}", *(f"{number:.1f}" for number in numbers)]
            + [f"{row.throughput[size]:.1f}" for size in sizes]
            + ["-" if row.memory is None else f"{row.memory:.0f}"]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]

    def aligned(line: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ]
        return "  ".join(padded)

    return "\n".join(map(aligned, cells))


def type_name(cfg: DictConfig) -> str:
    """Name of the network built from the overrides."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return choices.get("experiment") or choices.get("model") or cfg.model._target_.rpartition(".")[-1]


def _labels(cfg: DictConfig, number: int) -> Labels:
    """Labels for a network without data: COCO's, with RF-DETR's category ids, unless an override gives their number."""
    from detr_exp.data.classes import KnownLabels
    from detr_exp.data.keypoints import DEFAULT_SIGMA, KeypointSchema

    counts = cfg.model.get("keypoint_counts") or [17] * (cfg.data.num_classes or number)
    if cfg.data.num_classes is None and "keypoint_counts" in cfg.model:
        counts = cfg.model.keypoint_counts or [17]
        number = len(counts)
    elif cfg.data.num_classes is None and cfg.data.category_ids == "raw":
        number = 91
    names = [[str(point) for point in range(count)] for count in counts]
    keypoints = KeypointSchema(names, [[]] * len(names), [[]] * len(names), [DEFAULT_SIGMA] * max(counts), False)
    return KnownLabels(cfg.data.num_classes or number, keypoints=keypoints)


def _status(name: str) -> int:
    """Kibibytes, of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    cli.main(benchmark, "benchmark", USAGE)


if __name__ == "__main__":
    main()
