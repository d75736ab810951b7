"""Rules for learning rates and weight decay, on small networks."""

import pytest
import torch
from torch import nn

from detr_exp.optim.param_groups import parameter_groups


def make_network() -> nn.Module:
    network = nn.Module()
    network.backbone = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4)})
    network.encoder = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    network.head = nn.Linear(4, 2)
    return network


def by_name(network, groups) -> dict[str, tuple]:
    """Parameter name -> (group, lr, weight decay)."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(p)]: (group["name"], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }


def test_the_first_match_decides_and_the_rest_is_last():
    network = make_network()
    rules = {
        "backbone_norm": {"match": r"^backbone\..*norm", "weight_decay": 0.0},
        "backbone": {"match": "^backbone", "lr": 1e-5},
        "norm": {"match": "norm", "weight_decay": 0.0},
    }
    groups = parameter_groups(network, rules, lr=1e-4, weight_decay=1e-2)
    assert [group["name"] for group in groups] == ["backbone_norm", "backbone", "norm", "rest"]
    found = by_name(network, groups)
    assert len(found) == len(list(network.parameters()))
    assert found["backbone.norm.weight"] == ("backbone_norm", 1e-4, 0.0)
    assert found["backbone.conv.bias"] == ("backbone", 1e-5, 1e-2)
    assert found["encoder.norm.bias"] == ("norm", 1e-4, 0.0)
    assert found["head.weight"] == ("rest", 1e-4, 1e-2)
    assert all(group["initial_lr"] == group["lr"] for group in groups)


def test_lr_backbone_is_the_base_rate_of_every_rule_without_one():
    network = make_network()
    rules = {"norm": {"match": "norm", "weight_decay": 0.0}}
    found = by_name(network, parameter_groups(network, rules, lr=1e-4, lr_backbone=1e-6, weight_decay=0.1))
    assert found["backbone.conv.weight"] == ("rest_backbone", 1e-6, 0.1)
    assert found["backbone.norm.weight"] == ("norm_0", 1e-6, 0.0)
    assert found["encoder.norm.weight"] == ("norm_1", 1e-4, 0.0)
    assert found["head.weight"] == ("rest", 1e-4, 0.1)


def test_frozen_parameters_are_left_out():
    network = make_network()
    network.backbone.requires_grad_(False)
    groups = parameter_groups(network, {}, lr=1.0)
    assert not any(name.startswith("backbone") for name in by_name(network, groups))


def test_layer_decay_of_a_transformer_as_in_rf_detr_nano():
    network = nn.Module()
    network.backbone = nn.Module()
    network.backbone.embeddings = nn.Linear(2, 2)
    network.backbone.layer = nn.ModuleList(
        nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}) for _ in range(12)
    )
    network.backbone.layernorm = nn.LayerNorm(2)
    network.decoder = nn.Linear(2, 2)
    network.head = nn.Linear(2, 2)
    rules = {
        "encoder": {
            "match": "^backbone",
            "lr_factor": 0.49,
            "layer_decay": 0.8,
            "num_layers": 13,
            "no_weight_decay": "gamma|pos_embed|rel_pos|bias|norm|embeddings",
        },
        "decoder": {"match": "^decoder", "lr_factor": 0.7},
    }
    groups = parameter_groups(network, rules, lr=1e-4, lr_backbone=1.5e-4, weight_decay=1e-4)
    assert len(groups) == 28  # 12 blocks with and without decay, stem, last norm, decoder, rest
    found = by_name(network, groups)
    rates = {name: (pytest.approx(lr, rel=1e-4), decay) for name, (_, lr, decay) in found.items()}
    assert rates["backbone.embeddings.weight"] == (3.2326e-6, 0.0)
    assert rates["backbone.layer.0.linear.weight"] == (4.0407e-6, 1e-4)
    assert rates["backbone.layer.0.linear.bias"] == (4.0407e-6, 0.0)
    assert rates["backbone.layer.11.linear.weight"] == (4.704e-5, 1e-4)
    assert rates["backbone.layernorm.weight"] == (7.35e-5, 0.0)
    assert rates["decoder.bias"] == (7e-5, 1e-4)
    assert rates["head.weight"] == (1e-4, 1e-4)


def test_a_dropped_rule_is_as_if_absent():
    network = make_network()
    with_none = parameter_groups(network, {"norm": None}, lr=1.0)
    assert [group["name"] for group in with_none] == ["rest"]


def test_fused_adamw_takes_the_groups_and_skips_a_step():
    network = make_network()
    groups = parameter_groups(network, {"norm": {"match": "norm", "weight_decay": 0.0}}, lr=0.1, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    network.head(torch.ones(1, 4)).sum().backward()
    before = network.head.weight.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(network.head.weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(network.head.weight, before)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"gone": {"match": "transformer"}}, r"param_groups\.gone .*no trainable parameter.*param_groups\.gone=null"),
        ({"all": {"match": "."}, "norm": {"match": "norm"}}, r"param_groups\.all comes first"),
        ({"norm": {"match": "norm", "rate": 1.0}}, "has rate; a rule knows block, layer_decay"),
        ({"norm": {"match": "(norm"}}, r"norm\.match is '\(norm', no regular expression"),
        ({"norm": {"lr": 1.0}}, r"has no match.*norm\.norms=true"),
        ({"norm": {"norms": True, "match": "^head"}}, r"norms that match '\^head'.*no trainable parameter"),
        ({"norm": {"match": "norm", "layer_decay": 0.8}}, "needs both or neither"),
        ({"norm": 3}, r"param_groups\.norm is 3; it must be a rule"),
        ({"norm": {"match": 3}}, r"norm\.match is 3, no regular expression"),
        ({"norm": {"match": "norm", "block": None}}, r"norm\.block is None, no regular expression"),
        ({"norm": {"norms": "no", "match": "norm"}}, r"norm\.norms is 'no'; it must be true or false"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(make_network(), rules, lr=1.0)


def test_a_backbone_rate_that_nothing_uses_is_refused():
    rules = {"backbone": {"match": "^backbone", "lr": 1e-5}}
    with pytest.raises(ValueError, match=r"optim\.lr_backbone is 0\.1, but no trainable parameter"):
        parameter_groups(make_network(), rules, lr=1.0, lr_backbone=0.1)


class ChannelNorm(nn.Module):
    """As other libraries write one: no class of torch's above it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class Normalised(nn.Module):
    """Named after norms, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4))


def test_norms_are_recognised_by_their_type_whatever_their_name():
    network = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)),
            "b": nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), ChannelNorm(), nn.InstanceNorm1d(4, affine=True)),
            "normed_head": nn.Linear(4, 4),
            "norm": Normalised(),
            "bn": nn.ModuleDict({"weight": nn.Linear(4, 4)}),
        }
    )
    rules = {"norm": {"norms": True, "weight_decay": 0.0}}
    found = by_name(network, parameter_groups(network, rules, lr=1.0, weight_decay=0.1))
    undecayed = {name for name, (_, _, decay) in found.items() if decay == 0}
    assert undecayed == {
        *("a.1.weight", "a.1.bias", "a.2.weight", "a.2.bias"),
        *("b.0.weight", "b.0.bias", "b.1.weight", "b.2.gain", "b.3.weight", "b.3.bias"),
    }


def test_a_rule_for_norms_may_also_ask_for_a_name():
    network = make_network()
    rules = {"norm": {"norms": True, "match": "^(?!encoder)", "weight_decay": 0.0}}
    found = by_name(network, parameter_groups(network, rules, lr=1.0, weight_decay=0.1))
    assert found["backbone.norm.weight"][2] == 0
    assert found["encoder.norm.weight"][2] == 0.1


@pytest.mark.parametrize("name", ["resnet50", "convnext_atto", "mobilenetv4_conv_small", "levit_128"])
def test_no_norm_of_a_timm_network_is_decayed(name):
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, features_only=True)
    rules = {"norm": {"norms": True, "weight_decay": 0.0}}
    found = by_name(network, parameter_groups(network, rules, lr=1.0, weight_decay=0.1))
    decayed = {name for name, (_, _, decay) in found.items() if decay}
    scales = [name for name, p in network.named_parameters() if p.ndim == 1 and name.endswith("weight")]
    assert scales
    assert not decayed & set(scales)


def test_a_rule_for_what_an_adapter_has_frozen_may_idle_but_no_other() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    network[1].requires_grad_(False)
    rules = {"norm": {"norms": True, "weight_decay": 0.0}}
    with pytest.raises(ValueError, match=r"optim\.param_groups\.norm is for norms"):
        parameter_groups(network, rules, lr=0.1)
    (group,) = parameter_groups(network, rules, lr=0.1, may_idle=True)
    assert group["name"] == "rest"
    with pytest.raises(ValueError, match=r"optim\.param_groups\.head is for parameters that match 'head'"):
        parameter_groups(network, rules | {"head": {"match": "head"}}, lr=0.1, may_idle=True)
