"""DINOv2 vision transformer whose blocks mostly attend within windows, the backbone of RF-DETR.

Oquab et al. 2023, "DINOv2", for the transformer; Robinson et al. 2025, "RF-DETR", for windows inside it.

Legend: B images, P patch size, W windows a side, n = W * W windows an image, C width, (h, w) patches a side,
t = 1 + h * w / n tokens a window.

The image is cut into W x W windows that each carry their own copy of the class token. Two numberings meet here, and
the published networks depend on both: a feature map "k" is the state after k blocks, while block i (from zero) attends
across windows if i is one of those same numbers. With `out_blocks=[3, 6, 9, 12]` the blocks 3, 6 and 9 are global, and
every map is taken just before the global block of its number; a block 12 does not exist. Blocks after the last map
would change nothing and are not built.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from detr_exp.model.backbone.weights import WITHOUT, stored
from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.model.layer.position import resample_position
from detr_exp.model.layer.vit_block import Block
from detr_exp.model.layer.windows import attended, merge_windows, refuse_uneven, split_windows
from detr_exp.published.fetch import Found

logger = logging.getLogger(__name__)

DEPTH = 12  # blocks of a DINOv2 of size small or base; stochastic depth grows over all of them
PIXEL_MEAN = [0.485, 0.456, 0.406]
PIXEL_STD = [0.229, 0.224, 0.225]
PUBLISHED = {384: "dinov2_small", 768: "dinov2_base"}
TIMM_NAMES = {384: "vit_small_patch14_dinov2.lvd142m", 768: "vit_base_patch14_dinov2.lvd142m"}


class WindowedDinov2(nn.Module):
    """Maps of one resolution from several depths of a windowed DINOv2.

    Args:
        image_size: (height, width) the position embedding is made for; for other sizes it is interpolated.
        width: channels; 384 is DINOv2-small, 768 DINOv2-base.
        num_heads: attention heads.
        patch_size: pixels a patch side.
        num_windows: windows a side; 1 makes every block global.
        out_blocks: depths whose states are returned, ascending (see above).
        position_grid: patches a side of the position embedding; null: those of `image_size`.
        drop_path: largest probability of leaving out a residual branch, reached by the last of 12 blocks.
        freeze: do not train the weights.
        pretrained: start from DINOv2 weights, resampled to this patch size and grid: true downloads them (timm), a path
            names a file with them.

    Raises:
        ValueError: if a side of `image_size` is not a multiple of patch_size x num_windows, or another value does not
            fit.
    """

    def __init__(
        self,
        *,
        image_size: list[int],
        width: int,
        num_heads: int,
        patch_size: int,
        num_windows: int,
        out_blocks: list[int],
        position_grid: int | None = None,
        drop_path: float = 0.0,
        freeze: bool = False,
        pretrained: bool | str = False,
    ) -> None:
        super().__init__()
        self.stride = patch_size * num_windows
        self.pixel_mean, self.pixel_std = PIXEL_MEAN, PIXEL_STD
        self.patch_size = patch_size
        self.num_windows = num_windows
        refuse_uneven(image_size, patch_size, num_windows)
        _check_depths(out_blocks)
        if not 0 <= drop_path < 1:
            raise ValueError(f"model.backbone.drop_path is {drop_path}; it is a probability in [0, 1), 0 turns it off")
        self.out_blocks = list(out_blocks)
        self.out_channels = [width] * len(out_blocks)
        self.out_strides = [patch_size] * len(out_blocks)
        self.gradient_checkpointing = False
        grid = (position_grid,) * 2 if position_grid else (image_size[0] // patch_size, image_size[1] // patch_size)
        self.embedding = Embedding(width=width, patch_size=patch_size, grid=grid)
        self.blocks = nn.ModuleList(
            Block(width=width, num_heads=num_heads, drop_path=drop_path * index / (DEPTH - 1))
            for index in range(out_blocks[-1])
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(_initialise)
        self.register_load_state_dict_pre_hook(_resample_stored_position)
        self.initial = self._load_dinov2(width, pretrained) if pretrained else None
        self.requires_grad_(not freeze)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.gradient_checkpointing = enabled

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images `[B, 3, H, W]` -> one map `[B, C, H / P, W / P]` for each of `out_blocks`."""
        return self._maps(images, None)

    def forward_padded(self, images: Tensor, padding_mask: Tensor) -> list[Tensor]:
        """As `forward`; no token attends to patches outside of the image.

        Args:
            padding_mask: `[B, H, W]` bool, True where there is no image; a patch is outside if all of it is.
        """
        return self._maps(images, padding_mask[:, :: self.patch_size, :: self.patch_size])

    def _maps(self, images: Tensor, padded: Tensor | None) -> list[Tensor]:
        refuse_uneven(images.shape[-2:], self.patch_size, self.num_windows)
        patches, class_token = self.embedding(images)
        tokens = split_windows(patches, self.num_windows)
        tokens = torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        within, across = (None, None) if padded is None else attended(padded, self.num_windows)
        maps = []
        for index, block in enumerate(self.blocks):
            joined, allowed = (self.num_windows**2, across) if index in self.out_blocks else (1, within)
            again = self.gradient_checkpointing and self.training
            tokens = checkpointed(block, tokens, joined, allowed) if again else block(tokens, joined, allowed)
            if index + 1 in self.out_blocks:
                merged = merge_windows(self.norm(tokens)[:, 1:], self.num_windows, patches.shape[1:3])
                maps.append(merged.permute(0, 3, 1, 2))
        return maps

    def fit_positions(self, image_size: tuple[int, int]) -> None:
        """See `layer.position.fit_positions`."""
        grid = (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
        self.embedding.position = nn.Parameter(resample_position(self.embedding.position.detach(), grid))

    def _load_dinov2(self, width: int, pretrained: bool | str) -> Found:
        import timm

        if width not in TIMM_NAMES:
            raise ValueError(
                f"model.backbone.width is {width}, but DINOv2 weights exist for {sorted(TIMM_NAMES)}; "
                "use model.backbone.pretrained=false"
            )
        name = TIMM_NAMES[width]
        rows, columns = self.embedding.grid
        found, _ = stored(pretrained, PUBLISHED[width])  # checks that it is complete and safe; timm reads it again
        path = found.path
        try:
            source = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg_overlay={"file": str(path)},
                num_classes=0,
                patch_size=self.patch_size,
                img_size=(rows * self.patch_size, columns * self.patch_size),
            )
        except Exception as error:  # every way a foreign file can fail is another exception
            raise ValueError(
                f"{path} holds no weights of {name} ({' '.join(str(error).split())[:200]}); name another file, "
                f"model.backbone.pretrained=<file>, {WITHOUT}"
            ) from error
        self.load_state_dict(from_timm(source.state_dict(), self))
        logger.info(
            "backbone: %s starts from DINOv2 weights (%s from %s, for patches of %d pixels on a grid of %dx%d)",
            *(type(self).__name__, name, path, self.patch_size, rows, columns),
        )
        return found


