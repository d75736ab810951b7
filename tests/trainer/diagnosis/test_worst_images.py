"""The images with the most errors."""

import json
from types import SimpleNamespace

import numpy as np
from PIL import Image

from detr_exp.data.content import Objects
from detr_exp.trainer.diagnosis.worst_images import Errors, images_with_errors, save_details

IDS = [5, 9]
TRUTH = {  # image id -> category ids and boxes
    10: ([5], [[0, 0, 10, 10]]),
    11: ([5, 9], [[0, 0, 10, 10], [20, 20, 40, 40]]),
    12: ([], []),
    13: ([9], [[0, 0, 10, 10]]),
}


class Part:
    image_ids = tuple(TRUTH)

    def objects(self, index):
        ids, boxes = TRUTH[self.image_ids[index]]
        return Objects(np.array(ids, dtype=np.int64), np.array(boxes, dtype=float).reshape(-1, 4))

    def name(self, index):
        return f"{self.image_ids[index]}.jpg"

    def load(self, index):
        return np.zeros((60, 80, 3), np.uint8), self.objects(index)


def found(*rows):
    """Rows of score, label, x, y, width, height."""
    table = np.array(rows, dtype=float).reshape(-1, 6)
    return SimpleNamespace(scores=table[:, 0], labels=table[:, 1].astype(int), boxes=table[:, 2:])


DATA = SimpleNamespace(category_ids=IDS, classes=["cat", "dog"], split=lambda name: Part())
IMAGES = {
    10: found((0.9, 0, 0, 0, 10, 10)),  # right
    11: found((0.9, 0, 0, 0, 10, 10), (0.8, 0, 0, 0, 10, 10), (0.1, 1, 20, 20, 20, 20)),  # twice, and one too faint
    12: found((0.6, 1, 5, 5, 5, 5)),  # nothing is there
    13: found((0.9, 0, 0, 0, 10, 10)),  # the wrong class
}


def test_missed_objects_and_false_alarms_are_counted():
    assert images_with_errors(DATA, "val", IMAGES, 0.5) == [Errors(1, 1, 1), Errors(1, 1, 3), Errors(0, 1, 2)]
    assert images_with_errors(DATA, "val", IMAGES, 0.05) == [Errors(1, 1, 3), Errors(0, 1, 1), Errors(0, 1, 2)]
    assert images_with_errors(DATA, "val", {10: IMAGES[10]}, 0.5) == [], (
        "pictures without errors, and those of other ranks"
    )


def test_the_figure_the_table_and_what_the_views_receive(tmp_path):
    told = []
    tracker = SimpleNamespace(
        artifact=lambda path, step: told.append((path.name, step)),
        image=lambda path, name, step: told.append((name, step)),
    )
    run = SimpleNamespace(data=DATA, tracker=tracker, output_dir=tmp_path)
    rows = [{"class": "größe", "AP": 0.5}]
    metric = SimpleNamespace(images=IMAGES, iou_types=("bbox",), table=lambda kind: rows, operating_points=dict)
    save_details(run, "val", metric, {"F1": 0.5, "F1_threshold": 0.5}, step=7, count=2)
    assert told == [("classes.json", 7), ("worst", 7)]
    assert json.loads((tmp_path / "classes.json").read_text()) == {"bbox": [{"class": "größe", "AP": 0.5}]}
    with Image.open(tmp_path / "worst/step_0000007.jpg") as sheet:
        assert sheet.width > sheet.height, "two pairs side by side"
    save_details(run, "val", metric, {"F1": 0.0, "F1_threshold": 0.0}, step=8, count=0)
    assert not (tmp_path / "worst/step_0000008.jpg").exists()
