"""Several data sets as one: classes by name, shares of images, and what is annotated in some sets only."""

from __future__ import annotations

import functools
import json
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp.data.augment import Augment
from detr_exp.data.copy_blend import CopyBlend
from detr_exp.data.copy_paste import CopyPaste
from detr_exp.data.dataset import DataSet
from detr_exp.data.joined import image_ids_by_set, tables_of
from detr_exp.data.many import many
from detr_exp.data.shard_writing import write_shards
from detr_exp.metric.coco import CocoMetric
from detr_exp.structures import Detections

NETWORK = SimpleNamespace(image_size=(64, 64), stride=32, tasks=("boxes",))


def write_set(root: Path, classes: list[str], images: list[list[str]], *, level: int = 90) -> Path:
    """A Roboflow-style set of grey images with an object of each of some classes; ids begin at 5 in every set."""
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True, exist_ok=True)
        entries, annotations = [], []
        for i, shown in enumerate(images):
            Image.new("RGB", (64, 64), (level + i,) * 3).save(root / split / f"{i}.png")
            entries.append({"id": i + 5, "file_name": f"{i}.png", "width": 64, "height": 64})
            for name in shown:
                place = len(annotations)
                box = [4 + place % 7, 6, 30, 20]
                own = {"id": place, "image_id": i + 5, "category_id": 3 + classes.index(name), "bbox": box}
                annotations.append(own)
        content = {"images": entries, "annotations": annotations}
        content["categories"] = [{"id": 3 + c, "name": name} for c, name in enumerate(classes)]
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def sets(tmp_path: Path) -> dict:
    first = write_set(tmp_path / "a", ["cat", "dog"], [["cat"], ["dog", "cat"], ["cat"], []])
    second = write_set(tmp_path / "b", ["kitty", "bird", "sign"], [["bird"], ["kitty", "sign"]], level=150)
    return {"a": {"root": str(first)}, "b": {"root": str(second), "as": {"kitty": "cat"}, "ignore": ["sign"]}}


def joined(sets: dict, augment: Augment | None = None, **settings) -> DataSet:
    chosen = {key: settings.pop(key) for key in ("classes",) if key in settings}
    source = functools.partial(many, sets=sets, **chosen)
    return DataSet(source=source, augment=augment or Augment(), num_workers=0, **settings)


def batches(data: DataSet, epoch: int = 0, batch_size: int = 2, **ranks: int) -> list:
    loader = data.loader("train", network=NETWORK, batch_size=batch_size, seed=0, training=True, **ranks)
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def test_classes_are_joined_by_name(sets) -> None:
    data = joined(sets)
    assert data.classes == ["cat", "dog", "bird"]
    shown = {i: [data.classes[n - 1] for n in data.train.objects(i).categories] for i in range(len(data.train))}
    assert shown == {0: ["cat"], 1: ["dog", "cat"], 2: ["cat"], 3: [], 4: ["bird"], 5: ["cat"]}
    assert data.object_counts() == [4, 1, 1]
    assert joined(sets, classes=["bird", "fish"]).classes == ["bird", "fish", "cat", "dog"]


def test_image_ids_are_unique_and_lead_back(sets) -> None:
    data = joined(sets)
    assert list(data.train.image_ids) == [5, 6, 7, 8, 9, 10]
    assert image_ids_by_set(data.train) == {"a": (5, 6, 7, 8), "b": (9, 10)}
    truth = data.train.truth()
    assert [image["set"] for image in truth["images"]] == ["a"] * 4 + ["b"] * 2
    assert len({one["id"] for one in truth["annotations"]}) == len(truth["annotations"]) == 6
    assert image_ids_by_set(data.first(3).train) == {"a": (5, 6, 7)}
    assert [*tables_of(data.train)] == ["a", "b"]


def test_weights_are_shares_of_the_images_of_an_epoch(sets) -> None:
    sets["a"]["weight"], sets["b"]["weight"] = 1, 3
    epochs = [Counter(chain(*(batch.image_ids for batch in batches(joined(sets), e, batch_size=1)))) for e in range(20)]
    assert {sum(epoch.values()) for epoch in epochs} == {6}
    assert sum(epoch[9] + epoch[10] for epoch in epochs) / 20 == pytest.approx(4.5, abs=0.2)
    sets["b"]["weight"] = 0
    assert {number for batch in batches(joined(sets)) for number in batch.image_ids} <= {5, 6, 7, 8}
    assert joined(sets).val is not None
    assert image_ids_by_set(joined(sets).val)["b"] == (9, 10)  # evaluated all the same


