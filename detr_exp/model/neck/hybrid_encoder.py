"""Hybrid encoder of RT-DETR (arXiv 2304.08069, section 4.2): attention on the coarsest map, convolutions between maps.

Legend: E channels of the encoder; maps are ordered from fine to coarse, each half the size of the one before.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.model.layer.conv import ConvNorm
from detr_exp.model.layer.encoder_layer import EncoderLayer
from detr_exp.model.layer.fusion import CSPRepLayer, ElanLayer, SeparableDown
from detr_exp.model.layer.position import sine_position_embedding

FUSIONS = ("csp", "elan", "elan4", "elan5")


def elan_width(expansion: float, hidden_dim: int) -> int:
    """Channels within an `ElanLayer`, rounded as D-FINE does: 21 for 0.34 of 128."""
    return int(expansion * hidden_dim // 2)


class TransformerEncoder(nn.Module):
    """Encoder layers over the cells of one map."""

    def __init__(self, layers: list[EncoderLayer], temperature: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.temperature = temperature

    def forward(self, maps: Tensor, padding: Tensor | None) -> Tensor:
        """Map `[B, E, h, w]` -> the same shape; `padding` `[B, h, w]` is True for padded cells."""
        _, dim, height, width = maps.shape
        tokens = maps.flatten(2).transpose(1, 2)
        position = sine_position_embedding(
            height, width, dim, self.temperature, dtype=tokens.dtype, device=tokens.device
        )
        allowed = None
        if padding is not None:
            seen = ~padding.flatten(1)
            # An image too small for a single cell attends to all of them; a row without cells would be NaN.
            allowed = (seen | ~seen.any(1, keepdim=True))[:, None, None]
        for layer in self.layers:
            tokens = layer(tokens, position, allowed)
        # without this the map, and all that is computed from it, would be channels-last whatever the weights are
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()


class HybridEncoder(nn.Module):
    """Attention within the coarsest map, then a path down to the finest map and one back up.

    Args:
        channels, strides: of the backbone's maps.
        in_channels, feat_strides: null, or the values that the backbone must have.
        hidden_dim: E, of every map that leaves the encoder; a multiple of 4 and of `num_heads`.
        use_encoder_idx: maps that get attention, counted from the finest.
        num_encoder_layers: attention layers on each of them; 0 leaves attention out.
        dim_feedforward, dropout, enc_act: of the attention layers.
        pe_temperature: of the sine position embedding.
        expansion: hidden channels of the fusion blocks, as a share of E.
        depth_mult: RepVGG blocks in a fusion block, in units of three.
        act: activation of the convolutions.
        fusion: fusion blocks, "csp" (of RT-DETR), "elan" (of D-FINE), or "elan4" and "elan5" (of DEIMv2), which add the
            two maps instead of stacking them; "elan5" is the one with fewer convolutions.
        lateral_act: whether lateral convolutions have it, too.
        down: how the way up halves a map, "conv", or "separable" without an activation.
        keep_equal: pass on maps of the backbone that have E channels, without a projection.
    """

    def __init__(
        self,
        *,
        channels: list[int],
        strides: list[int],
        in_channels: list[int] | None,
        feat_strides: list[int] | None,
        hidden_dim: int,
        use_encoder_idx: list[int],
        num_encoder_layers: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        enc_act: str,
        pe_temperature: float,
        expansion: float,
        depth_mult: float,
        act: str,
        fusion: str = "csp",
        lateral_act: bool = True,
        down: str = "conv",
        keep_equal: bool = False,
    ) -> None:
        super().__init__()
        _require_equal("in_channels", in_channels, channels)
        _require_equal("feat_strides", feat_strides, strides)
        for key, value, known in (("fusion", fusion, FUSIONS), ("down", down, ("conv", "separable"))):
            if value not in known:
                raise ValueError(
                    f"model.neck.{key} is {value!r}; use {' or '.join(known)}: model.neck.{key}={known[0]}"
                )
        if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise ValueError(
                f"the backbone's strides are {strides} but each must be twice the one before; "
                "change model.backbone.out_strides"
            )
        self.adds = fusion in ("elan4", "elan5")
        self.use_encoder_idx = list(use_encoder_idx)
        self.out_channels = [hidden_dim] * len(channels)
        self.out_strides = list(strides)
        self.input_proj = nn.ModuleList(
            nn.Identity() if keep_equal and channel == hidden_dim else ConvNorm(channel, hidden_dim, 1)
            for channel in channels
        )

        def attention() -> TransformerEncoder:
            layers = [
                EncoderLayer(hidden_dim, num_heads, dim_feedforward, dropout=dropout, act=enc_act)
                for _ in range(num_encoder_layers)
            ]
            return TransformerEncoder(layers, pe_temperature)

        def fused() -> nn.Module:
            num_blocks = round(3 * depth_mult)
            if fusion == "csp":
                return CSPRepLayer(2 * hidden_dim, hidden_dim, num_blocks=num_blocks, expansion=expansion, act=act)
            return ElanLayer(
                hidden_dim if self.adds else 2 * hidden_dim,
                hidden_dim,
                hidden=elan_width(expansion, hidden_dim),
                num_blocks=num_blocks,
                act=act,
                split=self.adds,
                closing=fusion != "elan5",
            )

        def halved() -> nn.Module:
            return SeparableDown(hidden_dim) if down == "separable" else ConvNorm(hidden_dim, hidden_dim, 3, 2, act=act)

        steps = range(len(channels) - 1)
        self.gradient_checkpointing = False
        self.encoder = nn.ModuleList(attention() for _ in use_encoder_idx if num_encoder_layers)
        of_lateral = act if lateral_act else None
        self.lateral_convs = nn.ModuleList(ConvNorm(hidden_dim, hidden_dim, 1, act=of_lateral) for _ in steps)
        self.fpn_blocks = nn.ModuleList(fused() for _ in steps)
        self.downsample_convs = nn.ModuleList(halved() for _ in steps)
        self.pan_blocks = nn.ModuleList(fused() for _ in steps)

    def forward(self, maps: list[Tensor], padding: list[Tensor] | None = None) -> list[Tensor]:
        """Backbone maps `[B, C_i, h_i, w_i]` -> fused maps `[B, E, h_i, w_i]`.

        Args:
            padding: `[B, h_i, w_i]` bool for each map, True for padded cells.
        """
        maps = [project(level) for project, level in zip(self.input_proj, maps)]
        for index, encoder in zip(self.use_encoder_idx, self.encoder):
            maps[index] = self._run(encoder, maps[index], None if padding is None else padding[index])

        # Down: each coarse map, after its lateral convolution, is used again on the way up.
        *finer, top = maps
        lateral_maps = []
        for lateral, fuse, fine in zip(self.lateral_convs, self.fpn_blocks, reversed(finer)):
            top = lateral(top)
            lateral_maps.append(top)
            enlarged = F.interpolate(top, scale_factor=2.0, mode="nearest")
            top = self._run(fuse, self._joined(enlarged, fine))

        outputs = [top]
        for shrink, fuse, coarse in zip(self.downsample_convs, self.pan_blocks, reversed(lateral_maps)):
            outputs.append(self._run(fuse, self._joined(shrink(outputs[-1]), coarse)))
        return outputs

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second if self.adds else torch.cat([first, second], dim=1)

    def _run(self, module: nn.Module, *inputs: Tensor | None) -> Tensor:
        return checkpointed(module, *inputs) if self.gradient_checkpointing and self.training else module(*inputs)


def _require_equal(name: str, given: list[int] | None, derived: list[int]) -> None:
    if given is not None and list(given) != list(derived):
        raise ValueError(
            f"model.neck.{name} is {list(given)} but the backbone has {list(derived)}; drop model.neck.{name} "
            "to take it from the backbone, or choose another model/backbone"
        )
