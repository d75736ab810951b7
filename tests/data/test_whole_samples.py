"""Whole training samples, pixels and boxes together, have the distribution of torchvision's transforms."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.stats import kstwobign, norm
from torchvision import tv_tensors
from torchvision.transforms import v2

from detr_exp import build
from detr_exp.data.sampler import Key

SIZE, SIDE = (72, 96), 64  # height and width of the photographs; side of the samples
SEED, DRAWS = 0, 240
CHANCE = 1e-3  # of a false alarm, in all tests together
LUMA = np.array([0.299, 0.587, 0.114])
NAMES = ("a.png", "b.png", "c.jpg")
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels

# What is photographed: a scene, and in it cards that tell one part of the distortion from the others.
BOXES: dict[str, Box] = {
    "scene": (2, 2, 94, 70),
    "grey": (6, 5, 34, 33),  # the image's mean grey: only brightness changes it
    "light": (52, 41, 90, 66),  # neutral, off that grey: also contrast does; its grain shows how it was resized
    "hued": (58, 6, 92, 34),  # pale, between two primary colours: also saturation and hue, each in its own way
    "pure": (8, 39, 40, 67),  # a primary colour: clipped, and then contrast and saturation do not commute
}
CAST = ((20, 20, -40), (-10, 20, 50), (50, -40, -20))  # what is added to the channels of the scene
LIGHT = (55, -45, 45)  # what is added to the mean grey, for each image
HUED = ((38, 0, -32), (-32, 38, 0), (0, -32, 38))
PURE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))

# How far two implementations may be apart in a statistic whose name ends so, for rounding alone; else half a level.
TOLERANCE = {
    **dict.fromkeys(("x", "y", "width", "height"), 0.5),  # pixels: ours puts images on whole ones
    **dict.fromkeys(("share", "cosine", "sine"), 0.01),
    **dict.fromkeys(("grain", "brightness", "contrast", "saturation"), 0.01),
    **dict.fromkeys(("across", "down"), 0.1),  # levels from pixel to pixel
    "hue": 0.002,  # of the circle; torchvision turns by whole 255ths
}
Statistics = dict[str, np.ndarray]  # a value for each draw; NaN where it does not show what is measured


class Draw(NamedTuple):
    """One output: `[H, W, 3]` uint8, and the boxes that are left, `[4]` x0, y0, x1, y1 in its pixels by their name."""

    pixels: np.ndarray
    boxes: dict[str, np.ndarray]

    def inside(self, name: str) -> np.ndarray:
        """`[n, 3]`, the pixels in a box without its edge; a NaN where they are few or the box is not there."""
        if name in self.boxes:
            x0, y0 = np.ceil(self.boxes[name][:2] + 1).astype(int)
            x1, y1 = np.floor(self.boxes[name][2:] - 1).astype(int)
            if (x1 - x0) * (y1 - y0) >= 4:
                return self.pixels[y0:y1, x0:x1].reshape(-1, 3)
        return np.full((1, 3), np.nan)


def photograph(number: int) -> Image.Image:
    """Smooth colours of all hues, lighter at one side and warmer at the bottom, with noise, and the cards."""
    rng = np.random.default_rng(number)
    height, width = SIZE
    blots = Image.fromarray(rng.integers(0, 205, (5, 6, 3), np.uint8))
    scene = np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC), float) + CAST[number]
    scene += np.sign(LIGHT[number]) * np.linspace(-130, 130, width)[:, None]
    scene += np.linspace(-1, 1, height)[:, None, None] * np.array([30, 0, -30])
    noise = rng.integers(-10, 11, (height, width, 1)) + rng.integers(-4, 5, (height, width, 3))
    grain = 16 * (np.indices(_cut(noise, "light").shape[:2]).sum(0) % 2) - 8
    mean = 128.0
    for _ in range(9):  # the cards are a part of the mean
        pixels = scene + noise
        for name, card in (("grey", 0), ("light", LIGHT[number]), ("hued", HUED[number])):
            _cut(pixels, name)[:] = mean + np.array(card) + _cut(noise, name) / 4
        _cut(pixels, "light")[:] += grain[..., None]
        _cut(pixels, "pure")[:] = PURE[number]
        pixels = np.clip(np.rint(pixels), 0, 255)
        mean = (pixels @ LUMA).mean()
    return Image.fromarray(pixels.astype(np.uint8))


def _cut(pixels: np.ndarray, name: str) -> np.ndarray:
    x0, y0, x1, y1 = BOXES[name]
    return pixels[y0:y1, x0:x1]


def written(root: Path, images: dict[str, Image.Image], boxes: dict[str, Box]) -> Path:
    """A COCO data set of images that have the same boxes."""
    entries, objects = [], []
    categories = [{"id": i, "name": name} for i, name in enumerate(BOXES)]
    for split in ("train", "valid"):
        (root / split).mkdir()
    for i, (file, image) in enumerate(images.items()):
        image.save(root / "train" / file, quality=95)
        entries.append({"id": i, "file_name": file, "height": SIZE[0], "width": SIZE[1]})
        for name, (x0, y0, x1, y1) in boxes.items():
            placed = {"category_id": list(BOXES).index(name), "bbox": [x0, y0, x1 - x0, y1 - y0]}
            objects.append({"id": len(objects), "image_id": i, **placed})
    for split, there in (("train", True), ("valid", False)):
        document = {"images": entries * there, "annotations": objects * there, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root


def ours(root: Path, seed: int, count: int, *words: str) -> list[list[Draw]]:
    """Draws of every image, as a worker of the loader makes them."""
    usual = ["data=coco", f"data.root={root}", "data/augment=rtdetr", "data.num_workers=0", "data.stop_epoch=null"]
    data = build.data(build.compose([*usual, *words]))
    network = SimpleNamespace(image_size=(SIDE, SIDE), stride=32, tasks=("boxes",))
    samples = data.loader("train", network=network, batch_size=1, seed=seed, training=True).dataset

    def draw(epoch: int, image: int) -> Draw:
        sample = samples[Key(epoch, image, SIDE, SIDE)]
        x, y, w, h = sample.target.boxes.double().numpy().T * SIDE
        boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        return Draw(sample.image.numpy(), _named(sample.target.labels, boxes))

    return [[draw(epoch, image) for epoch in range(count)] for image in range(len(samples))]


def theirs(root: Path, seed: int, count: int) -> list[list[Draw]]:
    """The same by torchvision, as RT-DETR uses it.

    Each image is distorted by itself. They are cut alike, because to find the cut takes longest; so what depends on
    the cut is compared image by image, where draws are independent.
    """
    distort = v2.RandomPhotometricDistort(p=0.5)
    move = v2.Compose(
        [
            v2.RandomZoomOut(fill=0),
            v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.RandomHorizontalFlip(),
            v2.Resize((SIDE, SIDE)),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )
    images = [Image.open(root / "train" / name).convert("RGB") for name in NAMES]
    draws: list[list[Draw]] = [[] for _ in images]
    torch.manual_seed(seed)
    for _ in range(count):
        boxes = tv_tensors.BoundingBoxes(list(BOXES.values()), format="XYXY", canvas_size=SIZE, dtype=torch.float32)
        distorted = [distort(image) for image in images]
        sample = move({"images": distorted, "boxes": boxes, "labels": torch.arange(len(BOXES))})
        named = _named(sample["labels"], sample["boxes"].double().numpy())
        for of_image, image in zip(draws, sample["images"]):
            of_image.append(Draw(np.asarray(image), named))
    return draws


def _named(labels: torch.Tensor, boxes: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip([list(BOXES)[label] for label in labels.tolist()], boxes))


def statistics(draws: list[list[Draw]]) -> dict[str, Statistics]:
    """Of each image, and of all images those that do not depend on it or on the cut."""
    cards = [of_cards(of_image, i) for i, of_image in enumerate(draws)]
    found = {name: {**of_pixels(one), **of_boxes(one)} for name, one in zip(NAMES, draws)}
    for card, one in zip(cards, found.values()):
        card["canvas"] = one.pop("canvas")
    return {**found, "all": {name: np.concatenate([card[name] for card in cards]) for name in cards[0]}}


def of_pixels(draws: list[Draw]) -> Statistics:
    """How much is canvas, and what the scene looks like, without its edge."""
    planes = np.stack([draw.pixels for draw in draws]).transpose(3, 0, 1, 2).astype(np.float32, order="C")
    x0, y0, x1, y1 = np.stack([draw.boxes.get("scene", np.zeros(4)) for draw in draws], 1)[..., None]
    at = np.arange(SIDE)
    columns, rows = (at >= x0 + 1) & (at <= x1 - 2), (at >= y0 + 1) & (at <= y1 - 2)
    shown = rows[:, :, None] & columns[:, None, :]

    def mean(values: np.ndarray, where: np.ndarray = shown) -> np.ndarray:
        weights = where.astype(np.float32)
        count = weights.sum((1, 2))
        return np.einsum("nhw,nhw->n", values, weights) / np.where(count < 40, np.float32(np.nan), count)

    red, green, blue = planes
    top, bottom = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma, grey = top - bottom, (red + green + blue) / 3
    high, low = top >= 254, bottom <= 1
    far = (at < x0 - 6) | (at > x1 + 5), (at < y0 - 6) | (at > y1 + 5)  # surely canvas, if the scene is there
    canvas = (far[1][:, :, None] | far[0][:, None, :]) & shown.any((1, 2))[:, None, None]
    found = {"canvas": mean(top, canvas)}
    found |= {"black share": (top < 8).mean((1, 2)), "scene's area, share": shown.mean((1, 2)), "chroma": mean(chroma)}
    for name, plane in zip(("red", "green", "blue"), planes):
        found[f"mean {name}"] = middle = mean(plane)
        found[f"deviation of {name}"] = np.sqrt(mean((plane - middle[:, None, None]) ** 2))
    found["hue's cosine"] = mean(red - (green + blue) / 2) / found["chroma"]
    found["hue's sine"] = mean((green - blue) * np.float32(np.sqrt(0.75))) / found["chroma"]
    for name, where in (("high", high & ~low), ("low", low & ~high), ("high and low", high & low)):
        found[f"clipped {name} share"] = mean(where)
    for name, axis in (("across", 2), ("down", 1)):
        both = np.take(shown, range(1, SIDE), axis) & np.take(shown, range(SIDE - 1), axis)
        step = np.diff(grey, axis=axis)
        found[f"sharpness {name}"] = mean(np.abs(step), both)
        found[f"slope {name}"] = mean(step, both)
    return found


def of_boxes(draws: list[Draw]) -> Statistics:
    """Which boxes are left, where they are, and the mean colours in them."""
    found: Statistics = {}
    absent = np.full(4, np.nan)
    for name in BOXES:
        x0, y0, x1, y1 = np.stack([draw.boxes.get(name, absent) for draw in draws], 1)
        found[f"{name}'s share"] = 1.0 - np.isnan(x0)
        found |= {f"{name}'s x": (x0 + x1) / 2, f"{name}'s y": (y0 + y1) / 2}
        found |= {f"{name}'s width": x1 - x0, f"{name}'s height": y1 - y0}
        colours = np.stack([draw.inside(name).mean(0) for draw in draws], 1)
        found |= {f"{name}'s {channel}": plane for channel, plane in zip(("red", "green", "blue"), colours)}
    return found


@np.errstate(invalid="ignore", divide="ignore")  # cards without colour
def of_cards(draws: list[Draw], number: int) -> Statistics:
    """The sampled distortion, measured on the cards: how often each part changes colours, and by how much."""
    original = Draw(np.asarray(photograph(number)), {name: np.array(box, float) for name, box in BOXES.items()})
    cards = ("grey", "light", "hued", "pure")
    seen = {name: np.stack([draw.inside(name).mean(0) for draw in [original, *draws]]) for name in cards}
    grey, light = seen["grey"].mean(1), seen["light"].mean(1)
    low, middle, high = np.sort(seen["hued"], 1).T
    brightness = grey / grey[0]
    steps = (light - grey) / (light - grey)[0]
    found = {
        "brightness": brightness,
        "contrast": steps / brightness,
        "saturation": (high - low) / (high - low)[0] / steps,
        "hue": ((middle - low) / (high - low) - ((middle - low) / (high - low))[0]) / 6,
    }
    found["grain"] = np.array([draw.inside("light").std(0).mean() for draw in [original, *draws]]) / np.abs(steps)
    # how far from the neutral value, and how often close to it: there ranges and chances show more than in the whole
    changes = []
    for name, most in (("brightness", 0.125), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.05)):
        change = np.abs(found[name] - found[name][0]) / most
        found |= {f"{name} over {limit:.0%}, share": _where(change > limit, change) for limit in (0.07, 0.8, 1.1)}
        changes.append(_where(change > 0.07, change))
    ranks = np.argsort(np.argsort(seen["hued"], 1), 1)
    order = np.argsort(ranks[0])[ranks]  # which channel has become red, which green, which blue
    for other in itertools.permutations(range(3)):
        found[f"order {other}, share"] = _where((order == other).all(1), low)
    changes.append(_where((order != (0, 1, 2)).any(1), low))
    found["changed parts' share"] = np.mean(changes, 0)
    drawn = brightness, found["contrast"], found["saturation"]
    measured = np.stack([seen["pure"].min(1), seen["pure"].max(1)])
    early, late = (np.abs(_pure(number, grey[0], *drawn, first) - measured).max(0) for first in (True, False))
    found["contrast first, share"] = _where(early < late, np.where(np.abs(early - late) > 8, early, np.nan))
    found |= {"lowest of pure": measured[0], "highest of pure": measured[1]}
    return {name: values[1:] for name, values in found.items()}


def _where(condition: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(known), np.nan, condition)


def _pure(
    number: int, grey: float, brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, first: bool
) -> np.ndarray:
    """`[2, n]`, lowest and highest channel of the card `pure` when the contrast is changed first, or last."""
    share = LUMA @ PURE[number] / 255
    channels = np.stack([0 * brightness, np.minimum(255 * brightness, 255)])
    for contrasted in (first, not first):
        if contrasted:
            middle, factor = grey * brightness, contrast
        else:
            middle, factor = channels[0] + share * (channels[1] - channels[0]), saturation
        channels = np.clip(middle + factor * (channels - middle), 0, 255)
    return channels


def excess(a: np.ndarray, b: np.ndarray, tolerance: float, chance: float) -> dict[str, float]:
    """How far two samples are apart in each of three tests, in multiples of what happens by `chance`."""
    limit = norm.isf(chance / 2)

    def means(a: np.ndarray, b: np.ndarray) -> float:
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        return float(max(np.abs(a.mean() - b.mean()) - tolerance, 0) / (limit * error + 1e-9))

    def below(a: np.ndarray, b: np.ndarray) -> float:
        """By how much the distribution function of `a` is above that of `b`, `tolerance` to the right, at most."""
        a, b = np.sort(a), np.sort(b)
        shares = np.searchsorted(a, a, "right") / len(a) - np.searchsorted(b, a + tolerance, "right") / len(b)
        return float(shares.max())

    middle = np.median(np.concatenate([a, b]))
    critical = kstwobign.isf(chance) * np.sqrt(1 / len(a) + 1 / len(b))
    return {
        "mean": means(a, b),
        "spread": means(np.abs(a - middle), np.abs(b - middle)),
        "Kolmogorov-Smirnov": max(below(a, b), below(b, a)) / critical,
    }


def furthest(a: dict[str, Statistics], b: dict[str, Statistics]) -> list[tuple[float, str]]:
    """What differs most, in multiples of what may be; first the largest."""
    pairs = [(of, name) for of, found in a.items() for name in found]
    chance = CHANCE / (3 * len(pairs))
    apart = []
    for of, name in pairs:
        x, y = (values[~np.isnan(values)] for values in (a[of][name], b[of][name]))
        if min(len(x), len(y)) < 20:  # too few for the tests
            text = f"{name} of {of}: {len(x)} draws show it, {len(y)} of torchvision's"
            apart.append((max(len(x), len(y)) / 40, text))
            continue
        tolerance = TOLERANCE.get(name.split()[-1], 0.5)
        text = f"{name} of {of}: {x.mean():.4g} +- {x.std():.3g}, torchvision's {y.mean():.4g} +- {y.std():.3g}"
        apart += [(value, f"{text} ({test})") for test, value in excess(x, y, tolerance, chance).items()]
    return sorted(apart, reverse=True)


def test_they_are_distributed_as_torchvisions(tmp_path: Path):
    """Colours, sharpness, clipping, canvas, boxes, and colours in boxes: no statistic tells the two apart."""
    root = written(tmp_path, {name: photograph(i) for i, name in enumerate(NAMES)}, BOXES)
    found = furthest(statistics(ours(root, SEED, DRAWS)), statistics(theirs(root, SEED, DRAWS)))
    wrong = [f"{value:.3g} times the critical value: {text}" for value, text in found if value > 1]
    assert not wrong, f"seed {SEED}:\n" + "\n".join(wrong)


def test_contrast_is_changed_about_the_mean_of_the_whole_image(tmp_path: Path):
    """In an image without colours only brightness changes its mean grey, however little of the image is seen."""
    height, width = SIZE
    pixels = np.full((height, width, 3), 20.0)
    pixels[:, width // 2 :] = 220
    card = (54, 16, 90, 56)
    for _ in range(9):  # the card is a part of the mean
        grey = pixels[card[1] : card[3], card[0] : card[2]] = pixels.mean()
    root = written(tmp_path, {"a.png": Image.fromarray(np.rint(pixels).astype(np.uint8))}, {"grey": card})
    words = ("photometric=1", "zoom_out=0", "iou_crop=1")
    (draws,) = ours(root, SEED, 80, *(f"data.augment.{word}" for word in words))
    brightness = np.array([draw.inside("grey").mean() for draw in draws]) / grey
    assert ((brightness > 0.86) & (brightness < 1.14)).all(), f"seed {SEED}: {brightness.min()} to {brightness.max()}"
    assert brightness.max() - brightness.min() > 0.22