def test_the_network_is_shown_which_classes_are_annotated(sets) -> None:
    for batch in batches(joined(sets), batch_size=3):
        for number, known in zip(batch.image_ids, batch.targets.annotated.tolist()):
            assert known == ([True, True, False] if number < 9 else [True, False, True])


def test_an_image_of_several_sets_has_the_classes_of_all_of_them(sets) -> None:
    mixed = joined(sets, Augment(mosaic=1.0))
    known = [tuple(row) for e in range(3) for batch in batches(mixed, e) for row in batch.targets.annotated.tolist()]
    assert (True, False, False) in known
    assert set(known) <= {(True, False, False), (True, True, False), (True, False, True)}


@pytest.mark.parametrize("operation", [CopyPaste, CopyBlend])
def test_so_has_one_with_objects_of_another_set(sets, operation) -> None:
    """What is copied brings pixels around the object, in which classes of the other set are not annotated."""
    for copies in (Augment(operations=[operation(chance=1.0)]), Augment()):
        known = [
            tuple(row)
            for e in range(4)
            for batch in batches(joined(sets, copies), e)
            for row in batch.targets.annotated.tolist()
        ]
        assert ((True, False, False) in known) == bool(copies.operations)
        assert {(True, True, False), (True, False, True)} <= set(known)


def test_sets_with_the_same_classes_have_no_mask(sets) -> None:
    both = {"x": sets["a"], "y": dict(sets["a"])}
    assert all(batch.targets.annotated is None for batch in batches(joined(both)))
    alone = DataSet(source=functools.partial(many, sets={"a": sets["a"]}), augment=Augment(), num_workers=0)
    assert alone.train.objects(1).annotated is None


def test_detections_of_classes_without_annotations_do_not_count(sets) -> None:
    data = joined(sets)
    metric = CocoMetric(truth=data.val.truth(), category_ids=data.category_ids, classes=data.classes)
    boxes = {number: [] for number in data.val.image_ids}
    for one in metric.truth.dataset["annotations"]:
        x, y, w, h = one["bbox"]
        boxes[one["image_id"]].append((one["category_id"] - 1, [x, y, x + w, y + h]))
    for number, found in boxes.items():
        wrong = 2 if number < 9 else 1  # better than everything else, and not annotated in this image
        labels = torch.tensor([wrong, *(label for label, _ in found)])
        corners = torch.tensor([[30.0, 30, 60, 60], *(box for _, box in found)])
        scores = torch.tensor([0.9, *[0.5] * len(found)])
        metric.update([number], [Detections(scores, labels, corners)])
    assert metric.compute()["mAP"] == 1.0


def test_a_class_some_of_whose_objects_are_ignored_is_annotated_in_part(sets) -> None:
    """Its other objects are trained on; that there is none is not background, and is neither right nor wrong."""
    sets["b"] |= {"as": {"bird": "sign", "kitty": "cat"}, "ignore": ["sign"]}
    data = joined(sets)
    assert data.classes == ["cat", "dog", "sign"]
    assert [data.train.objects(i).categories.tolist() for i in (4, 5)] == [[3], [1]]
    known = {n: row for b in batches(data) for n, row in zip(b.image_ids, b.targets.annotated.tolist())}
    assert known[9] == known[10] == [True, False, False]
    truth = data.val.truth()
    assert {one["category_id"] for one in truth["annotations"] if one["image_id"] >= 9} == {1}
    data.check()
    alone = joined({"b": sets["b"]})
    assert alone.train.objects(0).annotated.tolist() == [1]  # in one data set, too


def test_resuming_and_ranks(sets) -> None:
    sets["a"]["weight"], sets["b"]["weight"] = 1, 1
    data = joined(sets)
    loader = data.loader("train", network=NETWORK, batch_size=1, seed=0, training=True)
    loader.batch_sampler.set_epoch(2)
    whole = [batch.image_ids for batch in loader]
    loader.batch_sampler.set_start(3)
    assert [batch.image_ids for batch in loader] == whole[3:]
    ranks = [[b.image_ids for b in batches(data, 2, batch_size=1, rank=r, world_size=2)] for r in range(2)]
    assert [pair for step in zip(*ranks) for pair in step] == whole


