"""Networks for masks and for keypoints on data that have something else: an answer before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from detr_exp import train
from detr_exp.runs.next_commands import IMAGE_TAG

BOX = {"bbox": [2, 2, 20, 12]}
MASK = {"segmentation": [[2, 2, 22, 2, 22, 14, 2, 14]]}
POINTS = {"keypoints": [4, 4, 2, 20, 12, 2]}
SMALL = [
    "tracker=none",
    "data.num_workers=0",
    "trainer/hardware=cpu",
    "trainer.max_steps=1",
    "model.backbone.width=24",
    "model.backbone.num_heads=2",
    "model.backbone.out_blocks=[1,2]",
    "model.hidden_dim=32",
    "model.num_layers=1",
    "model.num_groups=1",
    "model.num_queries=4",
    "model.image_size=[48,48]",
]


def folder(root: Path, **splits: dict) -> Path:
    """A data set of one picture with one object a split, which knows what is given."""
    categories = [{"id": 1, "name": "a"}]
    for name, known in splits.items():
        (root / name).mkdir(parents=True)
        Image.new("RGB", (48, 32)).save(root / name / "a.png")
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "area": 240.0, "iscrowd": 0, **BOX, **known}
        document = {
            "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 32}],
            "annotations": [annotation],
            "categories": categories,
        }
        (root / name / "_annotations.coco.json").write_text(json.dumps(document))
    return root


def yolo(root: Path, model: str) -> Path:
    """The same with rows of polygons, or of keypoints with their mirror images."""
    rows = {
        "rfdetr_seg": "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n",
        "rfdetr_keypoint": "0 0.3 0.3 0.4 0.4 0.1 0.2 2 0.4 0.4 1\n",
    }
    for split in ("train", "val"):
        (root / split / "images").mkdir(parents=True)
        (root / split / "labels").mkdir()
        Image.new("RGB", (48, 32)).save(root / split / "images/a.png")
        (root / split / "labels/a.txt").write_text(rows[model])
    pose = "kpt_shape: [2, 3]\nflip_idx: [1, 0]\n" if model == "rfdetr_keypoint" else ""
    (root / "data.yaml").write_text(f"names: [a]\ntrain: train/images\nval: val/images\n{pose}")
    return root


@pytest.mark.parametrize(
    ("model", "known", "message"),
    [
        ("rfdetr_seg", BOX, "the train split has no masks, but the network learns them; use model=rfdetr for boxes"),
        ("rfdetr_seg", POINTS, "the train split has no masks, but the network learns them; use model=rfdetr for boxes"),
        (
            "rfdetr_keypoint",
            BOX,
            "predicts keypoints, but the data have none; use data with keypoints, or model=rfdetr",
        ),
        (
            "rfdetr_keypoint",
            MASK,
            "predicts keypoints, but the data have none; use data with keypoints, or model=rfdetr",
        ),
    ],
)
def test_a_network_for_what_the_data_do_not_have(
    model: str, known: dict, message: str, command: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = folder(tmp_path / "set", train=known, valid=known)
    assert command(train.main, f"model={model}", "data=auto", f"data.root={root}", *SMALL) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.out + shown.err
    assert "epoch 1" not in shown.out


@pytest.mark.parametrize(("model", "known"), [("rfdetr_seg", MASK), ("rfdetr_keypoint", POINTS)])
def test_a_split_that_lacks_what_the_training_split_has(
    model: str, known: dict, command: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = folder(tmp_path / "set", train=known, valid=BOX)
    status = command(train.main, f"model={model}", "data=auto", f"data.root={root}", *SMALL)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    if model == "rfdetr_seg":
        assert status == 2
        assert "the val split has no masks, but the network learns them" in shown.err
        assert "epoch 1" not in shown.out
    else:  # people without a visible point are usual
        assert status == 0


@pytest.mark.parametrize("layout", ["coco", "yolo"])
@pytest.mark.parametrize("model", ["rfdetr_seg", "rfdetr_keypoint"])
def test_both_are_trained_where_the_data_have_them(model: str, layout: str, command: Callable, tmp_path: Path) -> None:
    """And measured: the run ends with the metrics of the task, and its best checkpoint is chosen by them."""
    known = MASK | POINTS
    root = folder(tmp_path / "set", train=known, valid=known) if layout == "coco" else yolo(tmp_path / "set", model)
    words = [f"model={model}", "data=auto", f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command(train.main, *words, *SMALL) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = {name for line in lines for name in line}
    task, parts = {
        "rfdetr_seg": ("segm", ["mask_ce", "mask_dice"]),
        "rfdetr_keypoint": ("keypoint", [f"keypoint_{part}" for part in ("l1", "findable", "visible", "nll")]),
    }[model]
    assert {"val/mAP", f"val/{task}_mAP", f"val/{task}_mAP50", f"val/{task}_mAP75"} <= measured
    assert {f"train/loss_{part}" for part in parts} <= measured
    assert list((tmp_path / "run/predictions").glob("*.png"))
    image = json.loads((tmp_path / "run/run.json").read_text())["tags"][IMAGE_TAG]
    assert root in Path(image).parents, "commands that are named after a sweep predict on it"
    assert Path(image).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.keypoint_counts=[5]"],
            "model.keypoint_counts is [5], but the classes of the data have [2]",
        ),
        (["model.keypoint_counts=[2,2]"], "model.keypoint_counts is [2, 2]"),
        (["model.score_alpha=-1"], "model.score_alpha is -1"),
        (["model.num_queries=0"], "model.num_queries is 0"),
        (["data.keypoint_sigmas=[0.1]"], "data.keypoint_sigmas has 1 values [0.1], but the data have 2 keypoints"),
        (["data.keypoint_flip_pairs=[[0,9]]"], "data.keypoint_flip_pairs has [0, 9]"),
    ],
)
def test_a_schema_that_does_not_fit_the_data(
    words: list[str], message: str, command: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = folder(tmp_path / "set", train=POINTS, valid=POINTS)
    assert command(train.main, "model=rfdetr_keypoint", "data=auto", f"data.root={root}", *SMALL, *words) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.out + shown.err
