"""TensorBoard files of a run, read back."""

import pytest

pytest.importorskip("tensorboard")

from PIL import Image

from detr_exp.tracker.tracker import Tracker


def start(run_dir, **settings) -> Tracker:
    tracker = Tracker(tracking_uri=None, project="p", run=None, tensorboard=True, wandb=False)
    tracker.start(run_dir=run_dir, config={"seed": 0}, **settings)
    return tracker


def events(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_a_resumed_run_has_every_step_once(tmp_path):
    first = start(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step), "bad": float("nan")})
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    first.image(tmp_path / "p.png", "predictions", 1)
    first.finish("killed")
    second = start(tmp_path, resumed=True)
    second.rewind(1)
    second.log(2, {"train/loss": 20.0})
    second.finish()
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert [e.step for e in found.Images("predictions")] == [1]
