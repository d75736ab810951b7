"""EdgeCrafter's smaller parts: its pyramid, what deployment keeps, and which weights it takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from ec_peer import SMALL, official_of

from detr_exp.build import compose, criterion
from detr_exp.model.backbone.rope_vit import RopeViT
from detr_exp.model.backbone.spatial_adapter import MeanPyramid
from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_ec import from_official
from detr_exp.structures import MaskLogits, leaves

MASKS = ["model=ecseg_s", *SMALL[1:]]
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


@pytest.mark.parametrize(("loss", "words"), [("vfl", SMALL), ("deim", SMALL), ("deim", MASKS)])
def test_every_parameter_is_trained_also_without_objects(loss, words, make, no_objects) -> None:
    network = make(*words).train()
    no_objects = replace(no_objects, masks=torch.zeros(0, 64, 96, dtype=torch.bool))
    terms = criterion(compose([*words, "data.num_classes=7", f"loss={loss}"]))(
        network(IMAGES, no_objects), no_objects, 0.0
    )
    assert all(term.isfinite() for term in terms.values())
    terms["total"].backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("words", [SMALL, MASKS, [*MASKS, "model.mask_head.eval_blocks=1"]])
def test_deployment_changes_nothing(words, make, randomise) -> None:
    network = randomise(make(*words).double()).eval()
    with torch.no_grad():
        expected = list(leaves(network(IMAGES.double()).pred))
        found = list(leaves(network.deploy()(IMAGES.double()).pred))
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_masks_before_the_layers_are_those_of_the_last(make, targets) -> None:
    outputs = make(*MASKS).train()(IMAGES, replace(targets, masks=torch.ones(3, 64, 96, dtype=torch.bool)))
    for layers, initial in ((outputs.layers, outputs.initial), (outputs.denoising.layers, outputs.denoising.initial)):
        assert layers.masks.dense().shape == (2, 3, layers.boxes.shape[2], 16, 24)
        assert torch.equal(initial.masks.dense(), layers.masks.dense()[-1])
    assert outputs.encoder.masks is None


def test_denoising_masks_are_compared_with_those_of_their_objects(make, targets) -> None:
    """Their pairs are group by group: exchanging the masks of two images must not go unnoticed."""
    masks = torch.zeros(3, 64, 96, dtype=torch.bool)
    masks[2] = True
    at = [f"loss.terms.{name}.at=[layers,initial,denoising]" for name in ("mask_ce", "mask_dice")]
    cfg = compose([*MASKS, "data.num_classes=7", "loss=deim", *at])
    network = make(*MASKS).train()
    outputs = network(IMAGES, replace(targets, masks=masks))
    # the last object is the only one of the last image
    pixels = torch.where(torch.arange(3) == 2, 20.0, -20.0)[None, :, None, None, None].expand(2, 3, 1, 16, 24)
    queries = torch.ones(*outputs.denoising.layers.boxes.shape[:3], 1)
    certain = MaskLogits(pixels, queries, torch.zeros(1))
    copies = outputs.denoising._replace(layers=outputs.denoising.layers._replace(masks=certain))
    terms = criterion(cfg)(outputs._replace(denoising=copies), replace(targets, masks=masks), 3.0)
    assert terms["loss_mask_ce_dn_1"] < 1e-3 < terms["loss_mask_ce"]


def test_masks_need_the_last_layer(make) -> None:
    with pytest.raises(ValueError, match=r"eval_idx is 0, but the pixels of masks.*model\.eval_idx=-1"):
        make(*MASKS, "model.eval_idx=0")
    with pytest.raises(ValueError, match=r"eval_blocks is 3 but there are 2 layers.*eval_blocks=null"):
        make(*MASKS, "model.mask_head.eval_blocks=3")


@pytest.mark.parametrize("words", [SMALL, MASKS])
def test_files_of_the_authors_are_read(words, make, randomise, tmp_path) -> None:
    network, other = randomise(make(*words)), make(*words)
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
