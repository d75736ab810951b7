"""Any LW-DETR as transformers builds it, with the same weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LwDetrConfig, LwDetrForObjectDetection

from detr_exp.build import compose
from detr_exp.model.pretrained_lwdetr import to_huggingface, transformers_config
from detr_exp.model.pretrained_rfdetr import to_rfdetr
from detr_exp.values import values_of

FEW = ["loss=ia_bce", "model.num_queries=20", "model.num_groups=3"]


def peer_of(network: Any, *words: str) -> nn.Module:
    """transformers' network for words of ours, with the weights of `network`, float64."""
    classes = [f"class {index}" for index in range(network.num_classes)]
    config = transformers_config(values_of(compose([*words, f"data.num_classes={len(classes)}"]))["model"], classes)
    del config["architectures"]
    peer = LwDetrForObjectDetection(LwDetrConfig(**config)).double()
    peer.load_state_dict(theirs_of(network))
    return peer


def theirs_of(network: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict in the names of transformers."""
    return to_huggingface(to_rfdetr(network.state_dict() if state is None else state, network.num_queries))
