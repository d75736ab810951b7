"""The criterion against that of libreyolo, whose terms are those of the published D-FINE and DEIM to the last digit."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from detr_exp import build
from detr_exp.structures import Denoising, Outputs, Prediction, Targets

dfine = pytest.importorskip("libreyolo.models.dfine.loss")
deim = pytest.importorskip("libreyolo.models.deim.loss")
matching = pytest.importorskip("libreyolo.models.dfine.matcher")

CLASSES, QUERIES, LAYERS, GROUPS = 7, 24, 3, 2
SCALE = 4.0
WEIGHTS = {"loss_vfl": 1, "loss_mal": 1, "loss_bbox": 5, "loss_giou": 2, "loss_fgl": 0.15, "loss_ddf": 1.5}
EDGES = [f"loss.terms.fgl.function.{word}" for word in ("num_bins=32", "bound=0.5", f"scale={SCALE}")]


class Edged(NamedTuple):
    """Predictions with distributions of edges, like those of D-FINE."""

    logits: Tensor
    boxes: Tensor
    edges: Tensor
    reference: Tensor


def near(boxes: Tensor, spread: float) -> Tensor:
    return (boxes + spread * torch.randn_like(boxes)).clamp(0.02, 0.98)


def predictions(targets: Targets, places: Tensor) -> tuple[Edged, Prediction, Prediction]:
    """Layers that agree but for few queries, as trained ones do: of all layers, of none, of the encoder."""
    images, count = places.shape[:2]
    logits = torch.randn(images, count, CLASSES)

    def plain(spread: float) -> Prediction:
        boxes = near(places, spread)
        return Prediction((logits + 10 * spread * torch.randn_like(logits)).requires_grad_(), boxes.requires_grad_())

    layers = [plain(0.05) for _ in range(LAYERS)]
    stacked = [
        torch.stack([getattr(one, name).detach() for one in layers]).requires_grad_() for name in ("logits", "boxes")
    ]
    edges = torch.randn(LAYERS, images, count, 4, 33).cumsum(0).requires_grad_()
    reference = near(places, 0.05).expand(LAYERS, -1, -1, -1)
    return Edged(*stacked, edges, reference), plain(0.05), plain(0.1)


def made(targets: Targets, seed: int) -> Outputs:
    torch.manual_seed(seed)
    images, most = len(targets.counts), max(targets.counts)
    starts = torch.tensor([0, *targets.counts]).cumsum(0)
    places = torch.rand(images, QUERIES, 4) * torch.tensor([1, 1, 0.4, 0.4]) + 0.02
    for b, count in enumerate(targets.counts):  # some queries are near an object
        mine = targets.boxes[starts[b] : starts[b + 1]]
        places[b, : 3 * count : 3] = mine
    layers, initial, encoder = predictions(targets, places)
    pairs = [
        (b, 2 * most * group + i, starts[b] + i)
        for b, n in enumerate(targets.counts)
        for group in range(GROUPS)
        for i in range(n)
    ]
    image, query, target = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).T
    noisy = torch.rand(images, 2 * most * GROUPS, 4) * 0.3 + 0.2
    noisy_layers, noisy_initial, _ = predictions(targets, noisy)
    denoising = Denoising(noisy_layers, image, query, target, GROUPS, noisy_initial)
    return Outputs(layers, encoder, denoising, 1, initial)


def theirs_of(outputs: Outputs, targets: Targets, peer, quality: str) -> dict[str, Tensor]:
    """The terms of the peer."""

    def described(stack: Edged) -> list[dict[str, Tensor]]:
        teacher = {"teacher_corners": stack.edges[-1].flatten(-2), "teacher_logits": stack.logits[-1]}
        return [
            {
                "pred_logits": stack.logits[i],
                "pred_boxes": stack.boxes[i],
                "pred_corners": stack.edges[i].flatten(-2),
                "ref_points": stack.reference[i],
                **teacher,
            }
            for i in range(LAYERS)
        ]

    def plain(one: Prediction) -> dict[str, Tensor]:
        return {"pred_logits": one.logits, "pred_boxes": one.boxes}

    bins = {"up": torch.tensor([0.5]), "reg_scale": torch.tensor([SCALE])}
    *auxiliary, last = described(outputs.layers)
    noisy = outputs.denoising
    whole = {name: value for name, value in last.items() if not name.startswith("teacher")} | bins
    whole |= {"aux_outputs": auxiliary, "pre_outputs": plain(outputs.initial)}
    whole |= {"enc_aux_outputs": [plain(outputs.encoder)], "enc_meta": {"class_agnostic": False}}
    whole |= {"dn_outputs": described(noisy.layers), "dn_pre_outputs": plain(noisy.initial)}
    places = [noisy.query[noisy.image == b] for b in range(len(targets.counts))]
    whole["dn_meta"] = {"dn_positive_idx": places, "dn_num_group": noisy.groups}
    counts = list(targets.counts)
    per_image = [
        {"labels": labels, "boxes": boxes}
        for labels, boxes in zip(targets.labels.split(counts), targets.boxes.split(counts))
    ]
    matcher = matching.HungarianMatcher({"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}, alpha=0.25, gamma=2.0)
    shape = {"alpha": 0.75, "gamma": 2.0} if quality == "vfl" else {"gamma": 1.5}
    criterion = peer(matcher, WEIGHTS, [quality, "boxes", "local"], num_classes=CLASSES, reg_max=32, **shape)
    return criterion(whole, per_image)


def renamed(name: str) -> str:
    return name.replace("loss_vfl", "loss_class").replace("loss_mal", "loss_class").replace("_enc_0", "_enc")


def trained(outputs: Outputs) -> list[Tensor]:
    parts = [outputs.layers, outputs.initial, outputs.encoder, outputs.denoising.layers, outputs.denoising.initial]
    return [tensor for part in parts for tensor in part[:3] if tensor is not None]


@pytest.mark.parametrize(("option", "quality"), [("dfine", "vfl"), ("deim", "mal")])
def test_all_terms_and_gradients(option: str, quality: str, make_targets) -> None:
    criterion = build.criterion(build.compose([f"loss={option}", f"data.num_classes={CLASSES}", *EDGES]))
    peer = dfine.DFINECriterion if quality == "vfl" else deim.DEIMCriterion
    for counts in ((3, 2), (4, 0, 1)):
        targets = make_targets(*counts, num_classes=CLASSES)
        candidates = (made(targets, seed) for seed in range(100))
        outputs = next(found for found in candidates if has_one_union(criterion.matcher, found, targets))
        theirs = theirs_of(outputs, targets, peer, quality)
        expected = torch.autograd.grad(sum(theirs.values()), trained(outputs))

        ours = criterion(outputs, targets, num_boxes=float(sum(counts)))
        statistics = {f"edge_entropy{suffix}" for suffix in ("", "_aux_0", "_aux_1")}
        assert set(ours) == {*map(renamed, theirs), "loss_ddf", "total", *statistics}
        assert len(theirs) == 38
        assert ours["loss_ddf"] == 0, "the last layer teaches itself nothing"
        for name, term in theirs.items():
            torch.testing.assert_close(ours[renamed(name)], term, rtol=1e-5, atol=1e-7)
        for gradient, other in zip(torch.autograd.grad(ours["total"], trained(outputs)), expected):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def has_one_union(matcher, outputs: Outputs, targets: Targets) -> bool:
    """Whether queries beyond the last layer's are matched, some with several objects, and no two equally often.

    The peer breaks ties at random.
    """
    single = (Prediction(one.logits[None], one.boxes[None]) for one in (outputs.initial, outputs.encoder))
    pairs = matcher([Prediction(*outputs.layers[:2]), *single], targets)
    votes: dict[tuple[int, int], Counter[int]] = {}
    for image, query, target in pairs.host.reshape(3, -1).T.tolist():
        votes.setdefault((image, query), Counter())[target] += 1
    ranked = [[count for _, count in one.most_common(2)] for one in votes.values()]
    contested = [one for one in ranked if len(one) > 1]
    return len(votes) > len(targets) and bool(contested) and all(first > second for first, second in contested)
