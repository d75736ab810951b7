"""Layer normalisation over the channels of a map."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.LayerNorm):
    """Normalises every pixel of `[B, C, h, w]` over its channels; costs no copy in channels-last memory."""

    def forward(self, input: Tensor) -> Tensor:
        normal = F.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normal.permute(0, 3, 1, 2)
