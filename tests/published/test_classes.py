"""Names of the classes of published detectors."""

from __future__ import annotations

from detr_exp.published.classes import classes_of, coco, has_keypoints
from detr_exp.published.table import table


def test_every_detector_of_coco_has_names() -> None:
    assert (len(coco()), coco()[1], coco()[18], coco()[90]) == (80, "person", "dog", "toothbrush")
    for entry in table().values():
        if entry.kind == "detector" and "COCO" in entry.data and entry.classes != "unknown":
            found = classes_of(entry)
            assert len(found) == {"80": 80, "2": 2, "91": 1 if has_keypoints(entry) else 91}[entry.classes]
            assert found[1] == "person"
