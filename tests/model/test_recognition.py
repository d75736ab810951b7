"""A file of another network names the overrides that choose its network."""

from __future__ import annotations

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.model.recognition import network_of

RECIPES = {
    "rtdetrv2_r18vd_sp1_120e_coco": "model=rtdetrv2 model/backbone=r18vd model.num_points=[1,1,1]",
    "rtdetrv2_r34vd_120e_coco": "model=rtdetrv2 model/backbone=r34vd model.num_layers=4",
    "rtdetrv2_r50vd_m_7x_coco": "model=rtdetrv2 model/backbone=r50vd model.num_layers=6",
    "rtdetrv2_r101vd_6x_coco": "model=rtdetrv2 model/backbone=r101vd model.num_layers=6 model.neck.hidden_dim=384 "
    "model.neck.dim_feedforward=2048 model.neck.expansion=1.0",
    "rtdetrv2_hgnetv2_h_6x_coco": "model=rtdetrv2 model/backbone=hgnetv2_h model.num_layers=6 "
    "model.neck.hidden_dim=512 model.neck.dim_feedforward=2048 model.neck.num_encoder_layers=2 "
    "model.neck.expansion=1.0",
    "demo": "model=rtdetrv2_tiny model/backbone=tiny",
    "rfdetr_seg_small_coco": "model=rfdetr_seg_small",
    "rfdetr_large_coco": "model=rfdetr_large",
}


def state(*words: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a network, without values."""
    always = ["model.weights=null", "model.backbone.pretrained=false", "data.num_classes=80"]
    if words[0].startswith("model=ecpose"):
        always.append(f"model.keypoint_counts={[17] * 80}")
    with torch.device("meta"):
        return build.network(compose([*words, *always])).state_dict()


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_network_is_recognised(name: str) -> None:
    assert network_of(state(f"experiment={name}")) == RECIPES[name]


DFINE = ["dfine_n", "dfine_s", "dfine_m", "dfine_l", "dfine_tiny"]
DEIMV2 = ["deimv2_atto", "deimv2_femto", "deimv2_pico", "deimv2_n", "deimv2_s"]
EC = ["ecdet_l", "ecseg_m", "ecpose_m"]


LWDETR = ["lwdetr_tiny", "lwdetr_small", "lwdetr_medium", "lwdetr_large", "lwdetr_xlarge"]


@pytest.mark.parametrize("name", [*LWDETR, *DFINE, *DEIMV2, *EC])
def test_a_network_of_edges_is_recognised(name: str) -> None:
    assert network_of(state(f"model={name}")) == f"model={name}"


def test_the_scale_of_edges_is_read_from_the_weights() -> None:
    tensors = state("model=dfine_x") | {"decoder.reg_scale": torch.tensor([8.0])}
    assert network_of(tensors) == "model=dfine_x"
    assert network_of(tensors | {"decoder.reg_scale": torch.tensor([6.0])}) == "model=dfine_x model.edge_scale=6.0"


@pytest.mark.parametrize(
    "words",
    [
        ["model=dfine_tiny", "model.num_layers=2", "model.neck.depth_mult=0.67", "model.neck.expansion=0.25"],
        ["model=dfine", "model/backbone=hgnetv2_b3", "model.num_layers=4", "model.dim_feedforward=512"],
        ["model=rtdetrv2_tiny", "model.backbone.blocks=[1,2,1,1]", "model.neck.hidden_dim=64", "model.num_layers=2"],
        pytest.param(["experiment=rtdetrv2_r101vd_6x_coco"], marks=pytest.mark.slow),
        pytest.param(["experiment=rtdetrv2_hgnetv2_h_6x_coco"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_overrides_make_that_network(words: list[str]) -> None:
    made = state(*words)
    again = state(*network_of(made).split())
    assert {name: tensor.shape for name, tensor in again.items()} == {name: t.shape for name, t in made.items()}


def test_what_is_of_another_family_is_not_recognised() -> None:
    assert network_of({"backbone.body.conv1.weight": torch.zeros(1)}) == ""
