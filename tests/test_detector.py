"""A checkpoint in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import detr_exp
from detr_exp.detector import Detector, _without_downloads, load


@pytest.fixture
def detector(trained: Path) -> Detector:
    return load(trained)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_best_weights_of_a_run_are_meant(trained: Path, detector: Detector) -> None:
    assert detector.path.name == "checkpoint_best_total.pth"
    assert not detector.network.training
    assert detector.classes == ["arrow", "kite", "house", "heart", "crescent", "figure"]
    saved = torch.load(detector.path, weights_only=True)
    assert all(torch.equal(tensor, saved["model"][name]) for name, tensor in detector.network.state_dict().items())
    assert detector.threshold == saved["metrics"]["F1_threshold"]


def test_a_training_checkpoint_gives_its_averaged_weights(trained: Path) -> None:
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    network = load(trained / "checkpoint.pth").network
    name, average = next(iter(state["ema"]["average"].items()))
    assert torch.equal(network.state_dict()[name], average)
    assert not torch.equal(state["model"][name], average)


def test_paths_pictures_and_arrays_are_the_same(detector: Detector, tmp_path: Path) -> None:
    pixels = noise(50, 80)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels]
    for found in detector.predict(given, threshold=0.0):
        single = detector.predict(pixels, threshold=0.0)[0]
        assert torch.allclose(found.boxes, single.boxes, atol=1e-3)
        assert torch.allclose(found.scores, single.scores, atol=1e-5)


def test_boxes_are_in_pixels_of_each_picture(detector: Detector) -> None:
    small, large = detector.predict([noise(40, 20), np.tile(noise(40, 20), (3, 5, 1))], threshold=0.0)
    assert len(small) > 0
    assert small.boxes[:, [0, 2]].max() <= 20
    assert small.boxes[:, [1, 3]].max() <= 40
    assert large.boxes[:, 2].max() > 40


def test_the_threshold(detector: Detector) -> None:
    every = detector.predict(noise(32, 32), threshold=0.0)[0]
    middle = float(every.scores.median())
    assert (detector.predict(noise(32, 32), threshold=middle)[0].scores > middle).all()
    detector.threshold = middle
    assert len(detector.predict(noise(32, 32))[0]) < len(every)


def test_nothing_in_nothing_out(detector: Detector) -> None:
    assert detector.predict([]) == []


@pytest.mark.parametrize("array", [np.zeros((8, 8)), np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8)])
def test_arrays_that_are_no_pictures(detector: Detector, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\[H, W, 3\] uint8"):
        detector.predict(array)


def test_the_package_opens_checkpoints(trained: Path) -> None:
    assert isinstance(detr_exp.load(trained), Detector)
    with pytest.raises(AttributeError, match="laod"):
        detr_exp.laod  # noqa: B018


def test_a_checkpoint_cannot_allow_itself_anything(trained: Path, tmp_path: Path) -> None:
    state = torch.load(trained / "checkpoint_best_total.pth", weights_only=True)
    state["config"]["allow_targets"] = ["os"]
    state["config"]["model"] = {"_target_": "os.mkdir", "path": str(tmp_path / "made"), "weights": None}
    torch.save(state, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"model\._target_ is os\.mkdir"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_no_weights_are_fetched_for_a_network_that_has_its_own() -> None:
    node: dict[str, Any] = {"weights": "hub", "backbone": {"pretrained": True, "depth": 18}, "sizes": [1]}
    assert _without_downloads(node) == {"weights": None, "backbone": {"pretrained": False, "depth": 18}, "sizes": [1]}
