"""Convolutions that make two maps of one (DEIMv2, arXiv 2509.20787), for the smallest networks.

Legend: E channels of the encoder, C of the backbone's map.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.model.layer.conv import ConvNorm
from detr_exp.model.layer.fusion import ElanLayer
from detr_exp.model.neck.hybrid_encoder import elan_width


class PooledDown(nn.Module):
    """Halves a map: averages of 3x3 cells, zeros beyond the border included, then a 1x1 convolution."""

    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        self.cv = ConvNorm(channels, channels, 1, act=act)

    def forward(self, maps: Tensor) -> Tensor:
        return self.cv(F.avg_pool2d(maps, kernel_size=3, stride=2, padding=1))


class LiteEncoder(nn.Module):
    """The backbone's map and one of half its size, with the average of the whole image in it, fused down and up.

    Args:
        channels, strides: of the backbone's only map.
        hidden_dim: E, of both maps that leave the encoder.
        expansion, depth_mult, act: as in `HybridEncoder`.

    Raises:
        ValueError: the backbone has several maps.
    """

    def __init__(
        self,
        *,
        channels: list[int],
        strides: list[int],
        hidden_dim: int,
        expansion: float,
        depth_mult: float,
        act: str,
    ) -> None:
        super().__init__()
        if len(channels) != 1:
            raise ValueError(
                f"the backbone has maps of strides {strides} but this neck reads one; choose it: "
                f"model.backbone.out_strides=[{strides[-1]}]"
            )
        self.out_channels = [hidden_dim, hidden_dim]
        self.out_strides = [strides[0], 2 * strides[0]]
        self.gradient_checkpointing = False
        hidden, num_blocks = elan_width(expansion, hidden_dim), round(3 * depth_mult)

        def fused() -> ElanLayer:
            return ElanLayer(hidden_dim, hidden_dim, hidden=hidden, num_blocks=num_blocks, act=act, split=True)

        self.input_proj = nn.ModuleList([ConvNorm(channels[0], hidden_dim, 1)])
        self.down1 = PooledDown(hidden_dim, act)
        self.down2 = PooledDown(hidden_dim, act)
        self.bi_fusion = ConvNorm(hidden_dim, hidden_dim, 1, act=act)
        self.fpn_block = fused()
        self.pan_block = fused()

    def forward(self, maps: list[Tensor], padding: list[Tensor] | None = None) -> list[Tensor]:
        """`[B, C, h, w]` of the backbone -> `[B, E, h, w]` and `[B, E, h / 2, w / 2]`; both sides are even.

        Args:
            padding: `[B, h, w]` bool of the map, True for padded cells, which do not count in the mean of an image.
        """
        fine = self.input_proj[0](maps[0])
        coarse = self.down1(fine)
        if padding is None:
            mean = coarse.mean((2, 3), keepdim=True)
        else:
            seen = ~padding[0][:, None, ::2, ::2]
            mean = (coarse * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)
        coarse = self.bi_fusion(coarse + mean)
        fine = self._run(self.fpn_block, fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return [fine, self._run(self.pan_block, coarse + self.down2(fine))]

    def _run(self, module: nn.Module, maps: Tensor) -> Tensor:
        return checkpointed(module, maps) if self.gradient_checkpointing and self.training else module(maps)
