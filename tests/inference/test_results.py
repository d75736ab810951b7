"""What supervision, pandas and pycocotools make of detections."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from detr_exp.data.classes import KnownLabels
from detr_exp.data.keypoints import KeypointSchema
from detr_exp.inference.results import Result, Results
from detr_exp.inference.writers import COLUMNS
from detr_exp.structures import Detections

KNOWN = KnownLabels(3, ["cat", "dog", "größe x"], [7, 1, 9])


def found(count: int, *, masks: bool = False, name: str = "a.png") -> Result:
    """Objects one after another, of the classes in turn."""
    low = torch.arange(count, dtype=torch.float32)[:, None].expand(count, 2)
    boxes = torch.cat([low, low + 4], dim=1)
    inside = torch.zeros(count, 20, 30, dtype=torch.bool)
    for i in range(count):
        inside[i, i : i + 4, i : i + 4] = True
    detections = Detections(
        scores=torch.linspace(0.9, 0.5, count) if count else torch.zeros(0),
        labels=torch.arange(count) % 3,
        boxes=boxes,
        masks=inside if masks else None,
    )
    return Result(name, (20, 30), detections, KNOWN)


@pytest.mark.parametrize("masks", [False, True])
def test_supervision_merges_and_filters_results_with_and_without_objects(masks: bool) -> None:
    sv = pytest.importorskip("supervision")
    several, none = Results([found(4, masks=masks), found(0, masks=masks)], KNOWN).to_supervision()
    assert len(sv.Detections.merge([none, several, none])) == 4
    for one, count in ((several, 2), (none, 0)):
        cats = one[np.isin(one["class_name"], ["cat"])]
        assert len(cats) == count
        assert cats.xyxy.shape == (count, 4)
        assert (cats.mask is None) is not masks
        assert cats.class_id.tolist() == [0] * count
    assert [several.data["class_name"][i] for i in range(3)] == KNOWN.classes
    assert several.confidence == pytest.approx(found(4).scores.numpy())


def test_supervision_gets_keypoints_beside_their_boxes() -> None:
    pytest.importorskip("supervision")
    detections = found(2).detections
    detections.keypoints = torch.arange(2 * 5 * 3, dtype=torch.float32).reshape(2, 5, 3)
    detections.keypoint_covariance = torch.zeros(2, 5, 2, 2)
    one = Result("a.png", (20, 30), detections, KNOWN).to_supervision()
    assert one[one.confidence < 0.6].data["keypoints"].tolist() == detections.keypoints[1:].tolist()


def test_without_supervision_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ValueError, match="pip install supervision"):
        found(1).to_supervision()


def test_frames_have_the_same_columns_and_types_without_objects() -> None:
    import pandas as pd

    some, none = found(3).to_pandas(), found(0).to_pandas()
    assert list(some.columns) == list(none.columns) == list(COLUMNS)
    assert (some.dtypes == none.dtypes).all()
    assert some["class"].tolist() == KNOWN.classes
    assert some[["x0", "y0", "x1", "y1"]].to_numpy().tolist() == found(3).boxes.tolist()
    both = pd.concat([none, some])
    assert (both.dtypes == some.dtypes).all()
    assert Results([found(2), found(1, name="b.png")], KNOWN).to_pandas()["image"].tolist() == [
        *["a.png"] * 2,
        "b.png",
    ]


def test_pycocotools_takes_it_and_finds_itself() -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    given = Results([found(3, masks=True), found(0), found(2, masks=True, name="b.png")], KNOWN).to_coco()
    assert [image["file_name"] for image in given["images"]] == ["a.png", "a.png", "b.png"]
    truth = COCO()
    objects = [{**one, "iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]} for one in given["annotations"]]
    truth.dataset = {**given, "annotations": objects}
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        for kind in ("bbox", "segm"):
            evaluation = COCOeval(truth, truth.loadRes([dict(one) for one in given["annotations"]]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == pytest.approx(1.0)


def test_coco_gives_keypoints_of_the_class_alone() -> None:
    schema = KeypointSchema([["a", "b"], [], ["a"]], [[]] * 3, [[]] * 3, [0.1, 0.1], flippable=False)
    detections = found(3).detections
    detections.keypoints = torch.ones(3, 2, 3)
    detections.keypoint_covariance = torch.zeros(3, 2, 2, 2)
    known = KnownLabels(3, KNOWN.classes, KNOWN.category_ids, schema)
    made = Result("a.png", (20, 30), detections, known).to_coco()
    assert [len(one["keypoints"]) for one in made["annotations"]] == [6, 0, 3]


def test_results_are_a_sequence() -> None:
    results = Results([found(1), found(2, name="b")], KNOWN, ["c"])
    assert [len(one) for one in results] == [1, 2]
    assert results[-1].name == "b"
    assert results[:1].to_coco()["images"] == results.to_coco()["images"][:1]
    assert repr(results) == "Results(3 objects in 2 images)"
    assert results[1].classes == ["cat", "dog"]
