"""A network of several image sizes, of which the shape of an image chooses one: batches, runs, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from detr_exp import build
from detr_exp.config.ranges import refuse_out_of_range
from detr_exp.data.augment import Augment
from detr_exp.data.coco import coco
from detr_exp.data.dataset import DataSet
from detr_exp.data.fit import sizes_of
from detr_exp.deploy.export import in_float32
from detr_exp.inference.detector import load
from detr_exp.training import train_in

SHAPES = [(40, 60), (60, 40), (50, 50), (48, 60), (30, 120), (120, 30)] * 3
SIZES = [(64, 96), (96, 64), (64, 64)]
WORDS = "model.image_size=[[64,96],[96,64],[64,64]]"


class Network:
    image_size, stride, tasks, pixel_mean, buckets = SIZES[0], 32, ("boxes",), torch.zeros(3, 1, 1), tuple(SIZES)


def nearest(size: tuple[int, int]) -> tuple[int, int]:
    return min(SIZES, key=lambda one: abs(np.log(one[0] / one[1] * size[1] / size[0])))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    images, annotations = [], []
    for i, (height, width) in enumerate(SHAPES):
        pixels = np.full((height, width, 3), 20, np.uint8)
        pixels[height // 4 : height // 2, width // 4 : width // 2] = 200
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        box = [width // 4, height // 4, width // 2 - width // 4, height // 2 - height // 4]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "a.json").write_text(json.dumps(content))
    return root


def opened(root: Path, **settings: object) -> DataSet:
    part = {"annotations": "a.json", "images": "."}
    settings = {"augment": Augment(flip=0.5), "num_workers": 0, **settings}
    return DataSet(source=coco, root=str(root), train=part, val=part, **settings)


def shown(loader: object) -> list[tuple[tuple[int, ...], list[int], torch.Tensor]]:
    return [(tuple(batch.images.shape[1:3]), list(batch.image_ids), batch.images) for batch in loader]


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize("training", [True, False])
def test_an_image_is_shown_in_the_nearest_size_and_a_batch_has_one(mixed: Path, fit: str, training: bool) -> None:
    loader = opened(mixed, fit=fit).loader("train", network=Network, batch_size=2, seed=0, training=training)
    batches = list(loader)
    assert sorted(i for batch in batches for i in batch.image_ids) == list(range(len(SHAPES)))
    rest = 0
    for batch in batches:
        size = tuple(batch.images.shape[1:3])
        suits = [nearest(SHAPES[i]) == size for i in batch.image_ids]
        rest += not all(suits)
        assert all(suits) or (training and size == SIZES[0]), "what fills no batch of its size"
        assert (batch.padding_mask is not None) == (fit == "letterbox")
        for image, box in zip(batch.images, batch.targets.boxes):
            bright = (image[..., 0] > 110).nonzero().float()
            cx, cy, w, h = (box * torch.tensor([size[1], size[0], size[1], size[0]])).tolist()
            found = torch.cat([bright.min(0).values, bright.max(0).values + 1])
            expected = torch.tensor([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2])
            torch.testing.assert_close(found, expected, atol=2.5, rtol=0)
    assert rest < len(SIZES)


def test_batches_depend_on_the_seed_and_neither_on_workers_nor_ranks_nor_on_where_they_began(mixed: Path) -> None:
    def batches(start: int = 0, seed: int = 0, workers: int = 0, **words: int) -> list[tuple[object, ...]]:
        data = opened(mixed, num_workers=workers)
        loader = data.loader("train", network=Network, batch_size=2, seed=seed, training=True, **words)
        loader.batch_sampler.set_epoch(1)
        loader.batch_sampler.set_start(start)
        return shown(loader)

    whole = batches()
    assert [one[:2] for one in whole] != [one[:2] for one in batches(seed=1)]
    for other in (batches(start=3), batches(start=3, workers=2)):
        for (size, ids, pixels), (size_now, ids_now, pixels_now) in zip(whole[3:], other, strict=True):
            assert (size, ids) == (size_now, ids_now)
            assert torch.equal(pixels, pixels_now)
    ranks = [batches(rank=rank, world_size=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(SHAPES) // 4
    for mine, others in zip(*ranks):
        assert mine[0] == others[0], "the ranks of a step have one size"
        assert not set(mine[1]) & set(others[1])


def test_what_chooses_sizes_otherwise_is_refused(mixed: Path, tiny_run: list[str]) -> None:
    for words in ({"multi_scale": [64]}, {"tiles": {"size": 32}}):
        key = next(iter(words))
        with pytest.raises(
            ValueError, match=rf"model\.image_size is \[\[64,96\].*data\.{key}=null, or model\.image_size="
        ):
            opened(mixed, **words).loader("val", network=Network, batch_size=2, seed=0)
    with pytest.raises(
        ValueError, match=r"data\.fit is short_side.*data\.fit=letterbox, or model\.image_size=\[64,96\]"
    ):
        opened(mixed, fit="short_side").loader("val", network=Network, batch_size=2, seed=0)
    wrong = (
        r"\[\[64, 96\], \[70, 64\]\], but its sides must be multiples of 32; use model\.image_size=\[\[64,96\],\[64,64"
    )
    few = r"has \[32, 32\], which this network cannot compute: 30 queries.*model\.image_size=\[96,96\]"
    for sizes, said in {"[[64,96],[70,64]]": wrong, "[[96,96],[32,32]]": few}.items():
        with pytest.raises(ValueError, match=said):
            build.network(build.compose([*tiny_run, f"model.image_size={sizes}", "model.num_queries=30"]))
    for sizes, found in {"[[64,96],64]": "64", "[[64,96],[0,64]]": "0", "[[]]": r"\[\]", "[[64,96,3]]": ".*3"}.items():
        with pytest.raises(ValueError, match=rf"model\.image_size is {found}.* \(in .*a list of 2.*several such lists"):
            refuse_out_of_range(build.compose([*tiny_run, f"model.image_size={sizes}"]))


def test_one_size_in_a_list_is_that_size(tiny_run: list[str]) -> None:
    network = build.network(build.compose([*tiny_run, "model.image_size=[[64,96],[64,96]]"]))
    assert network.image_size == (64, 96)
    assert sizes_of(network) == ()


def test_a_run_evaluates_and_predicts_in_the_size_of_each_image(
    mixed: Path, tiny_run: list[str], tmp_path: Path
) -> None:
    part = "{annotations: a.json, images: .}"
    words = [word for word in tiny_run if not word.startswith(("data", "model.image_size"))]
    words += ["data=coco", f"data.root={mixed}", f"data.train={part}", f"data.val={part}", "data.num_workers=0", WORDS]
    train_in(tmp_path / "run", build.compose([*words, "trainer.batch_size=2", "trainer.max_steps=2"]))
    detector = load(tmp_path / "run")
    seen = []
    detector.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    paths = [mixed / f"{i}.png" for i in range(6)]
    together = detector.predict(paths, 0.0)
    assert sorted(seen) == [(1, 3, 64, 64), (2, 3, 96, 64), (3, 3, 64, 96)]
    for path, found in zip(paths, together, strict=True):
        (alone,) = detector.predict(path, 0.0)
        torch.testing.assert_close(found.boxes, alone.boxes, atol=1e-2, rtol=1e-4)
    with pytest.raises(ValueError, match=r"an exported file has one size of images: at\.image_size=\[64,96\]"):
        in_float32(OmegaConf.create(), replace(detector))
    one = load(tmp_path / "run", at={"image_size": [96, 64]})
    assert one.fit.canvas((40, 60), one.network.image_size) == (96, 64)
    assert in_float32(OmegaConf.create(), one).network.image_size == (96, 64)
