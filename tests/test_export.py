"""Exported files give what the checkpoint gives, and do not leave the gate if they do not."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp import build
from detr_exp import export as command_line
from detr_exp.config.compose import compose
from detr_exp.data.fit import fit_of
from detr_exp.deploy import engines, export
from detr_exp.deploy.graph import Graph, sample_discretely
from detr_exp.deploy.program import GateError, Program, differences
from detr_exp.inference.detector import load
from detr_exp.model.postprocess import best_in_pixels
from detr_exp.structures import Prediction

Command = Callable[..., int]
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "onnx_predict.py"
TAPS = "model.backbone.body.taps=[0,1]"
NETWORKS = {
    "rtdetrv2": ["model=rtdetrv2_tiny", "model.image_size=[64,64]", "data.num_classes=4"],
    "dfine": ["model=dfine_tiny", "model/backbone=hgnetv2_b0", "model.image_size=[64,64]", "data.num_classes=4"],
    "deimv2": ["model=deimv2_atto", "model.image_size=[64,64]", "data.num_classes=4"],
    "ecseg": ["model=ecseg_s", "model.image_size=[64,64]", "data.num_classes=4", "model.backbone.body.depth=2", TAPS],
    "ecpose": ["model=ecpose_s", "model.image_size=[64,64]", "data.num_classes=2", "model.backbone.body.depth=2", TAPS],
    "lwdetr": [
        *("model=lwdetr_tiny", "model.image_size=[64,64]", "data.num_classes=4", "model.backbone.depth=2"),
        *("model.backbone.windowed=[0]", "model.backbone.taps=[0,1]", "model.neck.num_bottlenecks=1"),
    ],
    "rfdetr": ["model=rfdetr", "model.image_size=[96,96]", "data.num_classes=4"],
    "rfdetr_seg": ["model=rfdetr_seg", "model.image_size=[96,96]", "data.num_classes=4"],
    "rfdetr_keypoint": ["model=rfdetr_keypoint", "model.image_size=[96,96]", "data.num_classes=2"],
}
COUNTS = "model.keypoint_counts=[3,0]"


def noise_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def network(name: str) -> Any:
    """A small network of a kind whose numbers do not stand at their starts."""
    overrides = [*NETWORKS[name], "model.num_queries=10", *([COUNTS] if name in ("rfdetr_keypoint", "ecpose") else [])]
    torch.manual_seed(0)
    made = build.network(compose(overrides)).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    return made


def settled(folder: Path, trained: Path, *overrides: str) -> Path:
    given = [f"checkpoint={trained}", "trainer/hardware=cpu", "export.images=2", *overrides]
    return export.export_in(folder, compose(given, config_name="export"))


@pytest.fixture(scope="module")
def onnx(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as an ONNX file that passed the gate."""
    return settled(tmp_path_factory.mktemp("onnx"), trained)


@pytest.mark.parametrize("count", [1, 3])
def test_onnx_gives_the_outputs_of_the_checkpoint(onnx: Path, trained: Path, count: int) -> None:
    graph = Graph(load(trained).network.to(memory_format=torch.contiguous_format), preprocess=False, postprocess=False)
    given = noise_images(*[(40, 60), (64, 64), (90, 30)][:count])
    expected = Program(graph, engines.in_torch(graph)).outputs(given)
    result = Program(graph, engines.open_file("onnx", onnx, threads=1)).outputs(given)
    apart = differences(expected, result, np.array([image.shape[:2] for image in given]))
    assert set(apart) == {"logits", "boxes"}
    assert len(apart["boxes"]) == 20 * count
    assert max(gaps.max() for gaps in apart.values()) <= 1e-4


def test_the_file_says_what_it_takes_and_gives(onnx: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["detr_exp"])
    assert facts["classes"] == ["arrow", "kite", "house", "heart", "crescent", "figure"]
    assert facts["image_size"] == [64, 64]
    assert 0 <= facts["threshold"] <= 1
    assert facts["inputs"]["images"].startswith("float32 [B, 3, 64, 64], RGB in 0..1")
    assert [node.name for node in session.get_outputs()] == facts["outputs"] == ["logits", "boxes"]
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]


def test_the_script_needs_no_pytorch(onnx: Path, trained: Path, tmp_path: Path) -> None:
    (photo,) = noise_images((50, 70))
    Image.fromarray(photo).save(tmp_path / "photo.png")
    alone = "import runpy, sys; sys.modules['torch'] = sys.modules['hydra'] = None; "
    alone += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    overrides = [str(onnx), str(tmp_path / "photo.png"), str(tmp_path / "found.png"), "0.0"]
    message = subprocess.run(
        [sys.executable, "-c", alone, *overrides], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split() for line in message.splitlines()]
    (result,) = load(trained).predict([photo], threshold=0.0)
    first = result.scores.sort(descending=True).indices[0]
    assert lines[0][0] == load(trained).classes[result.labels[first]]
    assert [float(override) for override in lines[0][2:]] == pytest.approx(result.boxes[first].tolist(), abs=0.1)
    assert Image.open(tmp_path / "found.png").size == (70, 50)


