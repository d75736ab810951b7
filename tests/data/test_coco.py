"""COCO files: layouts, category maps, what is dropped, what is refused."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest

from detr_exp.data.coco import coco

from .conftest import CATEGORIES, NONE, data_set, document, read, write_image


def test_boxes_are_clipped_in_training_but_not_in_the_ground_truth(roboflow):
    split = read(roboflow(train=document()))
    objects = split.objects(0)
    assert objects.categories.tolist() == [7, 3]
    np.testing.assert_array_equal(objects.boxes_xyxy, [[10, 5, 30, 15], [50, 30, 60, 40]])
    assert len(split.objects(1)) == 0
    truth = split.truth()
    assert [a["bbox"] for a in truth["annotations"]] == [[10, 5, 20, 10], [50, 30, 20, 20]]
    assert [a["area"] for a in truth["annotations"]] == [200, 400]
    assert [i["id"] for i in truth["images"]] == [11, 12]


@pytest.mark.parametrize(("numbers", "expected"), [((905, 17), [905, 17]), ((4, 4), [1, 2]), ((None, 8), [0, 8])])
def test_annotations_keep_their_numbers_where_these_are_unique(roboflow, numbers, expected):
    annotations = [{**one, "id": number} for one, number in zip(document()["annotations"], numbers)]
    truth = read(roboflow(train=document(annotations=annotations))).truth()
    assert [a["id"] for a in truth["annotations"]] == expected


def test_crowds_are_ground_truth_but_not_targets(roboflow):
    crowd = {"id": 3, "image_id": 12, "category_id": 3, "bbox": [0, 0, 30, 30], "iscrowd": 1}
    split = read(roboflow(train=document(annotations=[crowd])))
    assert len(split.objects(1)) == 0
    assert [a["iscrowd"] for a in split.truth()["annotations"]] == [1]


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([5, 5, 0, 10], "without area"),
        ([5, 5, 10, -4], "without area"),
        ([100, 5, 10, 10], "outside"),
        ([math.nan, 5, 10, 10], "not finite"),
        ([5, 5, math.inf, 10], "not finite"),
    ],
)
def test_a_useless_box_is_dropped_with_its_file_and_number(roboflow, caplog, box, kind):
    bad = {"id": 99, "image_id": 11, "category_id": 3, "bbox": box}
    root = roboflow(train=document(annotations=[bad, *document()["annotations"]]))
    with caplog.at_level(logging.WARNING):
        split = read(root)
    assert len(split.objects(0)) == 2
    assert len(split.truth()["annotations"]) == 2
    assert kind in caplog.text
    assert "annotation 99" in caplog.text
    assert str(root / "train") in caplog.text


def test_an_id_that_is_twice_among_the_categories_of_validation_is_refused(roboflow):
    cup, plate = document()["categories"][:2]
    root = roboflow(train=document(), valid=document(categories=[cup, plate | {"id": cup["id"]}]))
    with pytest.raises(ValueError, match="id or name occurs twice"):
        read(root, "val")


def test_instances_files_with_image_folders(tmp_path):
    for split in ("train2017", "val2017"):
        for name in ("a.png", "b.png"):
            write_image(tmp_path / split / name)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(document()))
    content = coco(str(tmp_path), {})
    assert set(content.read) == {"train", "val"}
    assert content.read["val"]().name(0) == str(tmp_path / "val2017" / "a.png")


def test_one_folder_and_one_file_by_name(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "pictures" / name)
    (tmp_path / "all.json").write_text(json.dumps(document()))
    place = {"annotations": "all.json", "images": "pictures"}
    content = coco(str(tmp_path), {"train": place, "val": place, "test": NONE})
    assert len(content.read["train"]()) == len(content.read["val"]()) == 2
    with pytest.raises(ValueError, match=r"data\.val\.images"):
        coco(str(tmp_path), {"train": place, "val": {**place, "images": "nowhere"}})


def test_a_missing_size_is_read_from_the_image(roboflow):
    images = [{"id": 11, "file_name": "a.png"}, {"id": 12, "file_name": "b.png"}]
    assert read(roboflow(train=document(images=images))).size(0) == (40, 60)


def test_the_heading_of_roboflows_categories_is_dropped(roboflow, caplog):
    root = {"id": 0, "name": "objects", "supercategory": "none"}
    categories = [root, *({**c, "supercategory": "objects"} for c in CATEGORIES)]
    with caplog.at_level(logging.INFO):
        content = coco(str(roboflow(train=document(categories=categories))), {})
    assert [c.id for c in content.categories] == [3, 7]
    assert "'objects'" in caplog.text


@pytest.mark.parametrize("unused", [1, 2, None])
@pytest.mark.parametrize("classes", [["fish"], ["fish", "trap"], ["trap", "fish", "none"]])
def test_a_heading_may_have_the_name_of_a_class(roboflow, classes, unused):
    root = [{"id": 0, "name": "fish", "supercategory": "none"}]
    categories = root + [{"id": i, "name": name, "supercategory": "fish"} for i, name in enumerate(classes, 1)]
    used = [i for i in range(1, len(categories)) if i != unused]
    annotations = [{"id": i, "image_id": 11, "category_id": i, "bbox": [1, 1, 9, 9 + i]} for i in used]
    content = document(categories=categories, annotations=annotations)
    made = coco(str(roboflow(train=content, valid=content)), {})
    assert [(c.id, c.name) for c in made.categories] == list(enumerate(classes, 1))
    assert made.read["val"]().objects(0).categories.tolist() == used


def test_official_categories_head_nothing(roboflow):
    categories = [
        {"id": 3, "name": "ball", "supercategory": "ball"},
        {"id": 7, "name": "cup", "supercategory": "None"},
        {"id": 9, "name": "none", "supercategory": "none"},
    ]
    assert len(coco(str(roboflow(train=document(categories=categories, annotations=[]))), {}).categories) == 3


def test_duplicates_are_reported(roboflow, caplog):
    first = document()["annotations"][0]
    images = [*document()["images"], {**document()["images"][1], "id": 13}]
    again = [{**first, "id": 5}, {**first, "id": 6, "category_id": 3}, {**first, "id": 7, "image_id": 12}]
    with caplog.at_level(logging.WARNING):
        split = read(roboflow(train=document(images=images, annotations=[*document()["annotations"], *again])))
    assert len(split.objects(0)) == 4
    assert "annotated twice, with the same class and box; all of them are used (1)" in caplog.text
    assert "annotation 1, 2 times" in caplog.text
    assert "listed more than once" in caplog.text
    assert f"{split.name(1)}: 2 times" in caplog.text


def test_points_in_another_order_are_refused(roboflow):
    def content(points: list[str]) -> dict:
        annotations = [{**document()["annotations"][0], "keypoints": [12, 6, 2, 14, 7, 2]}]
        return document(categories=[{"id": 7, "name": "cup", "keypoints": points}], annotations=annotations)

    root = roboflow(train=content(["left", "right"]), valid=content(["right", "left"]))
    with pytest.raises(ValueError, match="the order that they have in the training file"):
        read(root, "val")


def test_two_folders_of_one_split_are_refused(roboflow):
    with pytest.raises(ValueError, match="choose one"):
        coco(str(roboflow(train=document(), valid=document(), val=document())), {})


def test_a_heading_that_objects_have_stays(roboflow):
    categories = [{"id": 3, "name": "ball"}, {"id": 7, "name": "cup", "supercategory": "ball"}]
    content = coco(str(roboflow(train=document(categories=categories))), {})
    assert [c.id for c in content.categories] == [3, 7]


def test_validation_categories_are_mapped_by_name(roboflow):
    other = document(categories=[{"id": 7, "name": "ball"}, {"id": 1, "name": "cup"}])
    other["annotations"][0]["category_id"] = 1
    other["annotations"][1]["category_id"] = 7
    split = read(roboflow(train=document(), valid=other), "val")
    assert split.objects(0).categories.tolist() == [7, 3]
    assert {c["id"]: c["name"] for c in split.truth()["categories"]} == {3: "ball", 7: "cup"}


def test_all_mistakes_are_reported_at_once(roboflow):
    annotations = [
        {"id": 1, "image_id": 404, "category_id": 7, "bbox": [1, 1, 2, 2]},
        {"id": 2, "image_id": 11, "category_id": 5, "bbox": [1, 1, 2, 2]},
        {"id": 3, "image_id": 11, "category_id": 7, "bbox": [1, 1, 2]},
        {"id": 4, "image_id": [], "category_id": 7, "bbox": [1, 1, 2, 10**400]},
        "five",
    ]
    images = [*document()["images"], {"id": 13, "file_name": "gone.png", "width": 4, "height": 4}, {"id": "x"}]
    with pytest.raises(ValueError, match="7 problems") as error:
        read(roboflow(train=document(annotations=annotations, images=images)))
    for part in ("404", "category 5", "[1, 1, 2]", "gone.png", "annotation number 5", "annotation 4", "'x'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images"),
        ({"categories": []}, "no categories"),
        ({"images": []}, "no images|no image"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "twice"),
        ({"categories": [{"id": "3", "name": "a"}]}, "integer id"),
        ({"images": [{"id": 11, "file_name": "a.png"}, {"id": 11, "file_name": "b.png"}]}, "twice"),
        ({"images": [{"id": 11, "file_name": "a.png", "width": 0, "height": 40}], "annotations": []}, "size"),
        ({"images": [{"id": 11, "file_name": "a.png", "width": math.inf, "height": 4}], "annotations": []}, "size"),
        ({"images": [{"id": 11, "file_name": "../../x.png", "width": 4, "height": 4}], "annotations": []}, "x.png"),
    ],
)
def test_a_broken_document_is_refused_with_its_path(roboflow, changes, message):
    root = roboflow(train=document(**changes))
    with pytest.raises(ValueError, match=message) as error:
        data_set(root).split("train")
    assert str(root) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"images": 1}', "\x00", "[" * 100_000])
def test_what_is_no_coco_file_is_refused(roboflow, text):
    with pytest.raises(ValueError, match=r"_annotations\.coco\.json"):
        read(roboflow(train=text))


def test_a_byte_order_mark_is_fine(roboflow):
    assert len(read(roboflow(train="\ufeff" + json.dumps(document())))) == 2


def test_images_must_stay_in_the_folder(roboflow, tmp_path_factory):
    outside = write_image(tmp_path_factory.mktemp("outside") / "secret.png")
    root = roboflow(train=document())
    (root / "train" / "a.png").unlink()
    (root / "train" / "a.png").symlink_to(outside)
    with pytest.raises(ValueError, match="extra_roots"):
        read(root)
    allowed = coco(str(root), {}, extra_roots=[str(outside.parent)])
    assert len(allowed.read["train"]()) == 2


def test_a_missing_training_file_lists_what_exists(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"photos/.*data\.train\.annotations"):
        coco(str(tmp_path), {})
    with pytest.raises(ValueError, match=r"data\.root"):
        coco(str(tmp_path / "nowhere"), {})


def test_segmentations_that_cannot_be_used_become_the_box(roboflow, caplog):
    kinds = [
        [[10, 5, 30, 5, 30, 15]],
        [[1, 2]],
        {"size": [40, 60], "counts": [1, 2]},
        {"size": [40, 60], "counts": [0, 40, 2360]},
        [[1, 2, math.nan, 4, 5, 6]],
        [],
    ]
    annotations = [
        {"id": i + 1, "image_id": 11, "category_id": 7, "bbox": [10, 5, 20, 10], "segmentation": kind}
        for i, kind in enumerate(kinds)
    ]
    with caplog.at_level(logging.WARNING):
        split = read(roboflow(train=document(annotations=annotations)))
    segments = split.objects(0).segments
    assert [s is None for s in segments] == [False, True, True, False, True, True]
    assert "(3): annotation 2; annotation 3; annotation 5" in caplog.text
    assert all(a["segmentation"] for a in split.truth()["annotations"])


def test_a_far_vertex_is_brought_near(roboflow):
    annotation = {**document()["annotations"][0], "segmentation": [[10, 5, 3e8, 5, 30, 15]]}
    split = read(roboflow(train=document(annotations=[annotation])))
    assert max(split.objects(0).segments[0][0]) <= 120


def test_keypoints_follow_their_category(roboflow):
    categories = [{"id": 7, "name": "cup", "keypoints": ["rim", "foot"], "skeleton": [[1, 2]]}, CATEGORIES[1]]
    annotations = [
        {**document()["annotations"][0], "keypoints": [12, 6, 2, 99, 99, 0]},
        document()["annotations"][1],
    ]
    split = read(roboflow(train=document(categories=categories, annotations=annotations)))
    np.testing.assert_array_equal(split.objects(0).keypoints, [[[12, 6, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
    truth = split.truth()
    assert truth["annotations"][0]["keypoints"] == [12, 6, 2, 0, 0, 0]
    assert truth["annotations"][0]["num_keypoints"] == 1
    assert truth["annotations"][1]["keypoints"] == []
    annotations[0]["keypoints"] = [1, 2, 2]
    with pytest.raises(ValueError, match="1 keypoints, its category 2"):
        read(roboflow(train=document(categories=categories, annotations=annotations)))


def test_keypoints_without_names_are_counted(roboflow):
    annotations = [{**document()["annotations"][0], "keypoints": [12, 6, 2, 14, 7, 1]}]
    content = coco(str(roboflow(train=document(annotations=annotations))), {})
    assert [c.keypoints for c in content.categories] == [[], ["0", "1"]]


def test_bccd_names_its_two_boxes_without_area(real_data, caplog):
    with caplog.at_level(logging.WARNING):
        content = coco(str(real_data / "bccd_coco"), {})
        sizes = {name: len(read()) for name, read in content.read.items()}
    assert sizes == {"train": 205, "val": 87, "test": 72}
    assert "annotation 2288: 0x0" in caplog.text
    assert "annotation 887: 0x0" in caplog.text
    assert len(caplog.records) == 2


def test_a_person_file_has_masks_and_keypoints(real_data):
    place = {"annotations": "person_keypoints.json", "images": "."}
    split = read(real_data / "coco_person", train=place)
    assert split.has_masks
    assert split.keypoints.shape[1:] == (17, 3)
    raw = json.loads((real_data / "coco_person" / "person_keypoints.json").read_text())
    by_box = {tuple(a["bbox"]): a for a in raw["annotations"]}
    for annotation in split.truth()["annotations"]:
        original = by_box[tuple(annotation["bbox"])]
        assert annotation["area"] == original["area"]
        assert annotation["keypoints"] == original["keypoints"]
        assert annotation["segmentation"] == original["segmentation"]
