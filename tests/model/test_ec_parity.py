"""EdgeCrafter against libreyolo: random weights, float64, square images; equal inputs, outputs, losses, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deimv2_peer import FEW, in_float64
from ec_peer import at_fixed_points, libre_criterion, libre_of, libre_seg_criterion, official_of
from edges_peer import CLOSE, compare_gradients, compare_losses, compare_outputs, given, gradients_of, images, normal

from detr_exp.build import compose, criterion

# Parameters with 80 classes: all, of backbone, encoder and decoder. Published totals count two constants, the bound and
# the scale of edges, which are buffers here.
TOTALS = {
    "s": (9_884_102, 5_594_712, 1_367_360, 2_922_030),
    "m": (19_431_502, 9_932_064, 3_802_368, 5_697_070),
    "l": (32_966_110, 22_463_664, 4_805_376, 5_697_070),
    "x": (49_941_982, 29_550_768, 12_592_896, 7_798_318),
}
LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in ("m", "l", "x")]


SEG_TOTALS = {"s": 10_411_911, "m": 20_364_623, "l": 33_899_231, "x": 50_875_103}
SEG = ["loss.weight_class=2", "loss.weight_bbox=1", "loss.weight_giou=1", "matcher.cost_bbox=1", "matcher.cost_giou=1"]
SEG += [f"loss.terms.{name}.at=[layers,initial,denoising]" for name in ("mask_ce", "mask_dice")]


@pytest.mark.parametrize("size", ["s", *LARGE])
def test_parameters_of_published_networks_with_masks(size, make):
    with torch.device("meta"):
        network = make(f"model=ecseg_{size}", num_classes=80)
    assert sum(parameter.numel() for parameter in network.parameters()) + 2 == SEG_TOTALS[size]


@pytest.mark.parametrize("size", ["s", *LARGE])
def test_parameters_of_published_networks(size, make):
    with torch.device("meta"):
        network = make(f"model=ecdet_{size}", num_classes=80)
    counts = dict.fromkeys(("backbone", "encoder", "decoder"), 0)
    for name, parameter in network.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    backbone, encoder, decoder = counts.values()
    assert (sum(counts.values()) + 2, backbone, encoder, decoder + 2) == TOTALS[size]


@pytest.mark.parametrize("size", ["s", *LARGE])
def test_outputs_of_published_networks(size, make, randomise):
    pytest.importorskip("libreyolo")
    ours = randomise(make(f"model=ecdet_{size}", *FEW).double()).eval()
    theirs = libre_of(ours, size, 128).eval()
    with torch.no_grad(), in_float64():
        expected, outputs = theirs(normal(ours, images(128))), ours(images(128))
    torch.testing.assert_close(outputs.pred.logits, expected["pred_logits"], **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected["pred_boxes"], **CLOSE)


@pytest.mark.parametrize("size", ["s", pytest.param("l", marks=pytest.mark.slow)])
def test_training_of_libreyolo(size, make, randomise, targets):
    """With denoising: all that is predicted, all terms of the loss, and all gradients."""
    pytest.importorskip("libreyolo")
    words = [f"model=ecdet_{size}", *FEW]
    ours = randomise(make(*words).double()).train()
    theirs = libre_of(ours, size, 96).train()
    torch.manual_seed(7)
    outputs = ours(images(96, 3), targets)
    torch.manual_seed(7)
    with in_float64():
        expected = theirs(normal(ours, images(96, 3)), given(targets))
        wanted = libre_criterion()(expected, given(targets))
    compare_outputs(outputs, expected)
    terms = criterion(compose([*words, "data.num_classes=7", "loss=deim"]))(outputs, targets, 3.0)
    assert len(compare_losses(terms, wanted)) == 48
    terms["total"].backward()
    sum(wanted.values()).backward()
    compare_gradients(official_of(ours, gradients_of(ours)), theirs)


@pytest.mark.parametrize("size", ["s", *LARGE])
def test_masks_of_published_networks(size, make, randomise):
    """The peer's pixels pass one block in evaluation."""
    pytest.importorskip("libreyolo")
    ours = randomise(make(f"model=ecseg_{size}", "model.mask_head.eval_blocks=1", *FEW).double()).eval()
    theirs = libre_of(ours, size, 128).eval()
    with torch.no_grad(), in_float64():
        expected, outputs = theirs(normal(ours, images(128))), ours(images(128))
    torch.testing.assert_close(outputs.pred.logits, expected["pred_logits"], **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected["pred_boxes"], **CLOSE)
    torch.testing.assert_close(outputs.pred.masks.dense(), expected["pred_masks"], **CLOSE)


@pytest.mark.parametrize("size", ["s", pytest.param("l", marks=pytest.mark.slow)])
def test_training_with_masks_of_libreyolo(size, make, randomise, targets):
    """What comes before the layers has the masks of the first layer in the peer; in the authors' code, of the last."""
    pytest.importorskip("libreyolo")
    words = [f"model=ecseg_{size}", *FEW]
    ours = randomise(make(*words).double()).train()
    theirs = libre_of(ours, size, 96).train()
    generator = torch.Generator().manual_seed(4)
    targets = replace(targets, masks=torch.rand(3, 96, 96, generator=generator) < 0.5)
    torch.manual_seed(7)
    outputs = ours(images(96, 3), targets)
    torch.manual_seed(7)
    with in_float64():
        expected = theirs(normal(ours, images(96, 3)), given(targets))
    expected["pre_outputs"]["pred_masks"] = expected["pred_masks"]
    expected["dn_pre_outputs"]["pred_masks"] = expected["dn_outputs"][-1]["pred_masks"]
    compare_outputs(outputs, expected)
    with at_fixed_points():
        with in_float64():
            wanted = libre_seg_criterion()(expected, given(targets))
        cfg = compose([*words, *SEG, "data.num_classes=7", "loss=deim"])
        terms = criterion(cfg)(outputs, targets, 3.0)
    assert len(compare_losses(terms, wanted)) == 68
    terms["total"].backward()
    sum(wanted.values()).backward()
    compare_gradients(official_of(ours, gradients_of(ours)), theirs)