def test_torchscript_with_all_steps_inside(trained: Path, tmp_path: Path) -> None:
    overrides = ["format=torchscript", "export.preprocess=true", "export.postprocess=true", "export.batch_size=1"]
    path = settled(tmp_path, trained, *overrides)
    (image,) = noise_images((75, 50))
    scores, _, boxes = engines.open_file("torchscript", path)([image[None]])
    (expected,) = load(trained).predict(image, threshold=0.0)
    assert scores[0] == pytest.approx(expected.scores.numpy(), abs=5e-3)  # a level of a pixel's 255
    inside = expected.boxes.clamp(min=0).minimum(torch.tensor([50.0, 75, 50, 75]))
    assert boxes[0, 0] == pytest.approx(inside[0].numpy(), abs=0.5)


def test_the_gate_keeps_back_what_differs(
    command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write = engines.write

    def perturbed(form: str, graph: Graph, path: Path, **settings: Any) -> None:
        with torch.no_grad():
            for parameter in graph.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        write(form, graph, path, **settings)

    monkeypatch.setattr(engines, "write", perturbed)
    assert not GateError.__module__.endswith("export")  # run as a command that module is `__main__`, and not known
    overrides = [f"checkpoint={trained}", "format=torchscript", "hydra.run.dir=out", "trainer/hardware=cpu"]
    assert command(command_line.main, *overrides) == 1
    assert "more than export.max_difference=0.001" in capfd.readouterr().err
    assert [path.name for path in Path("out").glob("model*")] == ["model_rejected.torchscript"]


@pytest.mark.slow
def test_the_gate_keeps_back_what_loses_accuracy(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"checkpoint": {"mAP": 0.5, "segm_mAP": 0.4}, "file": {"mAP": 0.499, "segm_mAP": 0.39}}
    monkeypatch.setattr(export, "evaluated", lambda metric, split, program, name: measured[name])
    assert settled(tmp_path, trained, "format=torchscript", "export.max_map_drop=0.011").exists()
    with pytest.raises(GateError, match=r"loses 0\.0100 mAP, more than export.max_map_drop=0\.005"):
        settled(tmp_path, trained, "format=torchscript")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=onxn"], "format is 'onxn'; use one of onnx, torchscript"),
        (["export.sampling=nearest"], "export.sampling is 'nearest'"),
        (["data=coco", "data.root=absent", "format=torchscript"], "export.max_map_drop=null export.source="),
    ],
)
def test_mistakes(
    command: Command, trained: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert command(command_line.main, f"checkpoint={trained}", *overrides) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("form", "package"), [("onnx", "onnxscript"), ("openvino", "openvino"), ("tensorrt", "tensorrt")]
)
def test_a_package_that_is_not_there(form: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(network("rtdetrv2"), preprocess=False, postprocess=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {package} .*: pip install 'detr_exp\["):
        engines.write(form, graph, tmp_path / "model", facts={})


@pytest.mark.parametrize("name", NETWORKS)
def test_detections_from_the_graph_are_those_of_the_network(name: str) -> None:
    made = network(name)
    inside = Graph(made, preprocess=False, postprocess=True)
    outside = Graph(made, preprocess=False, postprocess=False)
    given = noise_images((40, 60), (96, 80))
    result = Program(inside, engines.in_torch(inside)).detect(given)
    for one, other in zip(result, Program(outside, engines.in_torch(outside)).detect(given)):
        assert torch.allclose(one.scores, other.scores, atol=1e-6)
        assert torch.equal(one.labels, other.labels)
        assert torch.allclose(one.boxes, other.boxes, atol=1e-4)
        for part in ("keypoints", "keypoint_covariance"):
            assert (getattr(one, part) is None) == (getattr(other, part) is None)
            if getattr(one, part) is not None:
                assert torch.allclose(getattr(one, part), getattr(other, part), atol=1e-3, equal_nan=True)
        if one.masks is not None and other.masks is not None:
            assert (one.masks == other.masks).float().mean() > 0.999


@pytest.mark.parametrize("name", ["rtdetrv2", "rfdetr_seg", "rfdetr_keypoint"])
def test_images_with_their_proportions_inside_the_graph(name: str) -> None:
    """With all steps inside, with some, and with none, the detections are those of the network."""
    made, given = network(name), noise_images((40, 90), (150, 31))
    fit = fit_of("letterbox", made)
    found = []
    for before, after in ((False, False), (False, True), (True, True)):
        graph = Graph(made, preprocess=before, postprocess=after, fit=fit)
        assert graph.inputs == (["images"] if before else ["images", "image_sizes"])
        found.append(Program(graph, engines.in_torch(graph)).detect(given))
    for first, *others in zip(*found):
        for one in others:
            assert torch.allclose(one.scores, first.scores, atol=5e-3)  # a level of a pixel's 255
            same = (one.boxes - first.boxes[0]).abs().amax(1).argmin()  # rounding may change the order of equal scores
            assert torch.allclose(one.boxes[same], first.boxes[0], atol=0.5)
            for part in ("keypoints", "masks"):
                assert (getattr(one, part) is None) == (getattr(first, part) is None)
            if one.masks is not None:
                assert (one.masks[same] == first.masks[0]).float().mean() > 0.96


@pytest.mark.parametrize("form", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_file_fits_images_of_any_shape(form: str, tmp_path: Path) -> None:
    made = network("rtdetrv2")
    graph = Graph(made, preprocess=True, postprocess=True, fit=fit_of("letterbox", made)).eval()
    path = tmp_path / f"model{engines.SUFFIX[form]}"
    engines.write(form, graph, path, facts={})
    run, given = engines.open_file(form, path, threads=1), noise_images((40, 90), (96, 80), (150, 31), (64, 64))
    expected = Program(graph, engines.in_torch(graph)).outputs(given)
    apart = differences(expected, Program(graph, run).outputs(given), np.array([image.shape[:2] for image in given]))
    assert max(np.quantile(gaps, 0.9) for gaps in apart.values()) < 1e-3


@pytest.mark.parametrize(
    "name", ["rtdetrv2", *(pytest.param(name, marks=pytest.mark.slow) for name in [*NETWORKS][1:])]
)
def test_half_precision_changes_little(name: str) -> None:
    """All weights and constants in float16; what needs more digits, such as boxes, is computed with them."""
    graph = Graph(network(name), preprocess=False, postprocess=True).eval()
    given = noise_images((40, 60), (96, 80))
    program = Program(graph, engines.in_torch(graph))
    expected = program.outputs(given)
    graph.half()
    apart = differences(expected, program.outputs(given), np.array([image.shape[:2] for image in given]))
    assert np.median(apart["scores"]) < 1e-3
    assert np.median(apart["boxes"]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name"),
    [(form, name) for form in ("onnx", "torchscript") for name in (*NETWORKS, "discrete")]
    + [("openvino", "rtdetrv2"), ("openvino", "dfine"), ("openvino", "rfdetr_seg")],
)
def test_every_network_in_every_format(form: str, name: str, tmp_path: Path) -> None:
    if form != "torchscript":
        pytest.importorskip("openvino" if form == "openvino" else "onnxruntime")
    made = network("rtdetrv2" if name == "discrete" else name)
    if name == "discrete":
        sample_discretely(made)
    graph = Graph(made, preprocess=False, postprocess=True).eval()
    path = tmp_path / f"model{engines.SUFFIX[form]}"
    engines.write(form, graph, path, facts={"classes": []})
    run = engines.open_file(form, path, threads=1)
    for count in (1, 3):
        given = noise_images(*[(40, 60), (96, 80), (30, 90)][:count])
        expected = Program(graph, engines.in_torch(graph)).outputs(given)
        apart = differences(expected, Program(graph, run).outputs(given), np.array([p.shape[:2] for p in given]))
        assert np.quantile(np.stack([apart["scores"], apart["boxes"]]), 0.9) < 1e-3


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("cut", [False, True])
def test_the_script_makes_the_same_of_outputs(activation: str, cut: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    pred = Prediction(torch.randn(1, 7, 4, generator=draw), torch.rand(1, 7, 4, generator=draw) * 1.5)
    network = SimpleNamespace(activation=activation, num_queries=7, cuts_boxes=cut)
    (expected,) = best_in_pixels(network, pred, torch.tensor([[50, 70]])).detections()
    facts = {"activation": activation, "cuts_boxes": cut, "image_size": [64, 96], "fit": "stretch"}
    made = runpy.run_path(str(SCRIPT))["detections"](
        pred.logits[0].numpy(), pred.boxes[0].numpy(), np.array([50, 70]), facts
    )
    assert made["labels"].tolist() == expected.labels.tolist()
    assert made["scores"] == pytest.approx(expected.scores.numpy(), abs=1e-6)
    assert made["boxes"] == pytest.approx(expected.boxes.numpy(), abs=1e-4)
    assert bool(made["boxes"].min() < 0) is not cut
