"""LW-DETR files of its authors and of transformers, in old and new names, give the network that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lwdetr_peer import theirs_of
from safetensors.torch import save_file
from torch import Tensor

from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_rfdetr import to_rfdetr

SMALL = [
    *("model=lwdetr_large", "loss=ia_bce", "model.image_size=[128,128]", "model.num_queries=12", "model.num_groups=2"),
    *("model.hidden_dim=48", "model.dim_feedforward=64", "model.num_layers=1", "model.neck.num_bottlenecks=1"),
    *("model.backbone.width=48", "model.backbone.depth=2", "model.backbone.windowed=[0]", "model.backbone.taps=[0,1]"),
]


def official(network: Any) -> dict[str, Tensor]:
    """The names of the authors, who have queries, keys and values in one."""
    state = to_rfdetr(network.state_dict(), network.num_queries)
    for name in [name for name in state if name.endswith("attn.q_proj.weight")]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return state


@pytest.mark.parametrize("squeeze", ["false", "true"])
def test_a_file_of_the_authors(squeeze: str, make: Any, randomise: Any, tmp_path: Path) -> None:
    words = [*SMALL, f"model.neck.squeeze={squeeze}"]
    network, other = randomise(make(*words)), make(*words)
    torch.save({"model": official(network), "epoch": 59}, tmp_path / "LWDETR.pth")
    told = load_weights(other, tmp_path / "LWDETR.pth")
    assert "new" not in told
    for name, tensor in other.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, network.state_dict()[name]), name


@pytest.mark.parametrize("is_old", [False, True])
def test_a_file_of_transformers(is_old: bool, make: Any, randomise: Any, tmp_path: Path) -> None:
    network, other = randomise(make(*SMALL)), make(*SMALL)
    state = theirs_of(network)
    if is_old:
        before = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
        before |= {"o_proj": "output"}
        for name in [name for name in state if ".encoder.layer." in name and ".attention." in name]:
            part = name.split(".")[-2]
            state[name.replace(part, before[part])] = state.pop(name)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_a_file_of_another_family_is_refused(make: Any, tmp_path: Path) -> None:
    torch.save({"model": official(make("model=lwdetr_tiny", num_classes=4))}, tmp_path / "LWDETR.pth")
    assert read_weights(tmp_path / "LWDETR.pth").origin == "LW-DETR"
    for words in (["model=rfdetr", "model.num_groups=2"], SMALL):
        with pytest.raises(ValueError, match="use model=lwdetr_tiny"):
            load_weights(make(*words, num_classes=4), tmp_path / "LWDETR.pth")
