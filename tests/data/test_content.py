"""Extra fields of objects and images, beside those of every source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from detr_exp.data.content import Objects
from detr_exp.structures import Target, Targets


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"extra": {"weight": np.ones(3)}}, r"2 objects, but 'weight' of the shape \[3\]; give it one row for each"),
        ({"extra": {"weight": np.float64(1)}}, "'weight' that is no array"),
        ({"extra": {"weight": np.array(1.0)}}, r"'weight' of the shape \[\]"),
        ({"extra": {"weight": [1.0, 2.0]}}, "'weight' that is no array"),
        ({"extra": {"owner": np.array(["a", "b"])}}, "'owner' that is no array of numbers"),
        ({"extra": {"masks": np.ones(2)}}, "a second field 'masks'"),
        ({"extra": {"a": np.ones(2)}, "image_extra": {"a": np.ones(2)}}, "a second field 'a'"),
        ({"image_extra": {"when": np.array("noon")}}, "'when' that is no array of numbers"),
    ],
)
def test_fields_that_cannot_be_those_of_objects(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Objects(np.zeros(2, np.int64), np.zeros((2, 4)), **fields)


def target(count: int, *shape: int, **image_extra: torch.Tensor) -> Target:
    extra = {"weight": torch.arange(float(count)).reshape(-1, *[1] * len(shape)).expand(-1, *shape)}
    return Target(torch.arange(count), torch.zeros(count, 4), extra=extra, image_extra=image_extra)


def test_they_are_packed_selected_and_moved_with_their_objects() -> None:
    parts = [target(3, 2, hour=torch.tensor(8)), target(0, 2, hour=torch.tensor(9))]
    packed = Targets.pack([parts[0].kept(torch.tensor([True, False, True])), parts[1]])
    assert packed.labels.tolist() == packed.extra["weight"][:, 0].tolist() == [0, 2]
    assert packed.image_extra["hour"].tolist() == [8, 9]
    assert packed.to(torch.device("meta")).image_extra["hour"].is_meta


def test_a_batch_of_images_that_differ_in_their_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="some images have hour and others have not"):
        Targets.pack([target(1, hour=torch.tensor(8)), target(1)])
    with pytest.raises(ValueError, match="'weight' has not the same shape in all images"):
        Targets.pack([target(1, 2), target(1, 3)])
