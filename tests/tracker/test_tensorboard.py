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


def test_what_was_swept_is_a_hyperparameter(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    tracker = Tracker(tracking_uri=None, project="p", run=None, tensorboard=True, wandb=False)
    words = ["optim.lr=1e-4", "loss=focal"]
    tracker.start(run_dir=tmp_path, config={"optim": {"lr": 1e-4}}, choices={"loss": "focal"}, overrides=words)
    tracker.log(1, {"val/mAP": 0.5, "val/mAP_large": -1.0})
    tracker.log(1, {"best/mAP": 0.5})
    tracker.finish()
    found = events(tmp_path)
    assert "val/mAP_large" not in found.Tags()["scalars"], "no large objects, no value"
    contents = found.PluginTagToContent("hparams")
    given = {name: HParamsPluginData.FromString(text) for name, text in contents.items()}
    start = given["_hparams_/session_start_info"].session_start_info
    assert start.hparams["optim.lr"].number_value == 1e-4
    assert start.hparams["loss"].string_value == "focal"
    assert [info.name.tag for info in given["_hparams_/experiment"].experiment.metric_infos] == ["best/mAP"]
