"""Any EdgeCrafter as libreyolo builds it, with the same weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detr_exp.model.layer.query_selection import POINT_EPS, anchor_logits, inverse_sigmoid
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


def libre_of(network: Any, size: str, side: int) -> nn.Module:
    """libreyolo's ECDet or ECSeg of a published size, for images of that side, with the weights of `network`."""
    module = pytest.importorskip("libreyolo.models.ec.nn")
    kind = module.LibreECModel if network.mask_head is None else module.LibreECSegModel
    with contextlib.redirect_stdout(io.StringIO()):
        peer = kind(size, nb_classes=network.num_classes, eval_spatial_size=(side, side))
    peer.decoder.num_queries, peer.decoder.num_denoising = network.num_queries, network.num_denoising
    peer = peer.to(next(network.parameters()).dtype)
    shapes = [(side // stride, side // stride) for stride in (8, 16, 32)]
    anchors, valid = anchor_logits(shapes, torch.float64, torch.device("cpu"))
    own = {"decoder.anchors": torch.where(valid, anchors, torch.inf)[None], "decoder.valid_mask": valid[None]}
    peer.load_state_dict(official_of(network) | own)
    return peer


def libre_pose_of(network: Any, size: str, side: int) -> nn.Module:
    """libreyolo's ECPose of a published size, for images of that side, with the weights of `network`."""
    module = pytest.importorskip("libreyolo.models.ec.nn")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = module.LibreECPoseModel(size, eval_spatial_size=(side, side))
    decoder = peer.decoder
    decoder.num_queries, decoder.dn_number = network.num_queries, network.num_denoising
    decoder.tgt_embed = nn.Embedding(network.num_queries, decoder.hidden_dim)
    peer = peer.to(next(network.parameters()).dtype)
    shapes = [(side // stride, side // stride) for stride in (8, 16, 32)]
    peer.load_state_dict(to_official(network.state_dict(), num_points=[4, 4, 4], spatial_shapes=shapes))
    return peer


@contextlib.contextmanager
def trained_as_evaluated(peer: nn.Module) -> Iterator[None]:
    """libreyolo's ECPose adds positions to tokens in evaluation only, and clamps points elsewhere than its authors.

    Its authors' code always adds them. What random numbers decide is the same everywhere: all labels are replaced by
    the seventh, and all points move in the same direction by the same share.
    """
    decoder, share = peer.decoder, 0.2
    positions: list[Tensor] = []
    handles = [decoder.decoder.half_pose_ref_point_head.register_forward_hook(lambda *a: positions.append(a[2]))]
    for index, head in enumerate(decoder.pose_embed):
        if index:
            place = lambda module, given, index=index: (given[0] + positions[index].detach(),)  # noqa: E731
            handles.append(head.register_forward_pre_hook(place))
    for layer in decoder.decoder.layers:
        layer.training = False

    def logits(values: Tensor) -> Tensor:
        return inverse_sigmoid(values, POINT_EPS)

    def chosen(*shape: Any, **_: object) -> Tensor:
        return torch.full(shape if isinstance(shape[0], int) else tuple(shape[0]), share, dtype=torch.float64)

    torch.set_default_dtype(torch.float64)  # of the copies that the peer makes
    with pytest.MonkeyPatch.context() as patch:
        for name in ("decoder", "pose_denoising"):
            patch.setattr(f"libreyolo.models.ec.{name}.inverse_sigmoid", logits)
        patch.setattr(torch, "rand", chosen)
        patch.setattr(torch, "rand_like", lambda like: torch.full_like(like, share))
        patch.setattr(torch, "randint", lambda high, shape, **_: torch.full(shape, 7))
        patch.setattr(torch, "randint_like", lambda like, low, high: torch.full_like(like, 7))
        patch.setattr(Tensor, "uniform_", lambda self, low, high: self.fill_(low + share * (high - low)))
        patch.setattr("detr_exp.model.layer.denoising._directions", lambda points: torch.full_like(points, 0.5**0.5))
        yield
    torch.set_default_dtype(torch.float32)
    for handle in handles:
        handle.remove()


def libre_pose_criterion() -> nn.Module:
    """libreyolo's losses of poses."""
    loss = pytest.importorskip("libreyolo.models.ec.pose_loss")
    return loss.ECPoseCriterion(loss.PoseHungarianMatcher())


@contextlib.contextmanager
def at_fixed_points() -> Iterator[None]:
    """Masks are compared at random points, which here are the same for every mask of a size."""

    def rand(count: int, num_points: int, two: int, **_: object) -> Tensor:
        made = np.random.default_rng(num_points).random((1, num_points, two))
        return torch.from_numpy(made).repeat(count, 1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        yield


def libre_seg_criterion() -> nn.Module:
    """libreyolo's losses of boxes and masks of seven classes."""
    loss = pytest.importorskip("libreyolo.models.ec.seg_loss")
    weights = {"loss_mal": 2, "loss_bbox": 1, "loss_giou": 1, "loss_fgl": 0.15, "loss_ddf": 1.5}
    costs = {"cost_class": 2, "cost_bbox": 1, "cost_giou": 1, "cost_mask_ce": 5, "cost_mask_dice": 5}
    return loss.ECSegCriterion(
        loss.ECSegHungarianMatcher(costs),
        weights | {"loss_mask_ce": 5, "loss_mask_dice": 5},
        ["mal", "boxes", "local", "masks"],
        num_classes=7,
        reg_max=32,
        gamma=1.5,
    )


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
