"""DEIMv2 against libreyolo: random weights, float64, square images; equal inputs, equal outputs, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from deimv2_peer import FEW, in_float64, libre_criterion, libre_of, official_of

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
CLOSE = {"rtol": 0, "atol": 1e-6}


def images(side: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)).double()


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


def normal(network, pixels):
    """As the peer wants them, which leaves mean and deviation to whoever calls it."""
    return (pixels - network.pixel_mean) / network.pixel_std


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
    per_image = zip(targets.labels.split(targets.counts), targets.boxes.double().split(targets.counts))
    given = [{"labels": labels, "boxes": boxes} for labels, boxes in per_image]
    torch.manual_seed(7)
    outputs = ours(images(96, 3), targets)
    torch.manual_seed(7)
    with in_float64():
        expected = theirs(normal(ours, images(96, 3)), given)
        wanted = libre_criterion(size)(expected, given)

    def compare(found, other):
        names = {"logits": "pred_logits", "boxes": "pred_boxes", "edges": "pred_corners", "reference": "ref_points"}
        for field in set(names) & set(found._fields) & {name for name in names if names[name] in other}:
            tensor = getattr(found, field)
            tensor = tensor.flatten(-2) if field == "edges" else tensor
            torch.testing.assert_close(tensor, other[names[field]], **CLOSE)

    def layer(prediction, index):
        return type(prediction)(*(tensor[index] for tensor in prediction))

    for index, other in enumerate([*expected["aux_outputs"], expected]):
        compare(layer(outputs.layers, index), other)
    for index, other in enumerate(expected["dn_outputs"]):
        compare(layer(outputs.denoising.layers, index), other)
    compare(outputs.initial, expected["pre_outputs"])
    compare(outputs.denoising.initial, expected["dn_pre_outputs"])
    compare(outputs.encoder, expected["enc_aux_outputs"][0])

    cfg = compose([*words, "data.num_classes=7", f"loss={loss}"])
    terms = criterion(cfg)(outputs, targets, float(sum(targets.counts)))
    wanted = {name.replace("loss_mal", "loss_class").replace("_enc_0", "_enc"): t for name, t in wanted.items()}
    found = {name: term for name, term in terms.items() if name in wanted}
    assert found.keys() == wanted.keys()
    absent = {name for name in terms if name.startswith("loss_")} - wanted.keys()
    assert absent <= {"loss_ddf"}, "the last layer teaches itself nothing"
    assert (
        len([term for name, term in wanted.items() if name != f"loss_ddf_dn_{len(outputs.layers.boxes) - 1}"]) == count
    )
    for name, term in wanted.items():
        torch.testing.assert_close(
            found[name], term, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    terms["total"].backward()
    sum(wanted.values()).backward()
    gradients = official_gradients(ours)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
            )
    assert len(gradients) > 200


def official_gradients(network):
    """Gradients by the official names of parameters."""
    copy = {name: parameter.grad for name, parameter in network.named_parameters()}
    state = {name: copy.get(name, tensor) for name, tensor in network.state_dict().items()}
    return official_of(network, state)
