"""A file for other programs from a checkpoint, kept if its outputs are those of the checkpoint."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig

from detr_exp.terminal import say
from detr_exp.values import Values

if TYPE_CHECKING:
    import numpy as np

    from detr_exp.data.content import Split
    from detr_exp.deploy.graph import Graph
    from detr_exp.deploy.program import Program
    from detr_exp.inference.detector import Detector
    from detr_exp.inference.on_data import OnData
    from detr_exp.protocols import Metric

MEASURED = ("mAP", "segm_mAP", "keypoint_mAP")
AT_ONCE = 4  # images per run, where any number is allowed


def export_in(folder: Path, cfg: DictConfig, detector: Detector | None = None) -> Path:
    """Write `model.<suffix>` into a folder, if it passes the gate.

    Args:
        folder: made if absent.
        cfg: see `conf/export.yaml`.
        detector: to export, which does not change; None: that of `cfg.checkpoint`.

    Returns:
        the file.

    Raises:
        ValueError: the checkpoint, the data or the settings cannot be used.
        GateError: outputs of the file differ from those of the checkpoint.
    """
    from detr_exp.deploy import engines
    from detr_exp.deploy.program import GateError, Program
    from detr_exp.inference.writers import free

    settings = cfg.export
    detector = in_float32(cfg, detector)
    opened = checked_on(cfg, detector) if settings.source is None or settings.max_map_drop is not None else None
    exact, graph = graphs(detector, settings)
    path = free(folder / f"model{engines.SUFFIX.get(cfg.format, '')}")
    facts = description(detector, graph, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".export-", dir=folder
    ) as aside:  # no file gets its final name before it is complete
        draft = Path(aside) / path.name
        engines.write(cfg.format, graph, draft, facts=facts, batch_size=settings.batch_size, half=settings.half)
        exported = Program(exact, engines.open_file(cfg.format, draft), settings.batch_size)
        expected = Program(exact, engines.in_torch(exact))
        files = sorted(draft.parent.iterdir(), key=lambda file: file == draft)  # files that it refers to come first
        try:
            largest = None if settings.half else settings.max_difference
            compare_outputs(expected, exported, comparison_images(cfg, detector, opened), largest)
            if settings.max_map_drop is not None:
                compare_map(cfg, cast("OnData", opened), exported)
        except GateError:
            for file in files:
                file.rename(free(folder / f"{path.stem}_rejected{file.suffix}"))
            raise
        for file in files:
            file.replace(folder / file.name)
    return path


def in_float32(cfg: DictConfig, detector: Detector | None = None) -> Detector:
    """A detector, or the checkpoint, in float32, in the memory layout that engines expect."""
    import torch

    from detr_exp.inference.on_data import open_detector

    opened = open_detector(cfg) if detector is None else replace(detector, network=copy.deepcopy(detector.network))
    opened.refuse_several_sizes("an exported file")
    opened.network.to(memory_format=torch.contiguous_format)
    return opened


def graphs(detector: Detector, settings: DictConfig) -> tuple[Graph, Graph]:
    """The trained network, and the network folded for export, with the same pre- and postprocessing."""
    from detr_exp.deploy.graph import Graph, sample_discretely

    if settings.sampling not in (None, "discrete"):
        raise ValueError(f"export.sampling is {settings.sampling!r}; use discrete, or null for that of the training")
    both = []
    fit = detector.fit if not detector.fit.buckets else replace(detector.fit, name="letterbox", buckets=())  # one size
    for network in (copy.deepcopy(detector.network), copy.deepcopy(detector.network).deploy()):
        if settings.sampling == "discrete":
            sample_discretely(network)
        inside = {"preprocess": bool(settings.preprocess), "postprocess": bool(settings.postprocess)}
        both.append(Graph(network, **inside, fit=fit).eval())
    return both[0], both[1]


def description(detector: Detector, graph: Graph, settings: DictConfig) -> Values:
    """Metadata of the file for other programs."""
    height, width = detector.network.image_size
    batch = settings.batch_size or "B"
    fit = graph.fit
    shape = "without keeping shape"
    if fit.pads:
        shape = (
            f"as large as it fits with its shape, by the same factor in both directions and rounded to the nearest "
            f"pixel, in the top left corner; the rest is {list(fit.fill)} of 255"
        )
    channels = detector.channels
    kind = "RGB" if channels == 3 else "grey" if channels == 1 else "the channels of the training, in order,"
    images = f"float32 [{batch}, {channels}, {height}, {width}], {kind} in 0..1, resized by Pillow's bilinear {shape}"
    if settings.preprocess:
        images = f"uint8 [{batch}, H, W, {channels}], {kind.rstrip(',')}, of any size"
    inputs = {"images": images, "image_sizes": f"int64 [{batch}, 2], height and width of the original images"}
    schema = detector.keypoints
    return {
        "format": 1,
        "model": type(detector.network).__name__,
        "classes": detector.classes,
        "category_ids": detector.category_ids,
        "member": detector.at or None,
        "threshold": detector.threshold,
        "threshold_of": detector.measured_at or None,
        "activation": detector.network.activation,
        "cuts_boxes": detector.network.cuts_boxes,
        "image_size": [height, width],
        "fit": fit.name,
        "fill": list(fit.fill),
        "tiles": None if detector.tiles is None else asdict(detector.tiles),  # not in the file
        "inputs": {name: inputs[name] for name in graph.inputs},
        "outputs": graph.outputs,
        "boxes": "xyxy in pixels" if settings.postprocess else "cxcywh in 0..1" + " of the padded input" * fit.pads,
        "keypoints": None if schema is None else schema.names,
    }


def comparison_images(cfg: DictConfig, detector: Detector, opened: OnData | None) -> list[np.ndarray]:
    """The images on which outputs are compared."""
    from detr_exp.inference.detector import as_image
    from detr_exp.inference.images import find_images

    if cfg.export.source is not None:
        paths = find_images(cfg.export.source, detector.channels)[: cfg.export.images]
        return [as_image(path, detector.channels) for path in paths]
    split = cast("OnData", opened).data.split(cfg.data.split)
    return [split.image(index) for index in range(min(cfg.export.images, len(split)))]


def checked_on(cfg: DictConfig, detector: Detector) -> OnData:
    """The detector with the data on which the file is checked.

    Raises:
        ValueError: they cannot be read.
    """
    from detr_exp.inference.on_data import on_data

    try:
        return on_data(detector, cfg)
    except ValueError as error:
        raise ValueError(
            f"{error}. To check the file without these data: export.max_map_drop=null export.source=<images>"
        ) from error


def compare_outputs(
    expected: Program, exported: Program, images: list[np.ndarray], largest: float | None
) -> dict[str, float]:
    """Print the differences of the outputs on some images.

    Returns:
        for each output the 99th percentile of the differences of queries.

    Raises:
        GateError: scores or boxes exceed `largest`.
    """
    import numpy as np

    from detr_exp.deploy.program import GateError, differences

    sizes = np.array([image.shape[:2] for image in images])
    apart = differences(expected.outputs(images), exported.outputs(images), sizes)
    usual = {name: float(np.quantile(gaps, 0.99)) for name, gaps in apart.items()}
    listed = ", ".join(f"{name} {value:.1e} (all: {apart[name].max():.1e})" for name, value in usual.items())
    say(f"outputs on {len(images)} images differ in 99 % of the queries by at most: {listed}")
    over = {name: value for name, value in usual.items() if name in ("logits", "scores", "boxes")}
    if largest is not None and max(over.values()) > largest:
        raise GateError(
            f"outputs differ by {max(over.values()):.1e}, more than export.max_difference={largest}; the file is "
            "saved as rejected. export.max_difference=null only shows differences"
        )
    return usual


def compare_map(cfg: DictConfig, opened: OnData, exported: Program) -> dict[str, float]:
    """Print the mAP of checkpoint and file on the split, each with the steps of its users.

    Returns:
        the loss of the file for boxes, masks and keypoints; with a custom metric that of the monitored value.

    Raises:
        GateError: more than `export.max_map_drop`.
    """
    from detr_exp.deploy import engines
    from detr_exp.deploy.graph import Graph
    from detr_exp.deploy.program import GateError, Program

    detector = opened.detector
    plain = Graph(detector.network, preprocess=False, postprocess=False, fit=detector.fit).eval()
    metric = opened.metric(cfg.data.split)
    split = opened.data.split(cfg.data.split)
    before = evaluated(metric, split, Program(plain, engines.in_torch(plain)), "checkpoint")
    after = evaluated(metric, split, exported, "file")
    monitor = str(opened.detector.cfg.trainer.monitor).removeprefix("val/")  # for a custom metric
    names = [name for name in MEASURED if name in before] or [name for name in (monitor,) if name in before]
    drops = {name: before[name] - after[name] for name in names}
    for name in drops:
        say(f"{name} on {cfg.data.split}: checkpoint {before[name]:.4f}, file {after[name]:.4f}")
    if max(drops.values(), default=0) > cfg.export.max_map_drop:
        raise GateError(
            f"the file loses {max(drops.values()):.4f} mAP, more than export.max_map_drop={cfg.export.max_map_drop}; "
            "it is saved as rejected" + ("; try export.half=false" if cfg.export.half else "")
        )
    return drops


def evaluated(metric: Metric, split: Split, program: Program, name: str) -> dict[str, float]:
    """All metrics of a program on a split."""
    from detr_exp.trainer.console import Console

    metric.reset()
    at_once = program.batch_size or AT_ONCE
    with Console("rich").progress(f"evaluating the {name}", len(split)) as meter:
        for start in range(0, len(split), at_once):
            chunk = range(start, min(start + at_once, len(split)))
            metric.update([split.image_ids[i] for i in chunk], program.detect([split.image(i) for i in chunk]))
            meter(advance=len(chunk))
    return metric.compute()
