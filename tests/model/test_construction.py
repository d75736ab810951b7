"""The first scores of the classes are the requested ones, in every family; first layers read other channels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.model.construction import for_channels, set_channels

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


class Small(nn.Module):
    """What `set_channels` needs of a network."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*layers)
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1), persistent=False)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 13])
def test_equal_channels_give_what_they_gave_before_and_each_acts(channels: int) -> None:
    torch.manual_seed(0)
    weight, grey = torch.randn(8, 3, 3, 3), torch.rand(2, 1, 9, 9)
    made = for_channels(weight, channels)
    assert made.shape == (8, channels, 3, 3)
    before, now = F.conv2d(grey.expand(-1, 3, -1, -1), weight), F.conv2d(grey.expand(-1, channels, -1, -1), made)
    torch.testing.assert_close(now, before)
    assert (made.flatten(2).abs().sum((0, 2)) > 0).all()
    if channels == 3:
        assert torch.equal(made, weight)
    if channels > 3:
        torch.testing.assert_close(made[:, 0] / made[:, 3], torch.ones(8, 3, 3))


def test_all_layers_that_read_colours_are_adapted_and_no_others() -> None:
    network = Small(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(3, 2, 1, bias=False))
    network.backbone[0].weight.requires_grad_(False)
    before = network.backbone[1].weight.clone()
    set_channels(network, 5)
    assert [layer.in_channels for layer in network.backbone] == [5, 4, 5]
    assert [layer.weight.shape[1] for layer in network.backbone] == [5, 1, 5]
    assert [layer.weight.requires_grad for layer in network.backbone] == [False, True, True]
    assert torch.equal(network.backbone[1].weight, before)
    assert network.pixel_mean.flatten().tolist() == pytest.approx([0.2, 0.4, 0.6, 0.2, 0.4])
    set_channels(network, 5)  # it has them
    assert network.backbone[0].in_channels == 5


def test_grey_has_the_mean_of_means_and_a_backbone_of_something_else_is_refused() -> None:
    network = Small(nn.Conv2d(3, 4, 3))
    set_channels(network, 1)
    assert network.pixel_std.flatten().tolist() == pytest.approx([0.4])
    with pytest.raises(
        ValueError, match=r"data\.channels is 4, but no convolution of model\.backbone.*data\.channels=3"
    ):
        set_channels(Small(nn.Conv2d(48, 4, 3)), 4)
    set_channels(SimpleNamespace(pixel_mean=torch.zeros(3, 1, 1)), 3)  # nothing to do
