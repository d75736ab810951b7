"""The effect of overrides on the criterion."""

import pytest
import torch

from detr_exp import build

LOSSES = ["vfl", "focal", "bce", "mal", "ce", "ia_bce"]


@pytest.fixture
def total(make_targets, make_outputs):
    """`total("loss=vfl", ...)`: the loss of fixed outputs under these words."""

    def run(*words: str) -> torch.Tensor:
        cfg = build.compose(["data.num_classes=5", *words])
        targets = make_targets(3, 2)
        outputs = make_outputs(targets, columns=5 + (cfg.loss.activation == "softmax"))
        return build.criterion(cfg)(outputs, targets, num_boxes=5.0)["total"].detach()

    return run


def test_every_loss_is_another(total):
    assert len({round(total(f"loss={name}").item(), 4) for name in LOSSES}) == len(LOSSES)


OWN = {
    "focal_alpha": ("0.4", ["vfl", "focal", "mal", "ia_bce"]),
    "focal_gamma": ("1.0", ["vfl", "focal", "mal"]),
    "label_smoothing": ("0.1", ["vfl", "focal", "bce", "mal", "ce"]),
    "eos_coef": ("0.5", ["ce"]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_knobs_act_where_they_mean_something_and_are_refused_elsewhere(name, total):
    plain = total(f"loss={name}")
    for knob, (value, takers) in OWN.items():
        if name in takers:
            assert total(f"loss={name}", f"loss.{knob}={value}") != plain
        else:
            with pytest.raises(ValueError, match=knob):
                total(f"loss={name}", f"loss.{knob}={value}")


def test_shared_knobs_act(total):
    changes = ["weight_class=2", "weight_bbox=2", "weight_giou=1", "boxes_weight_format=iou", "aux_loss=false"]
    changes += ["share_matched_indices=true"]
    totals = {round(total(*[f"loss.{change}"]).item(), 4) for change in changes}
    assert len(totals | {round(total().item(), 4)}) == len(changes) + 1


@pytest.mark.parametrize("knob", ["cost_class=20", "cost_bbox=0.1", "cost_giou=40", "alpha=0.9", "gamma=0.5"])
def test_costs_change_the_matching(knob, make_targets, make_outputs):
    targets = make_targets(5, 5)
    outputs = make_outputs(targets, queries=40)

    def queries(*words: str) -> torch.Tensor:
        return build.criterion(build.compose(["data.num_classes=5", *words])).matcher([outputs.layers], targets).query

    assert not torch.equal(queries(f"matcher.{knob}"), queries())
