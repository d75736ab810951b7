"""The first scores of the classes are the requested ones, in every family."""

from __future__ import annotations

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import compose

FAMILIES = ["rtdetrv2_tiny", "dfine_tiny", "deimv2_atto", "lwdetr_tiny", "rfdetr_seg_tiny", "rfdetr_keypoint_tiny"]


def biases(*overrides: str) -> dict[str, torch.Tensor]:
    """The scores that the biases of the class heads stand for, by name."""
    made = build.network(compose(["data.num_classes=3", *overrides]))
    state = made.state_dict()
    return {name: state[name].sigmoid() for name in made.class_tensors() if name.endswith("bias")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prior", "score"), [("null", 0.01), ("0.2", 0.2), ("auto", 0.25)])
def test_classes_start_at_the_prior(family: str, prior: str, score: float) -> None:
    extra = ["model.keypoint_counts=[3,0,0]"] if "keypoint" in family else []
    found = biases(f"model={family}", f"model.class_prior={prior}", *extra)
    assert found
    for name, scores in found.items():
        torch.testing.assert_close(scores, torch.full_like(scores, score), msg=name)


def test_nothing_else_changes() -> None:
    torch.manual_seed(0)
    plain = build.network(compose(["data.num_classes=3", "model=rtdetrv2_tiny"])).state_dict()
    torch.manual_seed(0)
    made = build.network(compose(["data.num_classes=3", "model=rtdetrv2_tiny", "model.class_prior=0.2"]))
    heads = {name for name in made.class_tensors() if name.endswith("bias")}
    assert {name for name, tensor in made.state_dict().items() if not tensor.equal(plain[name])} == heads


def test_scores_that_depend_on_each_other_have_none() -> None:
    with pytest.raises(ValueError, match=r"softmax are not independent of each other: model\.class_prior=null"):
        build.network(compose(["data.num_classes=3", "model=rtdetrv2_tiny", "loss=ce", "model.class_prior=0.1"]))


def test_a_backbone_that_would_attend_to_padding_is_refused() -> None:
    words = ["model=rfdetr", "data.num_classes=3", "model/backbone=timm", "model.image_size=[64,64]"]
    words += ["model.backbone.name=test_vit", "model.backbone.out_strides=[16]", "model.num_queries=4"]
    build.network(compose(words))
    with pytest.raises(ValueError, match=r"data\.fit is letterbox, but the \w*Attention of model\.backbone"):
        build.network(compose([*words, "data.fit=letterbox"]))
    build.network(compose(["model=rtdetrv2_tiny", "data.num_classes=3", "data.fit=letterbox"]))
