"""Vision transformers of timm as plain ones: maps of one size, of several blocks, after the last norm."""

from __future__ import annotations

from typing import Any, cast

import timm
from torch import Tensor, nn

from detr_exp.model.backbone.timm_backbone import published
from detr_exp.model.backbone.weights import WITHOUT, stored
from detr_exp.model.layer.windows import visible
from detr_exp.values import Values


class TimmViT(nn.Module):
    """A vision transformer of timm, whose maps all pass its last norm, as those of DINOv3 are meant to.

    Args:
        name: as in `timm.list_models()`.
        taps: blocks, from 0, whose outputs are the maps.
        pretrained: see `TimmBackbone`. The weights of DINOv3 are under Meta's DINOv3 licence.

    Attributes:
        width, pixel_mean, pixel_std, initial: as in other backbones.
    """

    def __init__(self, *, name: str, taps: list[int], pretrained: bool | str) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(
                f"timm {timm.__version__} has no network {name!r}; set model.backbone.body.name to one of "
                "timm.list_models('*dinov3*'), e.g. model.backbone.body.name=vit_small_patch16_dinov3_qkvb"
            )
        self.taps = list(taps)
        self.initial = None
        options: Values = {"num_classes": 0, "dynamic_img_size": True}
        if pretrained:
            self.initial, _ = stored(pretrained, published(name) if pretrained is True else "")
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(self.initial.path)}}
        try:
            self.model = cast(Any, timm.create_model(name, **options))  # neither do its networks have types
        except Exception as error:  # each network checks its arguments and files in its own way
            raise ValueError(
                f"timm cannot make {name} ({' '.join(str(error).split())[:300]}); choose another "
                f"model.backbone.body.name, or another file, model.backbone.pretrained=<file>, {WITHOUT}"
            ) from error
        self.width = self.model.num_features
        config = self.model.pretrained_cfg
        self.pixel_mean, self.pixel_std = list(config["mean"]), list(config["std"])

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` -> a map `[B, C, H / 16, W / 16]` for each tap."""
        return self._maps(images, None)

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]:
        """As `forward`, with the padding `[B, H, W]`; nothing attends to patches that are all padding."""
        patch = self.model.patch_embed.patch_size[0]
        return self._maps(images, visible(padding_mask, patch, self.model.num_prefix_tokens))

    def _maps(self, images: Tensor, allowed: Tensor | None) -> list[Tensor]:
        made = self.model.forward_intermediates(
            images, self.taps, norm=True, intermediates_only=True, attn_mask=allowed
        )
        return list(made)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations instead of storing them."""
        self.model.set_grad_checkpointing(enabled)
