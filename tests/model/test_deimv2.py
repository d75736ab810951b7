"""DEIMv2's smaller parts: what they compute, what deployment keeps, and which weights it takes."""

from __future__ import annotations

import pytest
import torch
from deimv2_peer import FEW, official_of

from detr_exp.build import compose, criterion
from detr_exp.model.backbone.hgnetv2 import HGNetv2, to_official_names
from detr_exp.model.decoder.dfine import DFineDecoder
from detr_exp.model.layer.activation import SwiGLU, feed_forward_activation
from detr_exp.model.layer.norm import RMSNorm, norm
from detr_exp.model.neck.lite_encoder import LiteEncoder
from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_deimv2 import from_official
from detr_exp.structures import leaves

SMALL = ["model=deimv2_atto", "model.image_size=[96,96]", *FEW]
IMAGES = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))
B0 = {"out_strides": [16], "freeze_at": -1, "freeze_norm": False, "affine": True}


def test_a_norm_is_torchs_and_computes_in_float32() -> None:
    ours, theirs = RMSNorm(8), torch.nn.RMSNorm(8, eps=1e-6)
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours.scale.uniform_(0.5, 2)
        theirs.weight.copy_(ours.scale)
    torch.testing.assert_close(ours(tokens), theirs(tokens))
    assert ours(2e3 * tokens.half()).isfinite().all(), "squares of half precision overflow"
    with pytest.raises(ValueError, match=r"model\.norm_type is 'batch'; use layer or rms: model\.norm_type=layer"):
        norm("batch", 8)


def test_swiglu_leaves_half_of_the_channels() -> None:
    tokens = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.silu(tokens[:, :4]) * tokens[:, 4:]
    torch.testing.assert_close(SwiGLU()(tokens), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"dim_feedforward is 7, but swiglu.*model\.dim_feedforward=8"):
        feed_forward_activation("swiglu", 7)


def test_the_light_neck_makes_two_maps_of_one() -> None:
    settings = {"hidden_dim": 16, "expansion": 0.5, "depth_mult": 0.5, "act": "silu"}
    neck = LiteEncoder(channels=[6], strides=[16], **settings)
    outputs = neck([torch.rand(2, 6, 4, 10)])
    assert [tuple(level.shape) for level in outputs] == [(2, 16, 4, 10), (2, 16, 2, 5)]
    assert (neck.out_channels, neck.out_strides) == ([16, 16], [16, 32])
    sum(level.square().sum() for level in outputs).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())
    with pytest.raises(ValueError, match=r"maps of strides \[8, 16\].*model\.backbone\.out_strides=\[16\]"):
        LiteEncoder(channels=[6, 8], strides=[8, 16], **settings)


@pytest.mark.parametrize("loss", ["vfl", "mal", "deim"])
def test_every_parameter_is_trained_also_without_objects(loss, make, no_objects) -> None:
    network = make(*SMALL).train()
    terms = criterion(compose([*SMALL, "data.num_classes=7", f"loss={loss}"]))(
        network(IMAGES, no_objects), no_objects, 0.0
    )
    assert all(term.isfinite() for term in terms.values())
    terms["total"].backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_boxes_in_full(dtype, make, targets) -> None:
    network = make(*SMALL).train()
    with torch.autocast("cpu", dtype):
        layers = network(IMAGES, targets).layers
    assert {tensor.dtype for tensor in leaves(layers)} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in leaves(layers))


@pytest.mark.parametrize("eval_idx", [-1, 1])
def test_deployment_changes_nothing(eval_idx, make, randomise) -> None:
    network = randomise(make(*SMALL, f"model.eval_idx={eval_idx}").double()).eval()
    with torch.no_grad():
        expected = network(IMAGES.double()).pred
        before = sum(parameter.numel() for parameter in network.parameters())
        found = network.deploy()(IMAGES.double()).pred
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-9)
    assert sum(parameter.numel() for parameter in network.parameters()) < before
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize("size", ["atto", "n"])
def test_files_of_the_authors_are_read(size, make, randomise, tmp_path) -> None:
    words = [f"model=deimv2_{size}", "model.image_size=[96,96]", *FEW]
    network, other = randomise(make(*words)), make(*words)
    state, official = network.state_dict(), official_of(network)
    back = from_official(official)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert "decoder.dec_bbox_head.2.layers.0.weight" in official
    torch.save({"model": {}, "ema": {"module": official}}, tmp_path / "deimv2.pth")
    counted = len([name for name in state if "num_batches" not in name])
    assert load_weights(other, tmp_path / "deimv2.pth").startswith(f"{counted} of {counted} ")
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert read_weights(tmp_path / "deimv2.pth").origin == "official DEIMv2"


def test_a_file_of_another_network_names_its_own(make, tmp_path) -> None:
    torch.save({"model": official_of(make(*SMALL))}, tmp_path / "model.pth")
    for other in ("dfine_n", "deimv2_n", "rtdetrv2_tiny"):
        with pytest.raises(ValueError, match=r"does not fit the network.*choose model=deimv2_atto"):
            load_weights(make(f"model={other}", "model.image_size=[96,96]", *FEW), tmp_path / "model.pth")


def test_a_decoder_of_mixed_parts_has_no_official_file(make) -> None:
    from detr_exp.model import pretrained_deimv2, pretrained_dfine

    decoder = make(*SMALL, "model.encoder_output=true").decoder
    assert isinstance(decoder, DFineDecoder)
    with pytest.raises(ValueError, match=r"not all else of DEIMv2.*format=safetensors"):
        pretrained_deimv2.official_name(decoder)
    plain = make(*SMALL, "model.ffn_activation=relu", "model.head_activation=relu").decoder
    with pytest.raises(ValueError, match=r"model/decoder=dfine; use format=safetensors"):
        pretrained_dfine.official_name(plain)


def test_what_fits_of_the_weights_of_b0_is_a_start(tmp_path) -> None:
    whole = HGNetv2(size="B0", pretrained=False, **B0 | {"out_strides": [16, 32]}).state_dict()
    torch.save({to_official_names(name): tensor for name, tensor in whole.items()}, tmp_path / "b0.pth")
    taken = {}
    for size in ("Atto", "Femto", "Pico"):
        state = HGNetv2(size=size, pretrained=str(tmp_path / "b0.pth"), **B0).state_dict()
        taken[size] = {name for name in state if name in whole and torch.equal(state[name], whole[name])}
        assert all(name in taken[size] for name in state if name.startswith(("stem.", "stages.0.", "stages.1.")))
        assert size == "Atto" or taken[size] == state.keys()
    widths = {name for name in taken["Femto"] if name.startswith("stages.2.")} - taken["Atto"]
    assert "stages.2.blocks.0.aggregation_excitation_conv.conv.weight" in widths
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit the backbone"):
        HGNetv2(size="Atto", pretrained=str(tmp_path / "other.pth"), **B0)


def test_the_parts_have_three_stages() -> None:
    with pytest.raises(ValueError, match=r"out_strides is \[16, 32\]; choose some of \[4, 8, 16\]"):
        HGNetv2(size="Pico", pretrained=False, **B0 | {"out_strides": [16, 32]})
