"""DEIMv2 against libreyolo: random weights, float64, square images; equal inputs, equal outputs, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from deimv2_peer import FEW, in_float64, libre_criterion, libre_of, official_of
from edges_peer import CLOSE, compare_gradients, compare_losses, compare_outputs, given, gradients_of, images, normal

from detr_exp.build import compose, criterion

# Parameters with 80 classes: all, of backbone, encoder and decoder; entries of official state dicts. Published totals
# count two constants, the bound and the scale of edges, which are buffers here; those of L and X also a token and
# biases of keys that are always zero, which timm's DINOv3 does not have.
TOTALS = {
    "atto": (508_985, 230_344, 80_400, 198_241, 493),
    "femto": (983_945, 389_832, 196_352, 397_761, 493),
    "pico": (1_539_539, 749_202, 258_976, 531_361, 551),
    "n": (3_600_421, 1_850_396, 638_288, 1_111_737, 639),
    "s": (9_779_838, 5_689_360, 1_367_360, 2_723_118, 673),
    "m": (18_357_750, 9_974_032, 4_002_488, 4_381_230, 769),
    "l": (32_551_214, 22_173_408, 5_147_296, 5_230_510, 809),
    "x": (51_211_736, 30_119_360, 11_192_064, 9_900_312, 989),
}
UNUSED = {"l": 13 * 384, "x": 13 * 384}
LOSSES = {"atto": ("mal", 27), "n": ("deim", 37), "s": ("deim", 47)}  # of the recipes, and their number of terms


@pytest.mark.parametrize("size", TOTALS)
def test_parameters_of_published_networks(size, make):
    with torch.device("meta"):
        network = make(f"model=deimv2_{size}", num_classes=80)
    counts = dict.fromkeys(("backbone", "encoder", "decoder"), 0)
    for name, parameter in network.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    counts["backbone"] += UNUSED.get(size, 0)
    backbone, encoder, decoder = counts.values()
    entries = len(official_of(network))
    assert (sum(counts.values()) + 2, backbone, encoder, decoder + 2, entries) == TOTALS[size]


OTHERS = [pytest.param(size, marks=pytest.mark.slow) for size in ("femto", "pico", "n", "s", "m", "l", "x")]


@pytest.mark.parametrize("size", ["atto", *OTHERS])
def test_outputs_of_published_networks(size, make, randomise):
    ours = randomise(make(f"model=deimv2_{size}", *FEW).double()).eval()
    theirs = libre_of(ours, size).eval()
    with torch.no_grad(), in_float64():
        expected, outputs = theirs(normal(ours, images(128))), ours(images(128))
    torch.testing.assert_close(outputs.pred.logits, expected["pred_logits"], **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected["pred_boxes"], **CLOSE)
    assert outputs.initial is None


@pytest.mark.parametrize("size", ["atto", *(pytest.param(size, marks=pytest.mark.slow) for size in ("n", "s"))])
def test_training_of_libreyolo(size, make, randomise, targets):
    """With denoising: all that is predicted, all terms of the loss, and all gradients."""
    words = [f"model=deimv2_{size}", *FEW]
    ours = randomise(make(*words).double()).train()
    theirs = libre_of(ours, size).train()
    loss, count = LOSSES[size]
    torch.manual_seed(7)
    outputs = ours(images(96, 3), targets)
    torch.manual_seed(7)
    with in_float64():
        expected = theirs(normal(ours, images(96, 3)), given(targets))
        wanted = libre_criterion(size)(expected, given(targets))

    compare_outputs(outputs, expected)
    terms = criterion(compose([*words, "data.num_classes=7", f"loss={loss}"]))(outputs, targets, 3.0)
    found = compare_losses(terms, wanted)
    assert len(found - {f"loss_ddf_dn_{len(outputs.layers.boxes) - 1}"}) == count
    terms["total"].backward()
    sum(wanted.values()).backward()
    compare_gradients(official_of(ours, gradients_of(ours)), theirs)
