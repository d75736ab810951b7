"""LoRA by hand: `x W' + (alpha / r) (x A') B'`, what is adapted, what is frozen, and what merging leaves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.model.adapter.lora import LoRA, LowRank
from detr_exp.model.adapter.slim import load_own_state, merge, own_state
from detr_exp.model.backbone.dinov2_windowed import WindowedDinov2
from detr_exp.model.layer.attention import SelfAttention
from detr_exp.model.layer.group_queries import GroupLinear


def lora(**changes) -> LoRA:
    settings = dict(rank=4, alpha=12, dropout=0.0, target_modules=None, modules_to_save=None)
    return LoRA(**(settings | changes))


def filled(network: nn.Module) -> nn.Module:
    """As after a training: no product is zero."""
    for name, parameter in network.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return network


class Layers(nn.Module):
    """Every kind of weight that is adapted, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.packed = SelfAttention(16, 2)
        self.torch_packed = nn.MultiheadAttention(16, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(16, 2, kdim=8, vdim=6, batch_first=True)
        self.grouped = GroupLinear(2, 16, 5)
        self.linear = nn.Linear(16, 3)

    def forward(self, images):
        tokens = self.norm(self.conv(images)).flatten(2).transpose(1, 2)
        tokens = self.packed(tokens, position=tokens)
        tokens = self.torch_packed(tokens, tokens, tokens, need_weights=False)[0]
        tokens = self.apart(tokens, tokens[..., :8], tokens[..., :6])[0]
        return self.linear(tokens), self.grouped(tokens.expand(2, -1, -1, -1))


ADAPTED = {
    "packed.in_proj_weight": (48, 16),
    "packed.out_proj.weight": (16, 16),
    "torch_packed.in_proj_weight": (48, 16),
    "torch_packed.out_proj.weight": (16, 16),
    "apart.q_proj_weight": (16, 16),
    "apart.k_proj_weight": (16, 8),
    "apart.v_proj_weight": (16, 6),
    "apart.out_proj.weight": (16, 16),
    "grouped.weight": (2, 5, 16),
    "linear.weight": (3, 16),
}


def images() -> torch.Tensor:
    return torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_formula_is_that_of_peft() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    adapted = nn.Sequential(copy.deepcopy(plain))
    lora(rank=2, alpha=7).adapt(adapted, [])
    filled(adapted)
    product = adapted[0].parametrizations.weight[0]
    tokens = torch.randn(3, 6)
    by_hand = plain(tokens) + (7 / 2) * (tokens @ product.lora_A.T) @ product.lora_B.T
    torch.testing.assert_close(adapted(tokens), by_hand, rtol=0, atol=1e-6)


def test_a_starts_as_pefts_and_b_at_zero() -> None:
    torch.manual_seed(0)
    product = LowRank(torch.empty(7, 50), 400, 1.0, 0.0)
    torch.manual_seed(0)
    peft = torch.empty(400, 50)
    nn.init.kaiming_uniform_(peft, a=math.sqrt(5))
    assert torch.equal(product.lora_A, peft)
    assert not product.lora_B.any()


def test_it_computes_the_same_until_it_is_trained() -> None:
    torch.manual_seed(0)
    network = Layers().eval()
    before = network(images())
    lora().adapt(network, [])
    assert all(map(torch.equal, network(images()), before))


def test_all_attention_and_linear_layers_are_adapted_and_nothing_else_is_trained() -> None:
    network = Layers()
    lora().adapt(network, [])
    trained = {name: tuple(p.shape) for name, p in network.named_parameters() if p.requires_grad}
    wanted = {}
    for name, (*stacked, outputs, inputs) in ADAPTED.items():
        place, _, kind = name.rpartition(".")
        wanted[f"{place}.parametrizations.{kind}.0.lora_A"] = (*stacked, 4, inputs)
        wanted[f"{place}.parametrizations.{kind}.0.lora_B"] = (*stacked, outputs, 4)
    assert trained == wanted


def test_every_product_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = Layers().train()
    lora().adapt(network, [])
    filled(network)
    sum(part.square().sum() for part in network(images())).backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_computes_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Layers().eval()
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    lora().adapt(network, [])
    filled(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
        before = network(images())
        after = merge(network)(images())
    assert all(map(torch.equal, before, after))
    assert set(network.state_dict()) == set(base)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == set(ADAPTED)
    assert not any(parametrize.is_parametrized(module) for module in network.modules())


@pytest.mark.parametrize("family", ["rtdetrv2_tiny", "dfine_tiny", "deimv2_atto", "lwdetr_tiny", "rfdetr_seg_tiny"])
def test_a_network_of_each_family_is_adapted_and_merged(family: str) -> None:
    cfg = compose(["data.num_classes=2", f"model={family}", "model.image_size=[64,64]", "model.num_queries=4"])
    torch.manual_seed(0)
    network = build.network(cfg).eval()
    pixels, names = torch.rand(1, 3, 64, 64), set(network.state_dict())
    with torch.no_grad():
        before = network(pixels).pred
        lora().adapt(network, list(network.class_tensors()))
        assert torch.equal(network(pixels).pred.logits, before.logits)
        adapted = filled(network)(pixels).pred
        merged = merge(network)(pixels).pred
    assert not torch.equal(adapted.boxes, before.boxes)
    assert torch.equal(merged.logits, adapted.logits)
    assert torch.equal(merged.boxes, adapted.boxes)
    assert set(network.state_dict()) == names


def test_a_shared_weight_stays_shared() -> None:
    """Adapted once, used adapted wherever it stands, merged once."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    network[1].weight = network[0].weight
    lora().adapt(network, [])
    filled(network)
    tokens = torch.randn(2, 5)
    adapted = network[0].weight
    assert torch.equal(network(tokens), tokens @ adapted.T @ adapted.T)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 2 * 4 * 5
    before = network(tokens)
    assert torch.equal(merge(network)(tokens), before)
    assert network[0].weight is network[1].weight


def test_what_starts_anew_or_is_named_is_trained_whole() -> None:
    network = Layers()
    lora(modules_to_save=[r"norm\.bias"], target_modules=["^packed", "linear"]).adapt(network, ["linear.weight"])
    trained = [name for name, p in network.named_parameters() if p.requires_grad and "lora" not in name]
    assert trained == ["norm.bias", "linear.weight"]
    assert {name.split(".")[0] for name in network.state_dict() if "lora" in name} == {"packed"}


def test_one_part_may_be_adapted_and_the_others_trained_whole() -> None:
    network = Layers()
    lora(target_modules=["^packed"], modules_to_save=["^(?!packed)"]).adapt(network, [])
    own = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    packed = {name for name in own if name.startswith("packed")}
    assert packed == {name for name in own if "lora" in name}
    assert len(packed) == 4
    assert own - packed == {name for name, _ in Layers().named_parameters() if not name.startswith("packed")}


def test_what_the_network_has_frozen_is_not_adapted() -> None:
    network = Layers()
    network.apart.requires_grad_(False)
    lora().adapt(network, [])
    assert not any("apart" in name for name, p in network.named_parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """With everything before it frozen too: recomputing must not need inputs that ask for gradients."""
    sizes = dict(width=16, num_heads=2, patch_size=4, num_windows=1, out_blocks=[1, 2])
    network = WindowedDinov2(image_size=[16, 16], **sizes).train()
    lora().adapt(network, [])
    filled(network)
    gradients = []
    for is_on in (False, True):
        network.set_gradient_checkpointing(is_on)
        network.zero_grad()
        sum(level.sum() for level in network(torch.ones(1, 3, 16, 16))).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 16  # two for each of four layers of two blocks
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0] | gradients[1])


def test_loading_after_a_pass_counts() -> None:
    torch.manual_seed(0)
    network = Layers().eval()
    lora().adapt(network, [])
    trained = {name: tensor.clone() for name, tensor in own_state(filled(network)).items()}
    wanted = network(images())
    with torch.no_grad():
        filled(network)(images())
    load_own_state(network, trained)
    assert all(map(torch.equal, network(images()), wanted))


def test_dropout_is_of_inputs_and_only_in_training() -> None:
    torch.manual_seed(0)
    network = filled_linear(dropout=0.5)
    product, base = network[0].parametrizations.weight[0], network[0].parametrizations.weight.original
    whole = product.lora_B @ product.lora_A * product.scale
    ratio = (network[0].weight - base) / whole
    kept = (ratio[0] > 1).float()  # by columns: an input is left out for all outputs
    torch.testing.assert_close(ratio, 2 * kept.expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert 0.3 < kept.mean() < 0.7
    torch.testing.assert_close(network.eval()[0].weight, base + whole)


def filled_linear(**changes) -> nn.Module:
    network = nn.Sequential(nn.Linear(200, 3))
    lora(**changes).adapt(network, [])
    return filled(network)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"target_modules": ["qkw"]}, "such as apart.k_proj_weight"),
        ({"target_modules": ["conv"]}, "matches no name"),
        ({"modules_to_save": ["hed"]}, "model.adapter.modules_to_save=[...]"),
        ({"target_modules": "linear"}, "model.adapter.target_modules=[linear]"),
        ({"modules_to_save": ["("]}, "no regular expression"),
        ({"modules_to_save": ["weight"]}, "finds no trainable attention or linear layer"),
    ],
)
def test_mistakes_are_said_with_what_mends_them(changes, wanted: str) -> None:
    with pytest.raises(ValueError, match="adapter") as refused:
        lora(**changes).adapt(Layers(), [])
    assert wanted in str(refused.value)
