"""D-FINE against transformers and libreyolo: random weights, float64, square images; equal inputs, equal outputs."""

from __future__ import annotations

import pytest
import torch
from dfine_peer import SILU, SMALL, libre_of, official_of, peer_of

from detr_exp.build import compose
from detr_exp.structures import mapped

# Parameters with 80 classes: all, trained, of backbone, encoder and decoder. Published totals count two constants, the
# bound and the scale of edges, which are buffers here.
TOTALS = {
    "n": (3_782_693, 3_782_691, 1_850_396, 703_824, 1_228_473),
    "s": (10_321_877, 10_321_875, 1_850_396, 4_021_504, 4_449_977),
    "m": (19_590_064, 19_590_062, 6_026_626, 7_799_040, 5_764_398),
    "l": (31_244_152, 31_219_222, 13_507_680, 9_343_232, 8_393_240),
    "x": (62_621_560, 62_596_118, 33_231_840, 20_700_032, 8_689_688),
}
ENTRIES = {"n": 674, "s": 794, "m": 1053, "l": 1173, "x": 1441}  # of the official state dicts
CLOSE = {"rtol": 0, "atol": 1e-6}


def images(side: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("size", TOTALS)
def test_parameters_of_published_networks(size, make):
    with torch.device("meta"):
        network = make(f"model=dfine_{size}", num_classes=80)
    counts = dict.fromkeys(("backbone", "encoder", "decoder"), 0)
    for name, parameter in network.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    backbone, encoder, decoder = counts.values()
    assert (sum(counts.values()) + 2, trained, backbone, encoder, decoder + 2) == TOTALS[size]
    assert len(official_of(network)) == ENTRIES[size]


@pytest.mark.parametrize(("size", "total"), [("l", 31_289_848), ("x", 62_715_480)])
def test_parameters_where_nothing_is_frozen(size, total, make):
    with torch.device("meta"):
        free = ("model.backbone.freeze_at=-1", "model.backbone.freeze_norm=false")
        network = make(f"model=dfine_{size}", *free, num_classes=80)
    assert sum(parameter.numel() for parameter in network.parameters()) + 2 == total


@pytest.mark.slow
@pytest.mark.parametrize("size", TOTALS)
def test_outputs_of_published_networks(size, make, randomise):
    overrides = [f"model=dfine_{size}", "model.num_queries=40"]
    ours = randomise(make(*overrides).double()).eval()
    theirs = peer_of(ours, compose(overrides)).eval()
    with torch.no_grad():
        expected, outputs = theirs(pixel_values=images(128)), ours(images(128))
    torch.testing.assert_close(outputs.pred.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected.pred_boxes, **CLOSE)
    assert outputs.initial is None


VARIANTS = {
    "plain": [],
    "rectangle": ["model.image_size=[96,160]"],
    "earlier layer": ["model.eval_idx=1"],
    "wider decoder": ["model.hidden_dim=48", "model.edge_scale=8.0", "model.edge_bound=0.7", "model.num_bins=16"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_of_variants(name, make, randomise):
    overrides = [*SMALL, *VARIANTS[name]]
    ours = randomise(make(*overrides).double()).eval()
    theirs = peer_of(ours, compose(overrides)).eval()
    pixels = torch.rand(2, 3, *ours.image_size, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        expected, outputs = theirs(pixel_values=pixels), ours(pixels)
    torch.testing.assert_close(outputs.pred.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected.pred_boxes, **CLOSE)


def test_every_layer_of_transformers(make, randomise):
    """In training, without denoising: boxes before the first layer, and all that the layers predict."""
    ours = randomise(make(*SMALL).double()).train()
    theirs = peer_of(ours, compose(SMALL)).train()
    outputs, expected = ours(images(96, 2)), theirs(pixel_values=images(96, 2))
    for name, found, wanted in (
        ("encoder logits", outputs.encoder.logits, expected.enc_topk_logits),
        ("encoder boxes", outputs.encoder.boxes, expected.enc_topk_bboxes),
        ("initial logits", outputs.initial.logits, expected.intermediate_logits[:, 0]),
        ("initial boxes", outputs.initial.boxes, expected.intermediate_reference_points[:, 0]),
        ("logits", outputs.layers.logits, expected.intermediate_logits[:, 1:].transpose(0, 1)),
        ("boxes", outputs.layers.boxes, expected.intermediate_reference_points[:, 1:].transpose(0, 1)),
        ("edges", outputs.layers.edges.flatten(-2), expected.intermediate_predicted_corners.transpose(0, 1)),
        ("reference", outputs.layers.reference, expected.initial_reference_points.transpose(0, 1)),
    ):
        torch.testing.assert_close(found, wanted, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [("dfine", "n"), ("deim", "n"), ("deim", "s"), ("deim", "m")])
def test_every_layer_of_libreyolo(family, size, make, randomise, targets):
    """In training, with denoising: boxes that noise has turned inside out are turned back."""
    words = [
        f"model=dfine_{size}",
        "model.num_queries=20",
        "model.num_denoising=10",
        *(SILU if family == "deim" else []),
    ]
    ours = randomise(make(*words).double()).train()
    theirs = libre_of(ours, size, family).train()
    pairs = zip(targets.labels.split(targets.counts), targets.boxes.split(targets.counts))
    torch.manual_seed(7)
    outputs = ours(images(96, 3), targets)
    torch.manual_seed(7)
    expected = theirs(images(96, 3), [{"labels": labels, "boxes": boxes} for labels, boxes in pairs])

    def compare(found, wanted):
        names = {"logits": "pred_logits", "boxes": "pred_boxes", "edges": "pred_corners", "reference": "ref_points"}
        for field in set(names) & set(found._fields):
            tensor = getattr(found, field)
            tensor = tensor.flatten(-2) if field == "edges" else tensor
            torch.testing.assert_close(tensor, wanted[names[field]], **CLOSE)

    def layer(prediction, index):
        return mapped(prediction, lambda tensor: tensor[index])

    for index, wanted in enumerate([*expected["aux_outputs"], expected]):
        compare(layer(outputs.layers, index), wanted)
    for index, wanted in enumerate(expected["dn_outputs"]):
        compare(layer(outputs.denoising.layers, index), wanted)
    compare(outputs.initial, expected["pre_outputs"])
    compare(outputs.denoising.initial, expected["dn_pre_outputs"])
    compare(outputs.encoder, expected["enc_aux_outputs"][0])
    query, group = expected["dn_meta"]["dn_positive_idx"], outputs.denoising.groups
    assert torch.cat(query).sort().values.tolist() == outputs.denoising.query.sort().values.tolist()
    assert group == expected["dn_meta"]["dn_num_group"]


@pytest.mark.slow
@pytest.mark.parametrize("size", TOTALS)
def test_outputs_of_libreyolo(size, make, randomise):
    ours = randomise(make(f"model=dfine_{size}", "model.num_queries=40").double()).eval()
    theirs = libre_of(ours, size, "dfine").eval()
    with torch.no_grad():
        expected, outputs = theirs(images(128)), ours(images(128))
    torch.testing.assert_close(outputs.pred.logits, expected["pred_logits"], **CLOSE)
    torch.testing.assert_close(outputs.pred.boxes, expected["pred_boxes"], **CLOSE)


def test_postprocessing(make, randomise):
    """transformers turns a box of negative size inside out; here it has no size."""
    from types import SimpleNamespace

    from transformers import RTDetrImageProcessor

    ours = randomise(make(*SMALL).double()).eval()
    sizes = torch.tensor([[480, 640], [100, 200]])
    with torch.no_grad():
        outputs = ours(images(96, 2))
    boxes = torch.cat([outputs.pred.boxes[..., :2], outputs.pred.boxes[..., 2:].clamp(min=0)], -1)
    expected = RTDetrImageProcessor().post_process_object_detection(
        SimpleNamespace(logits=outputs.pred.logits, pred_boxes=boxes), threshold=0.0, target_sizes=sizes
    )
    for actual, wanted in zip(ours.postprocess(outputs, sizes), expected):
        torch.testing.assert_close(actual.scores, wanted["scores"], rtol=0, atol=1e-12)
        torch.testing.assert_close(actual.boxes, wanted["boxes"], **CLOSE)
        assert actual.labels.tolist() == wanted["labels"].tolist()
