"""Everything that can be an image in Python, as pixels."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detr_exp.data.image import FIRST_FRAME, has_more_frames, pixels_of, read_image
from detr_exp.data.pixels import pixels_of_array

log = logging.getLogger(__name__)
ImageLike = Image.Image | np.ndarray | torch.Tensor | str | Path | bytes


def as_image(source: ImageLike, channels: int = 3) -> np.ndarray:
    """`[H, W, channels]` uint8 (RGB), upright: the same for a file, its content, and an image opened from it.

    Raises:
        ValueError: it cannot be read, or is no image.
    """
    if isinstance(source, str | Path):
        source = Path(source).expanduser()
    if isinstance(source, Path | bytes | Image.Image):
        if isinstance(source, Image.Image):
            pixels = pixels_of(source, channels)
        else:
            pixels = read_image(source, channels=channels)
        if has_more_frames(source, channels):
            log.warning("%s: %s", source if isinstance(source, Path) else "an image in memory", FIRST_FRAME)
        return pixels
    if isinstance(source, np.ndarray):
        return pixels_of_array(source, channels)
    if not isinstance(source, torch.Tensor):
        raise ValueError(
            f"a {type(source).__name__} is no image; give a path, the content of a file as bytes, a PIL image, an "
            "array or a tensor"
        )
    if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[0] not in (1, 3, 4, channels)):
        raise ValueError(
            f"a tensor {list(source.shape)} of {source.dtype} is no image; give [{channels}, H, W], uint8 or float in "
            "0..1"
        )
    values = source.detach().cpu()
    values = values.float() if values.is_floating_point() else values
    return pixels_of_array((values.permute(1, 2, 0) if values.ndim == 3 else values).numpy(), channels)
