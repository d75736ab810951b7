"""Drawings of objects on an image: boxes, labels, masks and skeletons; and sheets of such drawings."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION = 22  # pixels of a line above an image
SHOWN_FROM = 0.5  # lowest confidence of a keypoint that is drawn; annotated ones have visibility 1 or 2


def colour(index: int) -> tuple[int, int, int]:
    """A colour for a class: golden-ratio steps around the hue circle, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + index * 0.618034) % 1.0, 0.8, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def shown(image: np.ndarray) -> np.ndarray:
    """`[H, W, 3]` uint8 of an image `[H, W, C]`: the first three channels, or the first one of fewer, as grey."""
    channels = image.shape[2]
    if channels == 3:
        return image
    return np.ascontiguousarray(image[..., :3] if channels > 3 else image[..., :1].repeat(3, 2))


def draw_objects(
    image: np.ndarray,
    *,
    boxes_xyxy_px: np.ndarray,
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: np.ndarray | None = None,
    keypoints_px: np.ndarray | None = None,
    skeletons: Sequence[Sequence[tuple[int, int]]] = (),
) -> Image.Image:
    """Draw objects on an image.

    Args:
        image: `[H, W, C]` uint8 RGB, or what `shown` makes it of.
        boxes_xyxy_px: `[n, 4]` corners in pixels.
        labels: class index per object.
        names: class names; an index without a name is shown as a number.
        scores: 0..1 per object; None for ground truth.
        masks: `[n, H, W]` bool.
        keypoints_px: `[n, K, 3]` x, y in pixels and a confidence or visibility; points below 0.5 (unlabelled, or
            of low confidence) are left out.
        skeletons: per class the pairs of 0-based keypoint indices that are connected.
    """
    pixels = image = shown(image)
    if masks is not None and len(masks):
        pixels = image.astype(np.float32)
        for mask, label in zip(masks, labels):
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(colour(label), np.float32)
        pixels = pixels.astype(np.uint8)
    drawing = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(drawing)
    scale = max(drawing.size) / 640
    width = max(1, round(2 * scale))
    font = ImageFont.load_default(size=max(9, round(15 * scale)))
    for i, (box, label) in enumerate(zip(np.asarray(boxes_xyxy_px, float).tolist(), labels)):
        x0, y0, x1, y1 = box
        ink = colour(label)
        canvas.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=ink, width=width)
        word = names[label] if label < len(names) else str(label)
        if scores is not None:
            word += f" {scores[i]:.2f}"
        left, top, right, bottom = canvas.textbbox((0, 0), word, font=font)
        y = y0 - (bottom - top) - 4 if y0 > bottom - top + 4 else y0
        canvas.rectangle((x0, y, x0 + right - left + 4, y + bottom - top + 4), fill=ink)
        canvas.text(
            (x0 + 2 - left, y + 2 - top), word, fill=(0, 0, 0) if sum(ink) > 380 else (255, 255, 255), font=font
        )
        if keypoints_px is not None:
            lines = skeletons[label] if label < len(skeletons) else ()
            _draw_keypoints(canvas, keypoints_px[i], lines, ink, width)
    return drawing


def _draw_keypoints(
    canvas: ImageDraw.ImageDraw,
    points: np.ndarray,
    lines: Sequence[tuple[int, int]],
    ink: tuple[int, int, int],
    width: int,
) -> None:
    for a, b in lines:
        if min(points[a, 2], points[b, 2]) >= SHOWN_FROM:
            canvas.line([tuple(points[a, :2]), tuple(points[b, :2])], fill=ink, width=width)
    radius = 1.5 * width
    for x, y, seen in points:
        if seen >= SHOWN_FROM:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255), outline=ink)


def sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    tile: int = 480,
) -> Image.Image:
    """Images side by side on a dark background, each scaled to fit a square of `tile` pixels.

    Args:
        images: of any sizes.
        captions: a text above each image; shortened where it is too long.
    """
    columns = columns or max(1, math.ceil(math.sqrt(len(images))))
    gap, head = 4, 0 if captions is None else CAPTION
    font = ImageFont.load_default(size=CAPTION - 8)
    scaled = []
    for image in images:
        factor = tile / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        scaled.append(image.resize(size, Image.Resampling.LANCZOS))
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    heights = [max(image.height for image in row) + head + gap for row in rows]
    canvas = Image.new("RGB", (columns * (tile + gap) + gap, sum(heights) + gap), (24, 24, 24))
    ink = ImageDraw.Draw(canvas)
    y = gap
    for k, (row, height) in enumerate(zip(rows, heights)):
        for i, image in enumerate(row):
            x = gap + i * (tile + gap)
            if captions is not None:
                text = _shortened(captions[k * columns + i], lambda word: font.getlength(word) <= tile)
                ink.text((x, y), text, font=font, fill=(230, 230, 230))
            canvas.paste(image, (x + (tile - image.width) // 2, y + head))
        y += height
    return canvas


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    """A line of text; the start is left out where it is too long, because names of files differ at their end."""
    text = " ".join(text.split())
    if fits(text):
        return text
    return next((f"...{text[start:]}" for start in range(len(text)) if fits(f"...{text[start:]}")), "")
