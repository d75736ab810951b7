"""How much matches count in the class loss, by the class of their object."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from detr_exp.data.dataset import DataSet
from detr_exp.loss.term import Term
from detr_exp.values import Values, is_number

log = logging.getLogger(__name__)
AUTO = "auto"


def class_weights(given: object, data: DataSet) -> list[float] | None:
    """A weight per label from what the configuration says.

    Args:
        given: `loss.class_weights`: a list with a number per label; numbers by the names of classes, 1 for others;
            `auto`: in proportion to `1 / sqrt(objects of the class)`, with a mean of 1 over the training objects; None.
        data: has the classes, and for `auto` the training objects.

    Raises:
        ValueError: another value, a name that no class has, or another number of weights than classes.
    """
    if given is None:
        return None
    if given == AUTO:
        return _balanced(data.object_counts())
    classes, num_classes = data.classes, data.num_classes
    if isinstance(given, Mapping):
        if unknown := [str(name) for name in given if str(name) not in classes]:
            raise ValueError(
                f"loss.class_weights has {', '.join(map(repr, unknown))}, but the classes are "
                f"{', '.join(map(repr, classes))}; use their names: loss.class_weights={{{classes[0]}: 2}}, or a list"
            )
        named = {str(name): value for name, value in given.items()}
        weights = [named.get(name, 1.0) for name in classes]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        weights = list(given)
        if len(weights) != num_classes:
            raise ValueError(
                f"loss.class_weights has {len(weights)} numbers, but there are {num_classes} classes; give one for "
                "each, or some by name: loss.class_weights={name: 2}"
            )
    else:
        raise ValueError(
            f"loss.class_weights is {given!r}; use a list with a number for each class, {{name: number}}, auto, or "
            "null: loss.class_weights=auto"
        )
    for label, weight in enumerate(weights):
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(
                f"loss.class_weights has {weight!r} for class {classes[label]!r}; a weight is a number from 0: "
                f"loss.class_weights={{{classes[label]}: 2}}"
            )
    return [float(weight) for weight in weights]


def refuse_smoothing(loss: Values, data: DataSet) -> None:
    """Refuse a softmax with smoothed targets where images have no annotations of some classes.

    Args:
        loss: the settings of the group.
        data: has the images.

    Raises:
        ValueError: smoothing would give classes a target that may be there unannotated.
    """
    smoothed = loss["activation"] == "softmax" and loss.get("label_smoothing")
    if smoothed and data.train.objects(0).annotated is not None:
        raise ValueError(
            f"loss.label_smoothing is {loss['label_smoothing']}, but some classes are annotated in some sets only, "
            "and a softmax spreads the target over all: loss.label_smoothing=0, or another loss: loss=vfl"
        )


def warn_of_unlearned(terms: Mapping[str, Term | None], data: DataSet) -> None:
    """Warn of classes without keypoints where nothing but keypoints says where an object is."""
    places = [term for name, term in terms.items() if name != "class" and term is not None and term.weight is not None]
    by_points = bool(places) and all("keypoints" in term.needs_targets for term in places)
    if by_points and data.keypoints is not None:
        without = [repr(name) for name, count in zip(data.classes, data.keypoints.counts) if not count]
        if without:
            log.warning(
                "%s: %s have no keypoints, and these losses learn places from keypoints only: such objects are not "
                "learned; model=rfdetr_keypoint learns them, too",
                data.content.origin,
                ", ".join(without),
            )


def _balanced(counts: Sequence[int]) -> list[float]:
    """`1 / sqrt(n)`, scaled to a mean of 1 over all objects; a class without objects has the weight of one object."""
    raw = [1 / math.sqrt(max(1, count)) for count in counts]
    total = sum(count * weight for count, weight in zip(counts, raw))
    return [weight * sum(counts) / total if total else 1.0 for weight in raw]
