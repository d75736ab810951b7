"""Names of the classes that published detectors tell apart; their files have numbers only."""

from __future__ import annotations

from detr_exp.published.table import Entry

# Of COCO, in the order of its category ids from 1; a dash: an id without a category.
COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, backpack, umbrella, -, -,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, dining table, -, -, toilet, -, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, -, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush
"""
POINTS_OF_A_PERSON = 17  # of COCO


def coco() -> dict[int, str]:
    """Category id -> name."""
    names = enumerate(COCO.replace("\n", " ").split(", "), start=1)
    return {number: name.strip() for number, name in names if name.strip() != "-"}


def has_keypoints(entry: Entry) -> bool:
    """Whether the detector predicts those of a person."""
    return entry.published.startswith("keypoint AP")


def classes_of(entry: Entry) -> dict[int, str]:
    """Category id -> name, in the order of the labels; labels without a category are called `unused_<id>`.

    Raises:
        ValueError: nobody has published them, or they are too many to be listed here.
    """
    known = coco()
    if "COCO" in entry.data.split(" + "):
        if has_keypoints(entry) and entry.classes == "91":  # for the keypoints of one of them
            return {1: known[1]}
        if entry.classes == "80":
            return known
        if entry.classes in ("91", "2"):  # labels are category ids; the two are nothing and person
            return {number: known.get(number, f"unused_{number}") for number in range(int(entry.classes))}
    raise ValueError(
        f"the names of the {entry.classes} classes of {entry.title} are not known here; choose weights of COCO, "
        "python -m detr_exp.weights list COCO, or fine-tune these on your data first and give that run"
    )
