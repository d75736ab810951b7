"""A small D-FINE, and any D-FINE as transformers and libreyolo build it, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from detr_exp.model.pretrained_dfine import huggingface_config, to_huggingface, to_official
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
SILU = ["model.ffn_activation=silu", "model.head_activation=silu"]


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
    state = without_layers_beyond(network.state_dict(), network.decoder.eval_idx)
    keys = peer.load_state_dict(to_huggingface(state, num_points=model["num_points"]), strict=False)
    assert {name for name in keys.unexpected_keys if not name.endswith("num_batches_tracked")} == set()
    # those of the heads at the top are of the same modules
    assert {name for name in keys.missing_keys if not name.startswith(("class_embed.", "bbox_embed."))} == set()
    return peer


def libre_of(network: Any, size: str, family: str) -> nn.Module:
    """libreyolo's D-FINE or DEIM of a published size, with the weights of `network`."""
    module = pytest.importorskip(f"libreyolo.models.{family}.nn")
    kind = module.LibreDFINEModel if family == "dfine" else module.LibreDEIMModel
    peer = kind(size, nb_classes=network.num_classes, eval_spatial_size=None, train_from_scratch=True)
    peer.decoder.num_queries, peer.decoder.num_denoising = network.num_queries, network.num_denoising
    peer = peer.to(next(network.parameters()).dtype)
    state = official_of(network)
    for name in ("decoder.anchors", "decoder.valid_mask"):  # of one size of images; without, the peer takes any size
        del state[name]
    peer.load_state_dict(state)
    return peer


def official_of(network: Any) -> dict[str, Tensor]:
    """The content of an official file."""
    points = network.decoder.layers[0].cross_attn.points_per_level
    return to_official(network.state_dict(), num_points=points, spatial_shapes=network.spatial_shapes())
