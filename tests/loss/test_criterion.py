from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from detr_exp.loss.classification import ce
from detr_exp.matcher import hungarian
from detr_exp.structures import Outputs, Prediction, Targets

LOSSES = ["vfl", "focal", "bce", "mal", "ce", "ia_bce"]


def leaves(outputs: Outputs) -> list[torch.Tensor]:
    found = [outputs.layers.logits, outputs.layers.boxes]
    if outputs.encoder is not None:
        found += [outputs.encoder.logits, outputs.encoder.boxes]
    if outputs.denoising is not None:
        found += [outputs.denoising.layers.logits, outputs.denoising.layers.boxes]
    return found


class Operators(TorchDispatchMode):
    """Counts what reaches a device: everything but views and allocations."""

    allocations = (
        "aten.empty",
        "aten.zeros",
        "aten.ones",
        "aten.full",
        "aten.new_",
        "aten.arange",
        "aten.scalar_tensor",
    )

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        is_constant = str(func).startswith((*self.allocations, "aten.lift_fresh", "aten.detach"))
        if not is_view and not is_constant:
            self.counts[str(func)] += 1
        if "index" in str(func):
            indices = [i for a in args if isinstance(a, (list, tuple)) for i in a if isinstance(i, torch.Tensor)]
            assert all(i.dtype != torch.bool for i in indices), "a boolean index waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_dispatches_little_and_waits_once(name, make_criterion, make_targets, make_outputs, monkeypatch):
    """RT-DETRv2-R18 with denoising, batch 2."""
    targets = make_targets(7, 4, num_classes=80)
    outputs = make_outputs(targets, columns=80 + (name == "ce"), queries=300, denoising_groups=14)
    criterion = make_criterion(name, num_classes=80)
    copies = []
    to_host = hungarian.to_host
    monkeypatch.setattr(hungarian, "to_host", lambda costs: copies.append(costs.shape) or to_host(costs))
    with Operators() as operators:
        criterion(outputs, targets, num_boxes=11.0)
    assert copies == [(4, 11, 300)]
    waits = {"aten.item", "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal"}
    assert not [op for op in operators.counts if op.rsplit(".", 1)[0] in waits]
    assert sum(operators.counts.values()) <= (150 if name == "vfl" else 175), operators.counts.most_common()


@pytest.mark.parametrize("name", LOSSES)
def test_names_and_total(name, make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 2)
    outputs = make_outputs(targets, columns=5 + (name == "ce"), denoising_groups=2)
    terms = make_criterion(name)(outputs, targets, num_boxes=5.0)
    suffixes = ["_aux_0", "_aux_1", "", "_enc", "_dn_0", "_dn_1", "_dn_2"]
    assert set(terms) == {f"loss_{part}{s}" for part in ("class", "bbox", "giou") for s in suffixes} | {"total"}
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    torch.testing.assert_close(terms["total"], sum(term for key, term in terms.items() if key != "total"))


def test_every_layer_equals_itself_alone(make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 0, 4)
    outputs = make_outputs(targets)
    criterion = make_criterion()
    terms = criterion(outputs, targets, num_boxes=7.0)
    layers = [outputs.layers.at(i) for i in range(3)]
    for suffix, layer in zip(("_aux_0", "_aux_1", "", "_enc"), [*layers, outputs.encoder]):
        alone = criterion(Outputs(Prediction(layer.logits[None], layer.boxes[None])), targets, num_boxes=7.0)
        for part in ("loss_class", "loss_bbox", "loss_giou"):
            torch.testing.assert_close(terms[part + suffix], alone[part])


def test_weights_scale_their_terms(make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 2)
    outputs = make_outputs(targets, denoising_groups=1)
    plain = make_criterion()(outputs, targets, num_boxes=5.0)
    heavy = make_criterion(weight_class=3.0, weight_bbox=10.0, weight_giou=1.0)(outputs, targets, num_boxes=5.0)
    factors = {"loss_class": 3.0, "loss_bbox": 2.0, "loss_giou": 0.5}
    for name in plain:
        if name != "total":
            torch.testing.assert_close(heavy[name], plain[name] * factors["_".join(name.split("_")[:2])])


def test_denoising_is_divided_by_its_groups(make_criterion, make_targets, make_outputs):
    """The same noisy predictions in every group give the loss of one group."""
    targets = make_targets(3, 2)
    one = make_outputs(targets, denoising_groups=1).denoising
    tripled = Prediction(one.layers.logits.repeat(1, 1, 3, 1), one.layers.boxes.repeat(1, 1, 3, 1))
    shift = torch.arange(3)[:, None] * one.layers.boxes.shape[2]
    three = one._replace(
        layers=tripled,
        image=one.image.repeat(3),
        query=(one.query + shift).flatten(),
        target=one.target.repeat(3),
        groups=3,
    )
    outputs = make_outputs(targets)
    criterion = make_criterion()
    alone = criterion(outputs._replace(denoising=one), targets, num_boxes=5.0)
    together = criterion(outputs._replace(denoising=three), targets, num_boxes=5.0)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name])


