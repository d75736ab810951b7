"""Plain vision transformer whose blocks mostly attend within windows, the backbone of LW-DETR.

Chen et al. 2024, "LW-DETR", section 3; its published weights were first trained by masked image modelling (Zhang et
al. 2023, "CAE v2").

Legend: B images, P patch size, W windows a side, n = W * W windows an image, C width, (h, w) patches a side.

Tokens stay in the order of windows through all blocks ("window-major"), so that a block of either kind needs no other
order than the one before it. There is no class token.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from detr_exp.model.backbone.weights import load_pretrained
from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.model.layer.position import resample_position
from detr_exp.model.layer.vit_block import Block
from detr_exp.model.layer.windows import attended, merge_windows, refuse_uneven, split_windows

PATCH = 16
GRID = (14, 14)  # patches of the images of 224 pixels with which the positions were trained
LAYER_SCALE = 0.1  # at first
PUBLISHED = {192: "caev2_tiny", 384: "caev2_small", 768: "caev2_base"}


class WindowedViT(nn.Module):
    """Maps of one resolution from several blocks of a windowed transformer.

    Args:
        width: C.
        num_heads: attention heads.
        depth: number of blocks.
        windowed: blocks, from 0, that attend within windows; the others attend to the whole image.
        taps: blocks, from 0, whose outputs are the maps; ascending.
        num_windows: windows a side.
        drop_path: largest probability of leaving out a residual branch, reached by the last block.
        freeze: do not train the weights.
        pretrained: true downloads the published weights of this width, or a file with them, hf:owner/name or a URL.

    Attributes:
        out_channels, out_strides, stride, pixel_mean, pixel_std, initial: as in other backbones.

    Raises:
        ValueError: a block that does not exist, or weights that do not fit.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        depth: int,
        windowed: list[int],
        taps: list[int],
        num_windows: int,
        drop_path: float,
        freeze: bool,
        pretrained: bool | str,
    ) -> None:
        super().__init__()
        for name, chosen in (("windowed", windowed), ("taps", taps)):
            if list(chosen) != sorted({*chosen} & {*range(depth)}) or (name == "taps" and not chosen):
                raise ValueError(
                    f"model.backbone.{name} is {list(chosen)}; name blocks of 0 to {depth - 1}, ascending: "
                    f"model.backbone.{name}=[{depth - 1}]"
                )
        if width % num_heads:
            raise ValueError(
                f"model.backbone.width is {width}, which {num_heads} heads cannot share; use "
                f"model.backbone.num_heads={max(1, width // 64)}"
            )
        self.windowed, self.taps, self.num_windows = list(windowed), list(taps), num_windows
        self.stride = PATCH * num_windows
        self.out_channels, self.out_strides = [width] * len(taps), [PATCH] * len(taps)
        self.pixel_mean, self.pixel_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        self.gradient_checkpointing = False
        self.grid = GRID
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        # the first one was that of a class token, and is not used
        self.position = nn.Parameter(torch.empty(1, 1 + GRID[0] * GRID[1], width))
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                num_heads=num_heads,
                drop_path=drop_path * index / max(1, depth - 1),
                key_bias=False,
                scale=LAYER_SCALE,
            )
            for index in range(depth)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02)
        of_file = partial(to_our_names, depth=depth)
        self.initial = load_pretrained(self, pretrained, PUBLISHED.get(width, ""), of_file) if pretrained else None
        self.requires_grad_(not freeze)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.gradient_checkpointing = enabled

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images `[B, 3, H, W]` -> one map `[B, C, H / P, W / P]` for each of `taps`."""
        return self._maps(images, None)

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]:
        """As `forward`; no patch of the image attends to patches outside of it.

        Args:
            padding_mask: `[B, H, W]` bool, True where there is no image; a patch is outside if all of it is.
        """
        return self._maps(images, padding_mask[:, ::PATCH, ::PATCH])

    def fit_positions(self, image_size: tuple[int, int]) -> None:
        """See `layer.position.fit_positions`."""
        grid = (image_size[0] // PATCH, image_size[1] // PATCH)
        rows = self._positions(grid).detach().flatten(2).transpose(1, 2)
        self.position = nn.Parameter(torch.cat([self.position[:, :1].detach(), rows], dim=1))
        self.grid = grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """`[1, C, h, w]`."""
        return resample_position(self.position[:, 1:].transpose(1, 2).unflatten(2, self.grid), grid, antialias=False)

    def _maps(self, images: Tensor, padded: Tensor | None) -> list[Tensor]:
        refuse_uneven(images.shape[-2:], PATCH, self.num_windows)
        patches = self.patches(images)
        grid = patches.shape[-2:]
        tokens = split_windows((patches + self._positions((grid[0], grid[1]))).permute(0, 2, 3, 1), self.num_windows)
        within, across = (None, None) if padded is None else attended(padded, self.num_windows, with_class=False)
        maps = []
        for index, block in enumerate(self.blocks[: self.taps[-1] + 1]):
            joined, allowed = (1, within) if index in self.windowed else (self.num_windows**2, across)
            again = self.gradient_checkpointing and self.training
            tokens = checkpointed(block, tokens, joined, allowed) if again else block(tokens, joined, allowed)
            if index in self.taps:
                maps.append(merge_windows(tokens, self.num_windows, grid).permute(0, 3, 1, 2))
        return maps


def to_our_names(name: str, depth: int) -> str:
    """The name of a parameter in the files of LW-DETR's authors -> ours; those of further blocks are left out."""
    name = name.replace("encoder.", "").replace("patch_embed.proj.", "patches.").replace("pos_embed", "position")
    if name.startswith("blocks.") and int(name.split(".")[1]) >= depth:
        return f"left_out_{name}"
    name = name.replace(".attn.proj.", ".out.").replace(".gamma_", ".scale")
    return name.replace(".attn.", ".").replace(".mlp.", ".")
