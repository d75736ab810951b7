"""A plain vision transformer with rotary positions: the small ViTs of DEIMv2 and EdgeCrafter, which timm lacks.

Legend: B images, C channels, h and w cells of 16 pixels, N = h w + 1 tokens, d channels of a head.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from detr_exp.model.backbone.weights import load_pretrained
from detr_exp.model.layer.attention import attend
from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.model.layer.conv import ConvNorm
from detr_exp.model.layer.windows import visible
from detr_exp.ops.products import activated

PATCH = 16
STEMS = ("patches", "convolutions")
BASE = 100.0  # of the periods of positions
EPS = 1e-6


def rotations(height: int, width: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines `[h w, d]` of cells, whose centres are in -1..1 along each axis."""
    centres = [((2 * torch.arange(n, device=like.device) + 1) / n - 1).to(like.dtype) for n in (height, width)]
    periods = BASE ** (torch.arange(dim // 4, device=like.device) * (4 / dim)).to(like.dtype)
    cells = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
    angles = (2 * math.pi * cells[..., None] / periods).flatten(1).repeat(1, 2)
    return angles.sin(), angles.cos()


def rotated(heads: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn `[B, heads, N, d]` by positions `[h w, d]`; the first token has none."""
    first, cells = heads[:, :, :1], heads[:, :, 1:]
    front, back = cells.chunk(2, dim=-1)
    return torch.cat([first, cells * cos + torch.cat([-back, front], dim=-1) * sin], dim=2)


class Block(nn.Module):
    """Attention and a perceptron `ratio` times as wide, each after a norm."""

    def __init__(self, width: int, num_heads: int, ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, ratio * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, tokens: Tensor, sin: Tensor, cos: Tensor, allowed: Tensor | None = None) -> Tensor:
        """`[B, N, C]` -> the same; `allowed` `[B, 1, 1, N]` bool are the tokens to attend to, None all."""
        heads = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (rotated(part, sin, cos).to(part.dtype) for part in (heads[0], heads[1]))
        mixed = attend(query, key, heads[2], allowed, 0.0, like=self.proj)
        tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
        return tokens + self.fc2(activated(self.fc1, self.act, self.norm2(tokens)))


class RopeViT(nn.Module):
    """A vision transformer without layer scales and without a last norm.

    Args:
        width: C.
        num_heads: of each block.
        depth: number of blocks.
        taps: blocks, from 0, whose outputs are the maps; ascending.
        pretrained: a file with its weights, hf:owner/name or a URL; false: random ones. None are known by name.
        stem: what makes tokens of an image, one convolution of its `patches`, or four `convolutions` that halve a map.
        ffn_ratio: channels within the perceptrons, as a multiple of C.

    Attributes:
        width, pixel_mean, pixel_std, initial: as in other backbones.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        depth: int,
        taps: list[int],
        pretrained: bool | str,
        stem: str = "patches",
        ffn_ratio: int = 4,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(
                f"model.backbone.body.stem is {stem!r}; use {' or '.join(STEMS)}: model.backbone.body.stem={STEMS[0]}"
            )
        if width % (4 * num_heads):
            raise ValueError(
                f"model.backbone.body has {width} channels and {num_heads} heads, but each head needs a multiple of 4; "
                f"use model.backbone.body.num_heads={max(1, width // 64)}"
            )
        if list(taps) != sorted({*taps} & {*range(depth)}):
            raise ValueError(
                f"model.backbone.body.taps is {list(taps)}; name blocks of 0 to {depth - 1}, ascending: "
                f"model.backbone.body.taps=[{depth - 1}]"
            )
        self.width, self.taps, self.head_dim = width, list(taps), width // num_heads
        self.pixel_mean, self.pixel_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        self.gradient_checkpointing = False
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        widths = [3] if stem == "patches" else [3, width // 8, width // 4, width // 2]
        self.stem = nn.Sequential(*(ConvNorm(one, two, 3, 2, act="relu") for one, two in pairwise(widths)))
        self.patches = nn.Conv2d(3, width, PATCH, PATCH) if stem == "patches" else nn.Conv2d(widths[-1], width, 3, 2, 1)
        self.blocks = nn.ModuleList(Block(width, num_heads, ffn_ratio) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.initial = load_pretrained(self, pretrained, "", to_our_names) if pretrained else None

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` -> a map `[B, C, h, w]` for each tap."""
        return self._maps(images, None)

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]:
        """As `forward`, with the padding `[B, H, W]`; nothing attends to patches that are all padding."""
        return self._maps(images, visible(padding_mask, PATCH, 1))

    def _maps(self, images: Tensor, allowed: Tensor | None) -> list[Tensor]:
        maps = self.patches(self.stem(images))
        height, width = maps.shape[-2:]
        tokens = torch.cat([self.cls_token.expand(maps.shape[0], -1, -1), maps.flatten(2).transpose(1, 2)], dim=1)
        found = []
        sin, cos = rotations(height, width, self.head_dim, self.cls_token)
        for index, block in enumerate(self.blocks[: self.taps[-1] + 1]):
            again = self.gradient_checkpointing and self.training
            tokens = checkpointed(block, tokens, sin, cos, allowed) if again else block(tokens, sin, cos, allowed)
            if index in self.taps:
                found.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width)))
        return found

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of each block instead of storing them."""
        self.gradient_checkpointing = enabled


def to_our_names(name: str) -> str:
    """The name of a parameter in the files of the authors of DEIMv2 and of EdgeCrafter -> ours."""
    name = name.removeprefix("_model.").removeprefix("backbone.").replace("register_token", "cls_token")
    name = name.replace("patch_embed.convs.", "stem.").replace("patch_embed.proj.", "patches.")
    return name.replace(".attn.", ".").replace(".mlp.", ".")
