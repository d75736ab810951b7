"""Exported members are their checkpoints, in all families and tasks."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from detr_exp.build import compose, network
from detr_exp.deploy import engines
from detr_exp.deploy.graph import Graph
from detr_exp.deploy.program import Program, differences
from detr_exp.model.member import Member, become

NARROW = ["model.image_size=[64,96]", "model.hidden_dim=32", "model.dim_feedforward=48", "model.num_queries=24"]
FAMILIES = {
    "rtdetrv2": ["model=rtdetrv2_tiny", "model.neck.hidden_dim=32"],
    "dfine": ["model=dfine_tiny", "model.neck.hidden_dim=32"],
    "rfdetr": [
        *("model=rfdetr", "model.num_groups=2", "model.neck.num_bottlenecks=1", "model.num_cross_heads=4"),
        *(f"model.backbone.{key}" for key in ("width=32", "num_heads=2", "patch_size=8", "out_blocks=[1,2]")),
    ],
    "deimv2": ["model=deimv2_atto", "model.neck.hidden_dim=32"],
    "ecseg": [
        *("model=ecseg_s", "model.neck.hidden_dim=32", "model.backbone.channels=32"),
        *(f"model.backbone.body.{key}" for key in ("width=32", "num_heads=2", "depth=2", "taps=[0,1]")),
    ],
    "poses": [
        *("model=ecpose_s", "model.neck.hidden_dim=32", "model.backbone.channels=32", "model.keypoint_counts=[3,0,2]"),
        *(f"model.backbone.body.{key}" for key in ("width=32", "num_heads=2", "depth=2", "taps=[0,1]")),
    ],
    "lwdetr": [
        *("model=lwdetr_tiny", "model.num_groups=2", "model.neck.num_bottlenecks=1", "model.num_cross_heads=4"),
        *(f"model.backbone.{key}" for key in ("width=32", "num_heads=2", "depth=2", "num_windows=2")),
        *("model.backbone.windowed=[0]", "model.backbone.taps=[0,1]"),
    ],
    "masks": ["model=rfdetr_seg_tiny"],
    "keypoints": ["model=rfdetr_keypoint_tiny", "model.keypoint_counts=[3,0,2]"],
}


MEMBERS = [
    *(Member(2, 11, (96, 64)), Member(1, 3, (64, 64)), Member(layers=1), Member(queries=5)),
    *(Member(image_size=(128, 96)), Member(3, 24, (64, 96)), Member()),
]
CASES = [("onnx", MEMBERS[0]), *(("torchscript", member) for member in MEMBERS)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "member"), CASES, ids=str)
def test_an_exported_member_equals_its_checkpoint(family: str, form: str, member: Member, tmp_path: Path) -> None:
    if form == "onnx" and not importlib.util.find_spec("onnxscript"):
        pytest.skip("onnxscript is not installed")
    torch.manual_seed(0)
    made = network(compose([*FAMILIES[family], *NARROW, "model.num_layers=3", "data.num_classes=3"])).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    whole = sum(parameter.numel() for parameter in made.parameters())
    become(made, member)
    exact = Graph(made, preprocess=False, postprocess=False).eval()
    expected = Program(exact, engines.in_torch(exact))
    images = [np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8) for seed in range(2)]
    wanted = expected.outputs(images)
    folded = copy.deepcopy(made).deploy()
    assert sum(parameter.numel() for parameter in folded.parameters()) < whole
    path = tmp_path / f"model{engines.SUFFIX[form]}"
    graph = Graph(folded, preprocess=False, postprocess=False).eval()
    engines.write(form, graph, path, facts={})
    found = Program(exact, engines.open_file(form, path)).outputs(images)
    assert found["boxes"].shape == (2, member.queries or 24, 4)
    sizes = np.array([image.shape[:2] for image in images])
    apart = differences(wanted, found, sizes)
    assert max(np.quantile(gaps, 0.99) for gaps in apart.values()) < 1e-3