class Embedding(nn.Module):
    """Patches to tokens, with their positions.

    Args:
        width: channels.
        patch_size: pixels a patch side.
        grid: (rows, columns) of the position embedding.
    """

    def __init__(self, *, width: int, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.class_position = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, width, *grid))

    @property
    def grid(self) -> tuple[int, int]:
        return self.position.shape[-2], self.position.shape[-1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, 3, H, W]` -> patch tokens `[B, h, w, C]` and the class token `[1, 1, C]`."""
        patches = self.patches(images)
        position = resample_position(self.position, patches.shape[-2:])
        return (patches + position).permute(0, 2, 3, 1), self.class_token + self.class_position


def from_timm(state: dict[str, Tensor], backbone: WindowedDinov2) -> dict[str, Tensor]:
    """The state dict of a timm DINOv2 of the same patch size and grid, in our names."""
    rows, columns = backbone.embedding.grid
    position = state["pos_embed"]
    renamed = {
        "embedding.patches.weight": state["patch_embed.proj.weight"],
        "embedding.patches.bias": state["patch_embed.proj.bias"],
        "embedding.class_token": state["cls_token"],
        "embedding.class_position": position[:, :1],
        "embedding.position": position[:, 1:].transpose(1, 2).unflatten(-1, (rows, columns)),
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    names = {
        **{f"{name}.{kind}": f"{name}.{kind}" for name in ("norm1", "norm2") for kind in ("weight", "bias")},
        **{f"qkv.{kind}": f"attn.qkv.{kind}" for kind in ("weight", "bias")},
        **{f"out.{kind}": f"attn.proj.{kind}" for kind in ("weight", "bias")},
        **{f"{name}.{kind}": f"mlp.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")},
        **{f"scale{i}": f"ls{i}.gamma" for i in (1, 2)},
    }
    for index in range(len(backbone.blocks)):
        renamed |= {f"blocks.{index}.{ours}": state[f"blocks.{index}.{theirs}"] for ours, theirs in names.items()}
    return renamed


def _check_depths(out_blocks: list[int]) -> None:
    if not out_blocks or list(out_blocks) != sorted(set(out_blocks)) or out_blocks[0] < 1 or out_blocks[-1] > DEPTH:
        raise ValueError(
            f"model.backbone.out_blocks is {list(out_blocks)}; it needs ascending depths in 1..{DEPTH}, "
            "such as model.backbone.out_blocks=[3,6,9,12]"
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Embedding):
        for parameter in (module.class_token, module.class_position, module.position):
            nn.init.trunc_normal_(parameter, std=0.02)


def _resample_stored_position(backbone: WindowedDinov2, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let weights of another image size load: their position embedding is resampled once."""
    name = f"{prefix}embedding.position"
    if name in state:
        state[name] = resample_position(state[name], backbone.embedding.grid)