def test_query_groups_are_matched_by_themselves_and_averaged(make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 2)
    outputs = make_outputs(targets, groups=2)
    criterion = make_criterion("ia_bce")
    together = criterion(outputs, targets, num_boxes=5.0)

    def group(prediction: Prediction, half: slice) -> Prediction:
        return Prediction(prediction.logits[..., half, :], prediction.boxes[..., half, :])

    halves = [
        criterion(Outputs(group(outputs.layers, h), group(outputs.encoder, h)), targets, num_boxes=5.0)
        for h in (slice(0, 12), slice(12, 24))
    ]
    for name in together:
        torch.testing.assert_close(together[name], (halves[0][name] + halves[1][name]) / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_without_objects_boxes_are_free_but_in_the_graph(name, make_criterion, make_targets, make_outputs):
    targets = make_targets(0, 0)
    outputs = make_outputs(targets, columns=5 + (name == "ce"), denoising_groups=1)
    terms = make_criterion(name)(outputs, targets, num_boxes=0.0)
    assert all(term.item() == 0 for key, term in terms.items() if "bbox" in key or "giou" in key)
    assert terms["loss_class"] > 0
    terms["total"].backward()
    for leaf in leaves(outputs):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert outputs.layers.logits.grad.abs().sum() > 0


def test_more_objects_than_queries(make_criterion, make_targets, make_outputs):
    targets = make_targets(9, 2)
    outputs = make_outputs(targets, queries=4)
    terms = make_criterion()(outputs, targets, num_boxes=11.0)
    terms["total"].backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(outputs))


def test_shared_indices_are_those_of_the_last_layer(make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 4)
    outputs = make_outputs(targets)
    own, shared = make_criterion(), make_criterion(share_matched_indices=True)
    last = own.matcher([Prediction(outputs.layers.logits[-1:], outputs.layers.boxes[-1:])], targets)
    terms = shared(outputs, targets, num_boxes=1.0)
    for i, suffix in enumerate(("_aux_0", "_aux_1", "")):
        chosen = outputs.layers.boxes[i, last.image[0], last.query[0]]
        torch.testing.assert_close(
            terms["loss_bbox" + suffix], 5 * (chosen - targets.boxes[last.target[0]]).abs().sum()
        )
    assert terms["loss_bbox_enc"] == own(outputs, targets, num_boxes=1.0)["loss_bbox_enc"]
    assert terms["loss_bbox_aux_0"] > own(outputs, targets, num_boxes=1.0)["loss_bbox_aux_0"]


