"""Any EdgeCrafter as libreyolo builds it, with the same weights."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
from torch import Tensor, nn

from detr_exp.model.pretrained_ec import to_official

# A network of all parts that takes milliseconds.
SMALL = [
    "model=ecdet_s",
    "model.image_size=[64,96]",
    *(f"model.backbone.body.{key}" for key in ("width=32", "num_heads=2", "depth=2", "taps=[0,1]")),
    *(f"model.{key}=32" for key in ("backbone.channels", "hidden_dim", "neck.hidden_dim", "dim_feedforward")),
    *("model.neck.dim_feedforward=32", "model.neck.expansion=0.5", "model.neck.depth_mult=0.34", "model.num_layers=2"),
    *("model.num_queries=20", "model.num_denoising=10"),
]


def libre_of(network: Any, size: str) -> nn.Module:
    """libreyolo's ECDet of a published size, with the weights of `network`."""
    module = pytest.importorskip("libreyolo.models.ec.nn")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = module.LibreECModel(size, nb_classes=network.num_classes, eval_spatial_size=None)
    peer.decoder.num_queries, peer.decoder.num_denoising = network.num_queries, network.num_denoising
    peer = peer.to(next(network.parameters()).dtype)
    state = official_of(network)
    for name in ("decoder.anchors", "decoder.valid_mask"):  # of one size of images; without, the peer takes any size
        del state[name]
    peer.load_state_dict(state)
    return peer


def libre_criterion() -> nn.Module:
    """libreyolo's losses of seven classes."""
    loss = pytest.importorskip("libreyolo.models.ec.loss")
    matching = pytest.importorskip("libreyolo.models.dfine.matcher")
    weights = {"loss_mal": 1, "loss_bbox": 5, "loss_giou": 2, "loss_fgl": 0.15, "loss_ddf": 1.5}
    return loss.ECCriterion(
        matching.HungarianMatcher({"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}),
        weights,
        ["mal", "boxes", "local"],
        num_classes=7,
        reg_max=32,
        gamma=1.5,
    )


def official_of(network: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The content of an official file, or a state dict in the names of one."""
    points = network.decoder.layers[0].cross_attn.points_per_level
    state = network.state_dict() if state is None else state
    return to_official(state, num_points=points, spatial_shapes=network.spatial_shapes())
