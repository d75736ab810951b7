"""Images of one, four and more channels: what the network is shown, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from detr_exp import build
from detr_exp.data.augment import Augment
from detr_exp.data.cache import image_cache
from detr_exp.data.channels import in_channels
from detr_exp.data.coco import coco
from detr_exp.data.content import Category
from detr_exp.data.dataset import DataSet
from detr_exp.data.joined import Joined, Member
from detr_exp.data.operations import Blur, Grey, Jpeg
from detr_exp.data.part import Part
from detr_exp.data.shapes import shapes
from detr_exp.inference.detector import load
from detr_exp.ops.draw import draw_objects
from detr_exp.training import train_in


class Canvas:
    image_size, stride, tasks = (48, 64), 1, ("boxes",)

    def __init__(self, channels: int) -> None:
        self.pixel_mean = torch.arange(1, channels + 1).view(-1, 1, 1) / 255


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    """A COCO folder of eight images with four channels: the fourth is 200 in the object and 100 elsewhere."""
    images, annotations = [], []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 4)).astype(np.uint8)
        pixels[..., 3] = 100
        pixels[10:30, 20:50, 3] = 200
        np.save(tmp_path / f"{i}.npy", pixels)
        images.append({"id": i, "file_name": f"{i}.npy", "height": 40, "width": 60})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [20, 10, 30, 20], "area": 600})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "warm"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return tmp_path


def of_bands(root: Path, **settings: object) -> DataSet:
    part = {"annotations": "a.json", "images": "."}
    augment = settings.pop("augment", Augment())
    return DataSet(source=coco, root=str(root), train=part, val=part, augment=augment, num_workers=0, **settings)


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_what_the_network_is_shown(bands: Path, fit: str) -> None:
    data = of_bands(bands, channels=4, fit=fit)
    data.check(["train"])
    (batch,) = data.loader("val", network=Canvas(4), batch_size=8, seed=0)
    assert batch.images.shape == (8, 48, 64, 4)
    x0, y0, x1, y1 = (22, 14, 48, 30)
    assert (batch.images[:, y0:y1, x0:x1, 3] == 200).all()
    if fit == "letterbox":
        assert (batch.images[:, 46:] == torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).all(), (
            "its mean in every channel"
        )


@pytest.mark.parametrize("channels", [1, 4])
def test_every_augmentation_keeps_channels_together(bands: Path, channels: int) -> None:
    """Objects are where the fourth channel says, whatever happens to the image."""
    augment = Augment(
        zoom_out=0.5, iou_crop=0.5, flip=0.5, vertical_flip=0.5, mosaic=0.5, operations=[Blur(chance=0.3)]
    )
    if channels == 4:
        data = of_bands(bands, channels=4, augment=augment)
        loader = data.loader("train", network=Canvas(4), batch_size=8, seed=0, training=True)
        for epoch in range(3):
            loader.batch_sampler.set_epoch(epoch)
            (batch,) = loader
            for (cx, cy, _, _), image in zip(
                batch.targets.boxes.tolist(), np.repeat(range(8), batch.targets.counts).tolist()
            ):
                assert batch.images[image, int(cy * 48), int(cx * 64), 3] > 150
    else:
        source = functools.partial(shapes, size=64, seed=0)
        augment = Augment(photometric=1.0, zoom_out=0.5, iou_crop=0.5, flip=0.5, mosaic=0.5, mixup=0.5)
        data = DataSet(source=source, train=8, val=2, augment=augment, num_workers=0, channels=1)
        (batch,) = data.loader("train", network=Canvas(1), batch_size=8, seed=0, training=True)
        assert batch.images.shape == (8, 48, 64, 1)
        assert batch.images.float().std() > 10


def test_photometric_changes_levels_of_all_channels_alike(bands: Path) -> None:
    canvas = Canvas(4)
    canvas.image_size = (40, 60)
    batches = []
    for chance in (0.0, 1.0):
        data = of_bands(bands, channels=4, augment=Augment(photometric=chance))
        batches += data.loader("train", network=canvas, batch_size=8, seed=0, training=True)
    for usual, changed in zip(*(batch.images.reshape(8, -1).tolist() for batch in batches)):
        assert changed != usual
        assert len(set(zip(usual, changed))) == len(set(usual)), "a function of the value, the same for every channel"


def test_what_is_of_colours_alone_is_refused_or_said(bands: Path, caplog: pytest.LogCaptureFixture) -> None:
    for operation in (Grey(), Jpeg()):
        with pytest.raises(ValueError, match=rf"has {type(operation).__name__}, .*three channels.*data\.channels is 4"):
            of_bands(bands, channels=4, augment=Augment(operations=[operation]))
    with caplog.at_level("INFO"):
        of_bands(bands, channels=4, augment=Augment(photometric=0.5))
    assert "only brightness and contrast" in caplog.text
    with pytest.raises(ValueError, match=r"has 4 channels, but data\.channels is 5.*data\.channels=4"):
        of_bands(bands, channels=5).check(["train"])


def test_a_cache_holds_all_channels(bands: Path) -> None:
    data = of_bands(bands, channels=4)
    cache = image_cache("ram", 1.0, str(bands), 4)
    first, second = (cache.image(data.train, 0) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert second.shape == (40, 60, 4)
    other = of_bands(bands, channels=4, cache="ram")
    (batch,) = other.loader("val", network=Canvas(4), batch_size=8, seed=0)
    assert batch.images.shape[-1] == 4


@pytest.mark.parametrize(("channels", "seen"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_drawings_choose_three(channels: int, seen: list[int]) -> None:
    image = np.broadcast_to(np.arange(channels, dtype=np.uint8), (4, 4, channels))
    drawn = draw_objects(image, boxes_xyxy_px=np.zeros((0, 4)), labels=[], names=[])
    assert np.asarray(drawn)[0, 0].tolist() == seen


def test_four_channels_train_resume_and_predict(bands: Path, tiny_run: list[str], tmp_path: Path) -> None:
    part = "{annotations: a.json, images: .}"
    words = [word for word in tiny_run if not word.startswith("data")]
    words += ["data=coco", f"data.root={bands}", f"data.train={part}", f"data.val={part}", "data.channels=4"]
    words += ["data.num_workers=0", "trainer.batch_size=2", "trainer.max_steps=1"]
    train_in(tmp_path / "run", build.compose(words))
    detector = load(tmp_path / "run")
    assert detector.channels == 4
    image = np.load(bands / "0.npy")
    sources = image, bands / "0.npy", torch.from_numpy(image).permute(2, 0, 1)
    found = [detector.predict(source, 0.0)[0] for source in sources]
    assert all(torch.equal(found[0].boxes, other.boxes) for other in found[1:])
    with pytest.raises(ValueError, match=r"has 3 channels, but data\.channels is 4"):
        detector.predict(image[..., :3])
    more = build.compose([*words, f"model.weights={tmp_path / 'run'}"])
    weights, stored = build.network(more).state_dict(), detector.network.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    others = build.compose([*words, "data.channels=3", f"trainer.resume={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"0\.npy has 4 channels, but data\.channels is 3"):
        train_in(tmp_path / "run", others)


def test_parts_and_several_sets_keep_their_channels(bands: Path) -> None:
    data = of_bands(bands, channels=4, val_sample=3).sampled()
    assert isinstance(data.val, Part)
    assert data.val.image(0).shape == (40, 60, 4)
    few = of_bands(bands, channels=4).first(2)
    assert few.val.image(1).shape == (40, 60, 4)
    member = Member(of_bands(bands).train, {1: 1}, None)
    joined = in_channels(Joined({"a": member, "b": member}, [Category(1, "warm")]), 4)
    assert joined.image(9).shape == (40, 60, 4)
