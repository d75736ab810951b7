"""A data set as the rest of the project uses it: splits, loaders, exact repetition."""

from __future__ import annotations

import functools
import logging
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp.data.augment import Augment
from detr_exp.data.dataset import DataSet
from detr_exp.data.shapes import shapes
from detr_exp.protocols import TASKS
from detr_exp.structures import Batch

from .conftest import data_set, document

STRONG = {"photometric": 0.5, "zoom_out": 0.5, "iou_crop": 0.8, "flip": 0.5}


def drawn(**settings) -> DataSet:
    source = functools.partial(shapes, size=64, seed=0)
    usual = {"train": 20, "val": 7, "test": 0, "augment": Augment(**STRONG), "num_workers": 0}
    return DataSet(source=source, **{**usual, **settings})


def same(a: Batch, b: Batch) -> bool:
    fields = [(a.images, b.images), (a.targets.boxes, b.targets.boxes), (a.targets.labels, b.targets.labels)]
    return a.image_ids == b.image_ids and all(torch.equal(x, y) for x, y in fields)


def epoch(data: DataSet, network, number: int, start: int = 0, **settings) -> list[Batch]:
    usual = {"network": network, "batch_size": 4, "seed": 1, "training": True}
    loader = data.loader("train", **{**usual, **settings})
    loader.batch_sampler.set_epoch(number)
    loader.batch_sampler.set_start(start)
    return list(loader)


