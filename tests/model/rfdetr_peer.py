"""The `rfdetr` package as an oracle: its networks with random weights, and ours with the same."""

import logging
import warnings
from functools import partial

import torch

from detr_exp import build
from detr_exp.model.backbone.dinov2_windowed import WindowedDinov2
from detr_exp.model.decoder.rfdetr import GroupDecoder
from detr_exp.model.decoder.rfdetr_keypoint import KeypointDecoder
from detr_exp.model.head.mask import MaskHead
from detr_exp.model.neck.projector import Projector
from detr_exp.model.pretrained_rfdetr import from_rfdetr
from detr_exp.model.rfdetr import RFDETR
from detr_exp.model.rfdetr_keypoint import RFDETRKeypoint


def peer(kind="Nano", train_kind="", **changes):
    """A network of the package, its config and its training config; nothing is downloaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        from rfdetr import config
        from rfdetr.models.lwdetr import build_model_from_config

        torch.manual_seed(0)
        # a file name it does not know keeps it from downloading a backbone
        settings = dict(device="cpu", pretrain_weights="/nonexistent/x.pth") | changes
        model_config = getattr(config, f"RFDETR{kind}Config")(**settings)
        train_config = getattr(config, f"{train_kind}TrainConfig")(dataset_dir=".", output_dir=".")
        network = build_model_from_config(model_config, train_config)
        logging.disable(logging.NOTSET)
    _fill_zeros(network)
    return network, model_config, train_config


@torch.no_grad()
def _fill_zeros(network):
    """What starts at zero (or as the identity) would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("lambda1"):
            parameter.copy_(0.5 + 0.1 * noise)
        elif name.endswith("instance_kp_layer_scale"):
            parameter.fill_(0.3)
        elif parameter.abs().sum() == 0 or "norm" in name:
            parameter.add_(0.05 * noise)


def backbone(config, **changes):
    settings = dict(
        image_size=[config.resolution] * 2,
        width=384,
        num_heads=6,
        patch_size=config.patch_size,
        num_windows=config.num_windows,
        out_blocks=config.out_feature_indexes,
        position_grid=config.positional_encoding_size,
    )
    return WindowedDinov2(**settings | changes)


def settings_of(config):
    """Arguments of our networks that make them as the package's."""
    return dict(
        num_classes=config.num_classes + 1,  # it has one logit more than it has labels
        activation="sigmoid",
        backbone=backbone(config),
        neck=partial(Projector, levels=config.projector_scale, num_bottlenecks=3),
        decoder=partial(
            KeypointDecoder if config.use_grouppose_keypoints else GroupDecoder,
            num_heads=config.sa_nheads,
            num_cross_heads=config.ca_nheads,
            num_points=config.dec_n_points,
            dim_feedforward=2048,
        ),
        image_size=[config.resolution] * 2,
        pixel_mean=None,
        pixel_std=None,
        hidden_dim=config.hidden_dim,
        num_layers=config.dec_layers,
        num_queries=config.num_queries,
        num_groups=config.group_detr,
    )


def alike(config):
    """Our network for a config of the package."""
    if config.use_grouppose_keypoints:
        counts = [*config.num_keypoints_per_class, *[0] * (config.num_classes + 1)][: config.num_classes + 1]
        return RFDETRKeypoint(**settings_of(config), keypoint_counts=counts, score_alpha=0.2)
    mask_head = partial(MaskHead, downsample=4) if config.segmentation_head else None
    return RFDETR(**settings_of(config), mask_head=mask_head)


def twin(network, config):
    """Our network with the weights of the package's."""
    ours = alike(config)
    ours.load_state_dict(from_rfdetr(network.state_dict(), ours))
    return ours


def peer_input(ours, images):
    """Images as the package takes them: normalised, with a mask."""
    from rfdetr.utilities.tensors import NestedTensor

    no_padding = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
    return NestedTensor((images - ours.pixel_mean) / ours.pixel_std, no_padding)


def two_images(height, width):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(7))


def criterion_for(num_classes, keypoint_counts=(), **weights):
    """Our criterion with the package's weights."""
    overrides = [f"loss.{name}={weight}" for name, weight in weights.items()]
    made = build.criterion(build.compose(["loss=ia_bce", f"data.num_classes={num_classes}", *overrides]))
    made.keypoint_counts = tuple(keypoint_counts)
    return made
