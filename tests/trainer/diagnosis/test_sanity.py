"""Before the first step: evaluator and ground truth, samples, overfitting a few images, and skipped images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from detr_exp import build
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.diagnosis.sanity import refuse_low_ground_truth_score
from detr_exp.training import train_in

PERSON = {"id": 5, "name": "person", "keypoints": ["a", "b", "c"]}
SQUARE = [[10, 10, 50, 10, 50, 50, 10, 50]]
CROWD = {"size": [100, 200], "counts": [10000, 9000, 1000]}


def told(words: list[str], **wrong):
    """As much of a run as the comparison needs; `wrong` replaces arguments of the metric."""
    cfg = build.compose(["model=rtdetrv2_tiny", "data.num_workers=0", *words])
    data = build.data(cfg)
    tasks = ("boxes", *["masks"] * data.has_masks, *["keypoints"] * (data.keypoints is not None))
    network = SimpleNamespace(image_size=(64, 64), stride=32, tasks=tasks, keypoint_counts=())
    metric = build.metric(cfg, data, network, **wrong)
    config = {"trainer": {"monitor": None}}
    return SimpleNamespace(data=data, network=network, seed=0, make_metric=metric, config=config)


def people(root: Path, annotations: list[dict]) -> list[str]:
    """Overrides for a data set of one picture of 200 x 100, the same in training and validation."""
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True)
        Image.new("RGB", (200, 100)).save(root / split / "a.png")
        usual = {"image_id": 1, "category_id": 5, "iscrowd": 0}
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}],
            "annotations": [{"id": i, **usual, **a} for i, a in enumerate(annotations, 1)],
            "categories": [PERSON],
        }
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return ["data=coco", f"data.root={root}", "data.keypoint_flip_pairs=[]"]


def test_ground_truth_of_synthetic_shapes_scores_one():
    refuse_low_ground_truth_score(told(["data=shapes", "data.val=40", "data.source.size=96"]))


@pytest.mark.parametrize("ids", [[2, 1, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]])
def test_a_wrong_map_of_classes_is_refused(ids):
    run = told(["data=shapes", "data.val=40", "data.source.size=96"], category_ids=ids)
    with pytest.raises(ValueError, match=r"mAP 0\.\d+ instead of 1 \(.*check_data"):
        refuse_low_ground_truth_score(run)


def test_what_coco_ignores_does_not_count(tmp_path):
    """Crowds, people without labelled points, points that are hidden: each alone spoils a naive comparison."""
    annotations = [
        {"bbox": [10, 10, 40, 40], "keypoints": [20, 20, 2, 0, 0, 0, 30, 45, 1], "segmentation": SQUARE},
        {"bbox": [60, 20, 30, 60], "keypoints": [0] * 9, "segmentation": [[60, 20, 90, 20, 90, 80, 60, 80]]},
        {"bbox": [65, 25, 30, 60], "keypoints": [0] * 9, "segmentation": [[65, 25, 95, 25, 95, 85, 65, 85]]},
        {"bbox": [100, 0, 100, 90], "iscrowd": 1, "segmentation": CROWD},
        {
            "bbox": [120, 20, 40, 60],
            "keypoints": [125, 25, 2] * 3,
            "segmentation": [[120, 20, 160, 20, 160, 80, 120, 80]],
        },
    ]
    refuse_low_ground_truth_score(told(people(tmp_path, annotations)))


def test_images_that_ground_truth_cannot_score_are_skipped(tmp_path):
    """Cut and tiny objects, masks that are only boxes, none at all: nothing to compare, nothing to complain about."""
    for number, box in enumerate(([-30, 10, 60, 40], [10, 10, 2, 2], [10.5, 10.5, 20, 20])):
        annotations = [{"bbox": box, "keypoints": [15, 15, 2] * 3}, {"bbox": [100, 10, 40, 40], "segmentation": SQUARE}]
        refuse_low_ground_truth_score(told(people(tmp_path / str(number), annotations)))


def test_people_score_one(real_data):
    words = ["data=coco", f"data.root={real_data / 'coco_person'}"]
    words += [f"data.{split}.annotations=person_keypoints.json" for split in ("train", "val")]
    refuse_low_ground_truth_score(told(words))


def test_a_run_begins_with_a_sheet_of_samples(trained):
    assert Image.open(trained / "training_samples.png").width > 600
    lines = [json.loads(line) for line in (trained / "artifacts.jsonl").read_text().splitlines()]
    assert {"path": "training_samples.png", "image": "training_samples", "step": 0} in lines


def test_the_best_checkpoint_knows_the_operating_point_of_every_class(trained):
    best = files.load(trained / files.BEST_TOTAL)
    (rows,) = best["operating_points"].values()
    assert [row["class"] for row in rows] == best["classes"]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("threshold", "f1", "precision", "recall"))


def test_overfitting_a_few_images(small, tmp_path):
    cfg = small("trainer.overfit_batches=1", "trainer.max_steps=1", "data/augment=rtdetr")
    run = build.run(cfg, tmp_path)
    assert len(run.data.train) == len(run.data.val) == 2
    assert run.data.test is None
    network = SimpleNamespace(image_size=(64, 64), stride=32, tasks=("boxes",))
    (one,) = run.data.loader("train", network=network, batch_size=2, seed=0, training=True)
    (two,) = run.data.loader("val", network=network, batch_size=2, seed=0)
    order = [one.image_ids.index(number) for number in two.image_ids]
    assert abs(one.images[order].int() - two.images.int()).max() <= 1
    assert all(two.targets.counts)
    assert len(run.make_metric("val").image_info) == 2
    with pytest.raises(ValueError, match=r"overfit_batches needs .* trainer\.batch_size=4"):
        build.run(small("trainer.overfit_batches=1", "trainer.batch_size=auto"), tmp_path)


def test_images_that_cannot_be_read_are_listed_and_counted(small, tmp_path):
    words = people(tmp_path / "set", [{"bbox": [10, 10, 40, 40]}])
    for split in ("train", "valid"):
        path = tmp_path / "set" / split / "_annotations.coco.json"
        content = json.loads(path.read_text())
        content["images"].append({"id": 2, "file_name": "b.png", "width": 200, "height": 100})
        path.write_text(json.dumps(content))
        Image.effect_noise((200, 100), 60).save(path.with_name("b.png"))
        path.with_name("b.png").write_bytes(path.with_name("b.png").read_bytes()[:4000])
    cfg = small(*words, "data.num_workers=0", "data.on_error=skip", "trainer.max_steps=1", "trainer.batch_size=2")
    train_in(tmp_path / "run", cfg)
    listed = (tmp_path / "run" / "skipped_images.txt").read_text().splitlines()
    assert [line.split(" cannot be decoded")[0][-11:] for line in listed] == ["train/b.png", "valid/b.png"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["data/skipped_images"] for line in lines if "data/skipped_images" in line] == [1, 2]


def test_no_validation_split_is_said_before_training(small, tmp_path):
    with pytest.raises(ValueError, match="no val split"):
        build.run(small("data.val=0"), tmp_path)