def test_without_aux_loss_only_the_last_layer_counts_but_all_stay_in_the_graph(
    make_criterion, make_targets, make_outputs
):
    targets = make_targets(3, 4)
    outputs = make_outputs(targets, denoising_groups=2)
    full = make_criterion()(outputs, targets, num_boxes=7.0)
    terms = make_criterion(aux_loss=False)(outputs, targets, num_boxes=7.0)
    assert set(terms) == {"loss_class", "loss_bbox", "loss_giou", "total"}
    for name in ("loss_class", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(terms[name], full[name])
    terms["total"].backward()
    assert all(leaf.grad is not None for leaf in leaves(outputs))
    assert outputs.layers.logits.grad[:-1].abs().sum() == 0
    assert outputs.layers.logits.grad[-1].abs().sum() > 0


@pytest.mark.parametrize("name", ["vfl", "ce"])
def test_a_class_agnostic_encoder_learns_that_there_is_something(name, make_criterion, make_targets, make_outputs):
    background = int(name == "ce")
    targets = make_targets(3, 4)
    outputs = make_outputs(targets, columns=5 + background, encoder_columns=1 + background)
    terms = make_criterion(name)(outputs, targets, num_boxes=7.0)
    something = Targets(torch.zeros_like(targets.labels), targets.boxes, targets.counts)
    encoder = Outputs(Prediction(outputs.encoder.logits[None], outputs.encoder.boxes[None]))
    alone = make_criterion(name, num_classes=1)(encoder, something, num_boxes=7.0)
    for part in ("loss_class", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(terms[part + "_enc"], alone[part])


@pytest.mark.parametrize("overlap", ["iou", "giou"])
def test_overlaps_can_weigh_the_boxes(overlap, make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 4)
    outputs = make_outputs(targets)
    plain = make_criterion()(outputs, targets, num_boxes=7.0)
    weighed = make_criterion(boxes_weight_format=overlap)(outputs, targets, num_boxes=7.0)
    assert weighed["loss_giou"] < plain["loss_giou"]
    assert weighed["loss_bbox"] == plain["loss_bbox"]
    assert (weighed["loss_class"] == plain["loss_class"]) == (overlap == "iou")


@pytest.mark.parametrize("name", ["vfl", "ce"])
def test_micro_batches_add_up(name, make_criterion, make_targets, make_outputs):
    """Two images at once, or one after the other with the counts of both."""
    targets = make_targets(3, 1)
    outputs = make_outputs(targets, columns=5 + (name == "ce"))
    criterion = make_criterion(name)
    whole = criterion(outputs, targets, num_boxes=4.0)
    halves = []
    for b, own in enumerate((slice(0, 3), slice(3, 4))):
        part = Outputs(
            Prediction(outputs.layers.logits[:, b : b + 1], outputs.layers.boxes[:, b : b + 1]),
            Prediction(outputs.encoder.logits[b : b + 1], outputs.encoder.boxes[b : b + 1]),
        )
        half = Targets(targets.labels[own], targets.boxes[own], (own.stop - own.start,))
        halves.append(criterion(part, half, num_boxes=4.0, num_images=2))
    for key, term in whole.items():
        torch.testing.assert_close(halves[0][key] + halves[1][key], term)


def test_counts_may_be_tensors(make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 1)
    for name in ("vfl", "ce"):
        outputs = make_outputs(targets, columns=5 + (name == "ce"), denoising_groups=2)
        numbers = make_criterion(name)(outputs, targets, num_boxes=4.5, num_images=3)
        tensors = make_criterion(name)(outputs, targets, num_boxes=torch.tensor(4.5), num_images=torch.tensor(3.0))
        for key, term in numbers.items():
            torch.testing.assert_close(tensors[key], term)


def test_ce_is_torchs_weighted_mean(make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 1)
    outputs = make_outputs(targets, columns=6)
    criterion = make_criterion("ce")
    pairs = criterion.matcher([outputs.layers], targets)
    labels = torch.full((2, 12), 5)
    labels[pairs.image[2], pairs.query[2]] = targets.labels[pairs.target[2]]
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.1])
    oracle = F.cross_entropy(outputs.layers.logits[2].flatten(0, 1), labels.flatten(), weight)
    torch.testing.assert_close(criterion(outputs, targets, num_boxes=4.0)["loss_class"], oracle)


def test_less_background_weight_gives_less_gradient_to_background(make_criterion, make_targets, make_outputs):
    targets = make_targets(3)
    shares = []
    for eos_coef in (1.0, 0.1):
        outputs = make_outputs(targets, columns=6, encoder=False, layers=1)
        loss = partial(ce, eos_coef=eos_coef, label_smoothing=0.0)
        criterion = make_criterion("ce", class_loss=loss, eos_coef=eos_coef)
        criterion(outputs, targets, num_boxes=3.0)["loss_class"].backward()
        matched = criterion.matcher([outputs.layers], targets).query[0]
        gradient = outputs.layers.logits.grad[0, 0].abs().sum(1)
        shares.append(1 - gradient[matched].sum() / gradient.sum())
    assert shares[1] < shares[0] / 2


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_outputs_are_supervised_in_float32(name, make_criterion, make_targets, make_outputs):
    targets = make_targets(3, 4)
    columns = 5 + (name == "ce")
    half = make_outputs(targets, columns=columns, denoising_groups=1, dtype=torch.bfloat16)
    full = half._replace(
        layers=Prediction(half.layers.logits.float(), half.layers.boxes.float()),
        encoder=Prediction(half.encoder.logits.float(), half.encoder.boxes.float()),
        denoising=half.denoising._replace(
            layers=Prediction(half.denoising.layers.logits.float(), half.denoising.layers.boxes.float())
        ),
    )
    criterion = make_criterion(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = criterion(half, targets, num_boxes=7.0)
    for key, term in criterion(full, targets, num_boxes=7.0).items():
        assert terms[key].dtype == torch.float32
        assert torch.equal(terms[key], term)


def test_mistakes_are_named(make_criterion, make_targets, make_outputs):
    targets = make_targets(2)
    with pytest.raises(ValueError, match="7 classes with a sigmoid loss need 7"):
        make_criterion(num_classes=7)(make_outputs(targets), targets, num_boxes=2.0)
    with pytest.raises(ValueError, match="5 classes with a softmax loss need 6"):
        make_criterion("ce")(make_outputs(targets), targets, num_boxes=2.0)
