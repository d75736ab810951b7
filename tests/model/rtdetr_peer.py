"""A small network, and any network as transformers builds it, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detr_exp.model.pretrained_rtdetr import huggingface_config, to_huggingface, without_layers_beyond

# A network of all parts that takes milliseconds.
SMALL = [
    "model=rtdetrv2_tiny",
    "model.backbone.widths=[8,12,16,24]",
    "model.image_size=[96,128]",
    *(f"model.{key}=32" for key in ("hidden_dim", "neck.hidden_dim", "dim_feedforward", "neck.dim_feedforward")),
    "model.num_queries=20",
    "model.num_denoising=10",
]


def peer_of(network: Any, cfg: DictConfig) -> nn.Module:
    """transformers' RT-DETRv2 with the weights of `network`, float64, attention spelled out.

    Its scaled-dot-product attention ignores the denoising mask in float64.
    """
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    model = OmegaConf.to_container(cfg.model, resolve=True)
    settings = huggingface_config(model, [f"class {index}" for index in range(network.num_classes)])
    for name in ("architectures", "model_type"):
        settings.pop(name)
    backbone = settings.pop("backbone_config")
    backbone.pop("model_type")
    config = RTDetrV2Config(
        backbone_config=RTDetrResNetConfig(**backbone), attn_implementation={"": "eager"}, **settings
    )
    peer = RTDetrV2ForObjectDetection(config).double()
    state = without_layers_beyond(network.state_dict(), network.decoder.eval_idx)
    state = to_huggingface(state, num_points=model["num_points"])
    aliases = {n: t for n, t in peer.state_dict(keep_vars=True).items() if n.startswith(("class_embed", "bbox_embed"))}
    keys = peer.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert set(keys.missing_keys) <= set(aliases)
    assert all(tensor is peer.get_parameter("model.decoder." + name) for name, tensor in aliases.items())
    return peer


def labels_of(targets) -> list[dict[str, torch.Tensor]]:
    """Targets as transformers takes them."""
    pairs = zip(targets.labels.split(targets.counts), targets.boxes.split(targets.counts))
    return [{"class_labels": labels, "boxes": boxes.double()} for labels, boxes in pairs]