def test_shards_join_files(sets, tmp_path) -> None:
    plain = joined(sets)
    for name, table in tables_of(plain.train).items():
        (tmp_path / f"shards {name}").mkdir()
        write_shards(table, "train", tmp_path / f"shards {name}", 10**6, lambda line: None)
    sets["b"] |= {"root": str(tmp_path / "shards b"), "layout": "shards"}
    mixed = joined(sets)
    for ours, theirs in zip(batches(mixed), batches(plain), strict=True):
        assert ours.image_ids == theirs.image_ids
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.targets.annotated, theirs.targets.annotated)


def test_all_headers_are_checked(sets) -> None:
    (Path(sets["b"]["root"]) / "train" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png"):
        joined(sets).check()


def test_layouts_mix_and_keypoints_stay(sets) -> None:
    sets["drawn"] = {"layout": "shapes", "train": 2, "val": 1, "options": {"size": 64, "seed": 1}}
    data = joined(sets)
    assert len(data.train) == 8
    assert data.keypoints is not None
    assert {data.train.objects(i).keypoints.shape[1] for i in range(8)} == {data.train.most_keypoints}
    assert not data.train.has_masks
    image, objects = data.train.load(7)
    assert image.shape == (64, 64, 3)
    assert np.isin(
        objects.categories,
        [
            n
            for n, c in zip(data.category_ids, data.classes)
            if c in ("arrow", "kite", "house", "heart", "crescent", "figure")
        ],
    ).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": {"root": "/nowhere"}}, r"data\.source\.sets\.a: data\.root is '/nowhere'"),
        ({"a": {"weight": 1}}, r"b has no weight, but others have"),
        ({"a": {"weight": 0}, "b": {"weight": 0}}, r"all weights are 0"),
        ({"a": {"weight": -1}}, r"sets\.a: its weight is -1"),
        ({"a": {"as": {"cow": "cat"}}}, r"sets\.a: as and ignore have 'cow', but its classes are cat, dog"),
        ({"a": {"as": {"dog": "x"}, "ignore": ["dog"]}}, r"sets\.a: as and ignore both have 'dog'"),
        ({"a": {"ignore": "dog"}}, r"sets\.a: .*`ignore` a list"),
        ({"a": {"rot": 1}}, r"sets\.a: it has rot; a data set has root, layout"),
        ({"a": {"layout": "cocoa"}}, r"sets\.a: its layout is 'cocoa'; use auto, coco"),
        ({"a": {"options": {"file": "x"}}}, r"sets\.a: its options have file; its layout has extra_roots"),
        ({"a": {"options": {"extra_roots": "x"}}}, r"its extra_roots is 'x'; it must be a list, each a text"),
        ({"a": {"options": 5}}, r"sets\.a: its options are 5"),
        (
            {"a": {"layout": "shapes", "train": 2}},
            r"needs size and seed; give what it needs: options: \{size: \.\.\., seed",
        ),
        ({"a": {"layout": "coco", "train": "x"}}, r"sets\.a: its train is 'x'; it must be names with values"),
        (
            {"a": {"layout": "coco", "train": {"annotation": "x"}}},
            r"data\.train has annotation, but .*annotations=\.\.\.",
        ),
        ({"a": {"train": {"annotations": "x"}}}, r"sets\.a: data\.train is .* data=auto finds the splits itself"),
        ({"a": {"layout": "yolo", "val": "x"}}, r"sets\.a: data\.val is 'x', but with data=yolo the YAML"),
        ({"my mAP": {}}, r"sets\.my mAP: the name of a data set"),
        (
            {"a": {"ignore": ["cat", "dog"]}, "b": {"as": {}, "ignore": ["kitty", "bird", "sign"]}},
            r"every class is ign",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(sets, change, message) -> None:
    for name, values in change.items():
        sets[name] = {**sets.get(name, {}), **values}
    with pytest.raises(ValueError, match=message):
        joined(sets)


@pytest.mark.parametrize("classes", ["bird", 5, {"bird": 1}])
def test_classes_are_a_list(sets, classes) -> None:
    with pytest.raises(ValueError, match=rf"data\.source\.classes is {classes}; .*data\.source\.classes=\["):
        joined(sets, classes=classes)


def test_no_sets_and_a_root_are_refused(sets) -> None:
    with pytest.raises(ValueError, match=r"data\.source\.sets is null; it needs at least one"):
        joined(None)
    with pytest.raises(ValueError, match=r"data=many has no data\.root"):
        joined(sets, root="/data")
