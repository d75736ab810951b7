"""From JPEG files to what a network takes, beside torchvision's transforms v2 on PIL images.

python scripts/bench_data.py [--rounds 7] [--dry]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measure import Row, Section, beside, interleaved, run
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from detr_exp import build
from detr_exp.data.sampler import Key

SIDE, IMAGES, OBJECTS, BATCH = 640, 24, 7, 16
LARGEST = (480, 640)
# heights and widths as COCO's photographs have them
MIXED = ((480, 640), (427, 640), (640, 480), (640, 427), (426, 640), (375, 500), (500, 333), (612, 612))
TEXT = f"""
{IMAGES} images with the spectrum of photographs (640 x 480 pixels, about 120 kB as JPEG) and {OBJECTS} objects
each, to {SIDE} x {SIDE} pixels; the file is read and decoded in each. Training: photometric distortion (1/2), zoom-out
(1/2), IoU crop (4/5), flip, resize, and dropping of lost objects. torchvision's end in float32, ours in bytes that are
scaled on the device. That what comes out is alike is tested in `tests/data/test_whole_samples.py`,
`test_augment.py` and `test_colour.py`; the evaluation's pixels equal Pillow's to the bit, which is checked here.

Evaluation resizes with torch where that gives the bits of Pillow, which is where the weights are multiples of a power
of two: 480 to 640 pixels but not 427. The second row has the sizes that COCO's photographs have.
"""


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency as in photographs, in three correlated channels."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width)) ** 1.4
    size = height, width
    noise = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal(size)) * amplitude, s=size) for _ in range(4)]
    planes = np.stack([noise[3] + 0.4 * plane for plane in noise[:3]], -1)
    planes = planes / planes.std() * 55 + 118
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


def folder_of(root: Path, sizes: Iterable[tuple[int, int]]) -> None:
    """A COCO data set of such images."""
    rng = np.random.default_rng(0)
    for name in ("train", "valid"):
        (root / name).mkdir(parents=True)
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes):
        photograph(rng, height, width).save(root / "train" / f"{i}.jpg", quality=94)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
        for _ in range(OBJECTS):
            w, h = (rng.uniform(0.05, 0.5, 2) * (width, height)).tolist()
            x, y = (rng.random(2) * (width - w, height - h)).tolist()
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": [x, y, w, h]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    for name in ("train", "valid"):
        text = json.dumps(content if name == "train" else {**content, "images": [], "annotations": []})
        (root / name / "_annotations.coco.json").write_text(text, encoding="utf-8")


def samples(root: Path, training: bool, *words: str) -> Any:
    """Our samples by key, as a loader's worker makes them."""
    cfg = build.compose(["data=coco", f"data.root={root}", "data/augment=rtdetr", "data.num_workers=0", *words])
    network = SimpleNamespace(image_size=(SIDE, SIDE), stride=32, tasks=("boxes",))
    loader = build.data(cfg).loader("train", network=network, batch_size=1, seed=0, training=training)
    return loader.dataset


def theirs(split: Any, transform: Callable) -> Callable[[int], Any]:
    """The same by torchvision, as its users write it."""

    def sample(i: int) -> Any:
        with Image.open(split.name(i)) as file:
            image = file.convert("RGB")
        objects = split.objects(i)
        size = (image.height, image.width)
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(objects.boxes_xyxy).float(), format="XYXY", canvas_size=size)
        return transform(image, {"boxes": boxes, "labels": torch.from_numpy(objects.categories)})

    return sample


def all_of(sample: Callable[[int], Any], count: int) -> Callable[[], None]:
    def call() -> None:
        for i in range(count):
            sample(i)

    return call


def training(root: Path, rounds: int) -> list[Row]:
    ours, cached = samples(root, True), samples(root, True, "data.cache=ram")
    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose(
        [
            v2.RandomPhotometricDistort(p=0.5),
            v2.RandomZoomOut(fill=0),
            v2.RandomApply([v2.RandomIoUCrop()], p=0.8),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.RandomHorizontalFlip(),
            v2.Resize((SIDE, SIDE)),
            v2.SanitizeBoundingBoxes(min_size=1),
            *to_float,
        ]
    )
    epoch = iter(range(10**6))

    def each(samples: Any) -> Callable[[], None]:
        def call() -> None:
            now = next(epoch)
            for i in range(IMAGES):
                samples[Key(now, i, SIDE, SIDE)]

        return call

    for warm in range(4):  # scales at which the cache holds an image are met over several epochs
        for i in range(IMAGES):
            cached[Key(10**6 + warm, i, SIDE, SIDE)]
    torch.manual_seed(0)
    peer = all_of(theirs(ours.split, transform), IMAGES)
    times = interleaved({"plain": each(ours), "cached": each(cached), "torchvision v2": peer}, rounds)
    per_image = {name: [seconds / IMAGES for seconds in values] for name, values in times.items()}
    return [
        beside("training pipeline", per_image, "plain", "torchvision v2", gate=0.20),
        beside("training pipeline, data.cache=ram", per_image, "cached", "torchvision v2", gate=0.10),
    ]


def evaluation(root: Path, part: str, gate: float | None, rounds: int) -> Row:
    ours = samples(root, False)
    count = len(ours.split)
    resize = v2.Compose([v2.Resize((SIDE, SIDE)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    peer = theirs(ours.split, resize)
    differ = [i for i in range(count) if not torch.equal(_float(ours[Key(0, i, SIDE, SIDE)].image), peer(i)[0])]
    own = all_of(lambda i: ours[Key(0, i, SIDE, SIDE)], count)
    times = interleaved({"ours": own, "torchvision v2": all_of(peer, count)}, rounds)
    per_image = {name: [seconds / count for seconds in values] for name, values in times.items()}
    fault = f"{len(differ)} images differ" if differ else ""
    return beside(part, per_image, peer="torchvision v2", gate=gate, fault=fault)


def _float(image: torch.Tensor) -> torch.Tensor:
    return v2.functional.to_dtype(image.permute(2, 0, 1), torch.float32, scale=True)


def collate(rounds: int) -> Row:
    pixels = [torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8) for _ in range(BATCH)]
    floats = [_float(image).contiguous() for image in pixels]
    default = torch.utils.data.default_collate
    times = interleaved({"ours": lambda: default(pixels), "float32": lambda: default(floats)}, rounds)
    return beside(f"collate {BATCH} images", times, peer="float32", gate=0.10)


def bench(rounds: int) -> Section:
    with tempfile.TemporaryDirectory() as name:
        plain, mixed = Path(name) / "plain", Path(name) / "mixed"
        folder_of(plain, [LARGEST] * IMAGES)
        folder_of(mixed, MIXED * 3)
        rows = [
            *training(plain, rounds),
            evaluation(plain, "evaluation pipeline, 640 x 480 pixels", 0.55, rounds),
            evaluation(mixed, "evaluation pipeline, sizes as in COCO", None, rounds),
            collate(rounds),
        ]
    return Section("Data", rows, TEXT, packages=("torch", "torchvision", "pillow", "opencv-python-headless"))


if __name__ == "__main__":
    sys.exit(run("data", bench, __doc__))
