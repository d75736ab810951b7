"""Batches of images of like shape: what the network is shown, and a run on landscapes, portraits and squares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp import build
from detr_exp.data.augment import Augment
from detr_exp.data.coco import coco
from detr_exp.data.dataset import DataSet
from detr_exp.inference.detector import load
from detr_exp.training import train_in

SHAPES = [(40, 60), (60, 40), (50, 50), (40, 80), (30, 120)] * 4
BOX = (0.25, 0.3, 0.5, 0.4)  # x, y, width and height of the bright object, of the image


class Canvas:
    image_size, stride, tasks, pixel_mean = (64, 96), 32, ("boxes",), torch.zeros(3, 1, 1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    images, annotations = [], []
    for i, (height, width) in enumerate(SHAPES):
        pixels = np.full((height, width, 3), 20, np.uint8)
        x, y, across, down = (round(part * side) for part, side in zip(BOX, (width, height, width, height)))
        pixels[y : y + down, x : x + across] = 200
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, across, down]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "a.json").write_text(json.dumps(content))
    return root


def opened(root: Path, **settings: object) -> DataSet:
    part = {"annotations": "a.json", "images": "."}
    settings = {"augment": Augment(), "fit": "short_side", **settings}
    return DataSet(source=coco, root=str(root), train=part, val=part, num_workers=0, **settings)


@pytest.mark.parametrize("training", [True, False])
def test_what_the_network_is_shown(mixed: Path, training: bool) -> None:
    augment = Augment(flip=0.5, vertical_flip=0.5)
    loader = opened(mixed, augment=augment).loader("train", network=Canvas, batch_size=2, seed=0, training=training)
    batches = list(loader)
    assert sorted(i for batch in batches for i in batch.image_ids) == list(range(len(SHAPES)))
    shapes = {tuple(batch.images.shape[1:3]) for batch in batches}
    assert {(64, 96), (96, 64), (64, 64)} <= shapes <= {(64, 96), (96, 64), (64, 64)}
    for batch in batches:
        height, width = batch.images.shape[1:3]
        for image, mask, box, size in zip(batch.images, batch.padding_mask, batch.targets.boxes, batch.image_sizes):
            down, across = (int(n) for n in ((~mask).any(1).sum(), (~mask).any(0).sum()))
            assert across / down == pytest.approx(float(size[1] / size[0]), rel=0.04), "proportions are kept"
            assert max(down / height, across / width) == 1
            bright = (image[..., 0] > 110).nonzero().float()
            low, high = bright.min(0).values, bright.max(0).values + 1
            cx, cy, w, h = (box * torch.tensor([width, height, width, height])).tolist()
            found = torch.tensor([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2])
            torch.testing.assert_close(torch.cat([low, high]), found, atol=1.2, rtol=0)
            assert not image[mask].any()


def test_what_chooses_sizes_otherwise_is_refused(mixed: Path) -> None:
    for words in ({"multi_scale": [64]}, {"tiles": {"size": 32}}):
        key = next(iter(words))
        with pytest.raises(ValueError, match=rf"data\.fit is short_side.*data\.{key}=null"):
            opened(mixed, **words)

    class Square(Canvas):
        image_size = (64, 64)

    with pytest.raises(ValueError, match=r"model\.image_size is \[64, 64\], which leaves one shape"):
        opened(mixed).loader("val", network=Square, batch_size=2, seed=0)


def test_a_run_evaluates_and_predicts_in_the_shape_of_each_image(
    mixed: Path, tiny_run: list[str], tmp_path: Path
) -> None:
    part = "{annotations: a.json, images: .}"
    words = [word for word in tiny_run if not word.startswith(("data", "model.image_size"))]
    words += ["data=coco", f"data.root={mixed}", f"data.train={part}", f"data.val={part}", "data.fit=short_side"]
    words += ["data.num_workers=0", "trainer.batch_size=2", "trainer.max_steps=2", "model.image_size=[64,96]"]
    train_in(tmp_path / "run", build.compose(words))
    detector = load(tmp_path / "run")
    seen = []
    detector.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    paths = [mixed / f"{i}.png" for i in range(5)]
    together = detector.predict(paths, 0.0)
    assert sorted(seen) == [(1, 3, 64, 64), (1, 3, 96, 64), (3, 3, 64, 96)]
    for path, found in zip(paths, together, strict=True):
        (alone,) = detector.predict(path, 0.0)
        torch.testing.assert_close(found.boxes, alone.boxes, atol=1e-2, rtol=1e-4)
        assert float(found.boxes.max()) > 10, "in pixels of the image"
