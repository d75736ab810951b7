"""A small D-FINE, and any D-FINE as transformers and libreyolo build it, with the same weights."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from detr_exp.model.pretrained_dfine import huggingface_config, to_huggingface
from detr_exp.model.pretrained_rtdetr import without_layers_beyond

# A network of all parts that takes milliseconds.
SMALL = [
    "model=dfine_tiny",
    "model/backbone=hgnetv2_b0",
    "model.image_size=[96,128]",
    *(f"model.{key}=32" for key in ("hidden_dim", "neck.hidden_dim", "dim_feedforward", "neck.dim_feedforward")),
    "model.num_queries=20",
    "model.num_denoising=10",
]


def peer_of(network: Any, cfg: DictConfig) -> nn.Module:
    """transformers' D-FINE with the weights of `network`, float64, attention spelled out."""
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    model = OmegaConf.to_container(cfg.model, resolve=True)
    settings = huggingface_config(model, [f"class {index}" for index in range(network.num_classes)])
    for name in ("architectures", "model_type"):
        settings.pop(name)
    backbone = settings.pop("backbone_config")
    backbone.pop("model_type")
    config = DFineConfig(backbone_config=HGNetV2Config(**backbone), attn_implementation={"": "eager"}, **settings)
    peer = DFineForObjectDetection(config).double()
    state = to_huggingface(
        without_layers_beyond(network.state_dict(), network.decoder.eval_idx), num_points=model["num_points"]
    )
    keys = peer.load_state_dict(state, strict=False)
    assert {name for name in keys.unexpected_keys if not name.endswith("num_batches_tracked")} == set()
    # heads at the top are the same modules
    assert {name for name in keys.missing_keys if not name.startswith(("class_embed.", "bbox_embed."))} == set()
    return peer
