"""Muon with AdamW beside it, compared with torch's two optimisers, each on its part."""

import copy

import pytest
import torch
from torch import nn

from detr_exp import build
from detr_exp.optim.muon import Muon


class Network(nn.Module):
    """An embedding, a hidden matrix, a convolution and a class head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.hidden = nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def class_tensors(self):
        return {"head.weight": 0, "head.bias": 0}

    def forward(self, words):
        return self.head(self.conv(self.hidden(self.embedding(words))[..., None, None]).flatten(1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


def step(network, *optimizers):
    torch.manual_seed(1)
    for optimizer in optimizers:
        optimizer.zero_grad()
    network(torch.arange(5)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_matrices_of_hidden_layers_follow_torchs_muon_and_the_rest_its_adamw(network):
    other = copy.deepcopy(network)
    groups = Muon.split([{"params": list(network.parameters()), "lr": 0.01, "weight_decay": 0.1}], network)
    ours = Muon(groups)
    muon = torch.optim.Muon([other.hidden.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for name, p in other.named_parameters() if name != "hidden.weight"]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        step(network, ours)
        step(other, muon, adamw)
    for (name, parameter), expected in zip(network.named_parameters(), other.parameters()):
        assert torch.equal(parameter, expected), name


def test_a_detector_gives_it_its_hidden_matrices(tiny_run):
    cfg = build.compose([*tiny_run, "optim=muon"])
    network = build.network(cfg)
    optimizer = build.optimizer(cfg)(network)
    names = {id(p): name for name, p in network.named_parameters()}
    taken = {names[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert "decoder.layers.0.linear1.weight" in taken
    assert not [name for name in taken if "class_embed" in name or "score_head" in name or ".conv" in name]
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_an_older_torch_is_reported(network, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"has no Muon, which needs torch >= 2\.9; use optim=adamw"):
        Muon(network.parameters())
