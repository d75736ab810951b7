"""The review command: one page, whose AP50 is that of `evaluate`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp import review

Command = Callable[..., int]


def content_of(path: str) -> dict:
    page = Path(path).read_text()
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_a_run_on_its_validation_split(command: Command, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(review.main, f"checkpoint={trained}", "hydra.run.dir=page") == 0
    assert "4 images" in capfd.readouterr().out
    content = content_of("page/review.html")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line["val/mAP50"] for line in lines if "val/mAP50" in line]
    assert content["ap50"] == pytest.approx(logged, abs=1e-9)
    assert len(content["images"]) == content["all_images"] == 4
    assert all(image["pixels"].startswith("data:image/jpeg;base64,") for image in content["images"])
    assert sum(len(image["objects"]) for image in content["images"]) > 0
    assert not any(image["seen"] for image in content["images"])


def test_training_images_are_named_as_such_and_a_page_can_be_small(command: Command, trained: Path) -> None:
    words = [f"checkpoint={trained}", "data.split=train", "images=2", "megabytes=0.3", "hydra.run.dir=page"]
    assert command(review.main, *words) == 0
    content = content_of("page/review.html")
    assert (len(content["images"]), content["all_images"]) == (2, 8)
    assert all(image["seen"] for image in content["images"])
    assert Path("page/review.html").stat().st_size < 300_000


def test_several_checkpoints_that_were_trained_on_other_images(command: Command, trained: Path) -> None:
    """Those of one run have seen the same: the first judges all that none is new to."""
    assert command(review.main, f"checkpoint=[{trained},{trained}]", "hydra.run.dir=page") == 0
    content = content_of("page/review.html")
    assert content["judges"] == [str(trained), str(trained)]
    assert {image["judge"] for image in content["images"]} == {0}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "checkpoint"),
        (["checkpoint=absent"], "absent"),
        (["checkpoint=[]"], "checkpoint"),
        (["megabytes=0"], "megabytes"),
    ],
)
def test_mistakes(
    command: Command, trained: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    words = [*([f"checkpoint={trained}"] if words == ["megabytes=0"] else []), *words]
    assert command(review.main, *words) == 2
    assert expected in capfd.readouterr().err
