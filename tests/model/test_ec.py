"""EdgeCrafter's smaller parts: its pyramid, what deployment keeps, and which weights it takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ec_peer import SMALL, official_of

from detr_exp.build import compose, criterion
from detr_exp.model.backbone.rope_vit import RopeViT
from detr_exp.model.backbone.spatial_adapter import MeanPyramid
from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_ec import from_official

IMAGES = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(2))
BODY = {"width": 16, "num_heads": 2, "depth": 3, "stem": "convolutions", "ffn_ratio": 2}


@pytest.mark.parametrize(("channels", "projected"), [(16, 1), (8, 3)])
def test_maps_are_of_the_mean_of_blocks(channels, projected) -> None:
    torch.manual_seed(0)
    backbone = MeanPyramid(body=partial(RopeViT, **BODY, taps=[1, 2]), channels=channels, pretrained=False).eval()
    maps = backbone(IMAGES)
    assert [tuple(level.shape[1:]) for level in maps] == [(channels, 8, 12), (channels, 4, 6), (channels, 2, 3)]
    assert len(backbone.projector) == projected
    if projected == 1:
        first, second = backbone.body(IMAGES)
        torch.testing.assert_close(maps[1], (first + second) / 2)
    sum(level.square().sum() for level in maps).backward()
    assert [name for name, tensor in backbone.named_parameters() if tensor.grad is None] == []


def test_mistakes_name_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"stem is 'conv'; use patches or convolutions: .*stem=patches"):
        RopeViT(**BODY | {"stem": "conv"}, taps=[0], pretrained=False)


@pytest.mark.parametrize("loss", ["vfl", "deim"])
def test_every_parameter_is_trained_also_without_objects(loss, make, no_objects) -> None:
    network = make(*SMALL).train()
    terms = criterion(compose([*SMALL, "data.num_classes=7", f"loss={loss}"]))(
        network(IMAGES, no_objects), no_objects, 0.0
    )
    assert all(term.isfinite() for term in terms.values())
    terms["total"].backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_deployment_changes_nothing(make, randomise) -> None:
    network = randomise(make(*SMALL).double()).eval()
    with torch.no_grad():
        expected = network(IMAGES.double()).pred
        found = network.deploy()(IMAGES.double()).pred
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-9)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_files_of_the_authors_are_read(make, randomise, tmp_path) -> None:
    network, other = randomise(make(*SMALL)), make(*SMALL)
    state, official = network.state_dict(), official_of(network)
    back = from_official(official)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    torch.save({"model": {}, "ema": {"module": official}}, tmp_path / "ecdet_s.pth")
    counted = len([name for name in state if "num_batches" not in name])
    assert load_weights(other, tmp_path / "ecdet_s.pth").startswith(f"{counted} of {counted} ")
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert read_weights(tmp_path / "ecdet_s.pth").origin == "official EdgeCrafter"


def test_files_of_a_transformer_alone_are_read(tmp_path) -> None:
    made = RopeViT(**BODY, taps=[1, 2], pretrained=False)
    official = official_of_body(made.state_dict())
    torch.save(official, tmp_path / "ecvit.pth")
    again = RopeViT(**BODY, taps=[1, 2], pretrained=str(tmp_path / "ecvit.pth"))
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert {"register_token", "patch_embed.convs.0.conv.weight", "blocks.0.attn.qkv.weight"} <= official.keys()


def official_of_body(state):
    """The names of a file of the transformer alone: those of a whole network without their beginning."""
    from detr_exp.model.pretrained_ec import OFFICIAL
    from detr_exp.model.pretrained_rtdetr import renamed_by

    renamed = renamed_by({f"backbone.body.{name}": tensor for name, tensor in state.items()}, OFFICIAL)
    return {name.removeprefix("backbone.backbone."): tensor for name, tensor in renamed.items()}