def test_a_batch_has_the_promised_shapes():
    network = SimpleNamespace(image_size=(64, 96), stride=32, tasks=TASKS)
    data = drawn()
    batch = next(iter(data.loader("train", network=network, batch_size=4, seed=0, training=True)))
    count = len(batch.targets)
    assert batch.images.shape == (4, 64, 96, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.image_sizes.tolist() == [[64, 64]] * 4
    assert sum(batch.targets.counts) == len(batch.targets.labels) == count
    assert batch.targets.masks.shape == (count, 64, 96)
    assert batch.targets.keypoints.shape == (count, 6, 3)
    assert batch.targets.boxes.dtype == torch.float32
    assert batch.targets.boxes.min() >= 0
    assert batch.targets.boxes.max() <= 1
    assert data.keypoints.counts == [4, 4, 6, 4, 3, 6]


def test_batches_carry_only_what_the_network_learns(network):
    (first, *_) = epoch(drawn(), network, 0)
    assert first.targets.masks is None
    assert first.targets.keypoints is None


def test_a_sample_depends_on_seed_epoch_and_index_only(network):
    """Not on workers, not on what was loaded before, not on where a resumed run starts."""
    alone = epoch(drawn(), network, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        shared = epoch(drawn(num_workers=2), network, 3)
    resumed = epoch(drawn(), network, 3, start=2)
    assert len(alone) == 5
    assert all(map(same, alone, shared))
    assert all(map(same, alone[2:], resumed))
    assert not same(alone[0], epoch(drawn(), network, 4)[0])
    assert not same(alone[0], epoch(drawn(), network, 3, seed=2)[0])


def test_a_persistent_loader_follows_the_epochs(network):
    data = drawn(num_workers=1)
    loader = data.loader("train", network=network, batch_size=4, seed=1, training=True)
    for number in range(2):
        loader.batch_sampler.set_epoch(number)
        assert all(map(same, loader, epoch(drawn(), network, number)))


def test_a_tiny_set_still_fills_a_batch_with_different_views(network):
    (batch,) = epoch(drawn(train=1), network, 0, batch_size=3)
    assert batch.image_ids == [1, 1, 1]
    assert (batch.images[0] != batch.images[1]).any()


def test_sizes_vary_between_batches_and_not_within(network):
    data = drawn(multi_scale=[64, 96, 128], stop_epoch=1)
    shapes_seen = {tuple(batch.images.shape[1:3]) for batch in epoch(data, network, 0, batch_size=1)}
    assert shapes_seen == {(32, 64), (64, 96), (96, 128)}
    assert {tuple(batch.images.shape[1:3]) for batch in epoch(data, network, 1)} == {(64, 96)}


def test_evaluation_is_every_image_once_plainly_resized(roboflow, network):
    root = roboflow(train=document(), valid=document())
    data = data_set(root, augment=Augment(**STRONG))
    batches = list(data.loader("val", network=network, batch_size=4, seed=0))
    assert [len(batch) for batch in batches] == [2]
    assert batches[0].image_ids == [11, 12]
    assert batches[0].image_sizes.tolist() == [[40, 60], [40, 60]]
    expected = Image.open(root / "valid" / "a.png").resize((96, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(batches[0].images[0], np.asarray(expected))
    assert batches[0].targets.labels.tolist() == [1, 0]
    torch.testing.assert_close(batches[0].targets.boxes[0], torch.tensor([20 / 60, 10 / 40, 20 / 60, 10 / 40]))


def test_ranks_share_an_evaluation(network):
    ids = []
    for rank in range(2):
        loader = drawn().loader("val", network=network, batch_size=2, seed=0, rank=rank, world_size=2)
        ids += [i for batch in loader for i in batch.image_ids]
    assert sorted(ids) == list(range(1, 8))


def test_classes_and_fingerprint(roboflow):
    root = roboflow(train=document(), valid=document())
    data = data_set(root)
    assert (data.classes, data.category_ids, data.num_classes) == (["ball", "cup"], [3, 7], 2)
    assert data.fingerprint == data_set(root).fingerprint
    assert data.test is None
    changed = document()
    changed["annotations"][0]["bbox"][0] += 1
    roboflow(valid=changed)
    assert data_set(root).fingerprint != data.fingerprint


def test_raw_category_ids(roboflow, network):
    data = data_set(roboflow(train=document()), category_ids="raw")
    assert data.num_classes == 8
    batch = next(iter(data.loader("train", network=network, batch_size=1, seed=0)))
    assert batch.targets.labels.tolist() == [7, 3]


def test_what_is_missing_is_reported(roboflow, network, caplog):
    with caplog.at_level(logging.INFO):
        data = data_set(roboflow(train=document()))
    assert "no val and no test split" in caplog.text
    with pytest.raises(ValueError, match="has no val split"):
        data.loader("val", network=network, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"data\.split is 'tset', and splits are train, val, test"):
        data.split("tset")
    network.tasks = ("boxes", "masks")
    with pytest.raises(ValueError, match="no masks"):
        data.loader("train", network=network, batch_size=1, seed=0)
    network.tasks = ("boxes", "keypoints")
    with pytest.raises(ValueError, match="no keypoints"):
        data.loader("train", network=network, batch_size=1, seed=0)


def test_keypoints_without_pairs_are_not_mirrored(roboflow, network, caplog):
    network.tasks = ("boxes", "keypoints")
    categories = [{"id": 7, "name": "cup", "keypoints": ["rim", "foot"]}, {"id": 3, "name": "ball"}]
    annotations = [{**document()["annotations"][0], "keypoints": [12, 6, 2, 20, 7, 2]}]
    root = roboflow(train=document(categories=categories, annotations=annotations))

    def first(data: DataSet) -> float:
        (batch,) = epoch(data, network, 0, batch_size=2)
        return round(float(batch.targets.keypoints[0, 0, 0]), 4)

    with caplog.at_level(logging.WARNING):
        assert first(data_set(root, augment=Augment(flip=1.0))) == 0.2
    assert "keypoint_flip_pairs" in caplog.text
    assert first(data_set(root, augment=Augment(flip=1.0), keypoint_flip_pairs=[])) == 0.8
    assert first(data_set(root, augment=Augment(flip=1.0), keypoint_flip_pairs=[[0, 1]])) == round(1 - 20 / 60, 4)


def test_a_network_without_keypoints_is_mirrored_anyway(roboflow, network):
    categories = [{"id": 7, "name": "cup", "keypoints": ["rim", "foot"]}]
    annotations = [{**document()["annotations"][0], "keypoints": [12, 6, 2, 20, 7, 2]}]
    root = roboflow(train=document(categories=categories, annotations=annotations))
    (batch,) = epoch(data_set(root, augment=Augment(flip=1.0)), network, 0, batch_size=2)
    torch.testing.assert_close(batch.targets.boxes[0, 0], torch.tensor(1 - 20 / 60))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence_wherever_it_is_read(roboflow, network, workers):
    root = roboflow(train=document())
    data = data_set(root, num_workers=workers)
    loader = data.loader("train", network=network, batch_size=2, seed=0, training=True)
    (root / "train" / "b.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"b\.png is not a readable image") as error:
        list(loader)
    assert "Traceback" not in str(error.value)
    assert str(error.value).startswith(str(root))


@pytest.mark.parametrize("settings", [{"num_workers": -1}, {"prefetch_factor": 0}, {"multi_scale": "rtdter"}])
def test_settings_out_of_range_are_refused(network, settings):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(settings))}"):
        drawn(**settings).loader("train", network=network, batch_size=1, seed=0, training=True)


def test_bccd_and_people_load_augmented(real_data):
    from detr_exp.data.auto import auto

    network = SimpleNamespace(image_size=(96, 96), stride=32, tasks=("boxes",))
    augment = Augment(**STRONG)
    for folder in ("bccd_coco", "bccd_yolo"):
        data = data_set(real_data / folder, auto, augment=augment)
        batch = next(iter(data.loader("train", network=network, batch_size=8, seed=0, training=True)))
        assert batch.image_sizes.tolist() == [[480, 640]] * 8
        assert len(batch.targets) > 8
    network.tasks = TASKS
    place = {"annotations": "person_keypoints.json", "images": None}
    data = data_set(real_data / "coco_person", augment=augment, train=place)
    batch = next(iter(data.loader("train", network=network, batch_size=4, seed=0, training=True)))
    assert batch.targets.masks.flatten(1).any(1).all()
    assert batch.targets.keypoints.shape[1:] == (17, 3)
