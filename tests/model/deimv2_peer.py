"""A small DEIMv2, and any DEIMv2 as libreyolo builds it, with the same weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, nn

from detr_exp.model.pretrained_deimv2 import to_official

FEW = ["model.num_queries=20", "model.num_denoising=10"]


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """The peer computes norms and targets in what it calls float, whatever its weights are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def libre_of(network: Any, size: str) -> nn.Module:
    """libreyolo's DEIMv2 of a published size, with the weights of `network`."""
    module = pytest.importorskip("libreyolo.models.deimv2.nn")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = module.LibreDEIMv2Model(size, nb_classes=network.num_classes)
    peer.decoder.num_queries, peer.decoder.num_denoising = network.num_queries, network.num_denoising
    peer.decoder.eval_spatial_size = None
    peer = peer.to(next(network.parameters()).dtype)
    state = official_of(network)
    for name in ("decoder.anchors", "decoder.valid_mask"):  # of one size of images; without, the peer takes any size
        del state[name]
        delattr(peer.decoder, name.partition(".")[2])
    peer.load_state_dict(state)
    return peer


def libre_criterion(size: str) -> nn.Module:
    """libreyolo's losses of seven classes, of its smallest networks or of the others."""
    loss = pytest.importorskip("libreyolo.models.deimv2.loss")
    matching = pytest.importorskip("libreyolo.models.deimv2.matcher")
    weights = {"loss_mal": 1, "loss_bbox": 5, "loss_giou": 2, "loss_fgl": 0.15, "loss_ddf": 1.5}
    is_lite = size in ("atto", "femto", "pico")
    return loss.DEIMv2Criterion(
        matching.HungarianMatcher({"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}),
        weights,
        ["mal", "boxes", *([] if is_lite else ["local"])],
        num_classes=7,
        reg_max=32,
        gamma=1.5,
        use_uni_set=not is_lite,
    )


def official_of(network: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The content of an official file, or a state dict in the names of one."""
    points = network.decoder.layers[0].cross_attn.points_per_level
    state = network.state_dict() if state is None else state
    return to_official(state, num_points=points, spatial_shapes=network.spatial_shapes())
