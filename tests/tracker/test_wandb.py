"""Weights & Biases by a stand-in for its package: which calls a run makes."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from detr_exp.tracker import tracker as module
from detr_exp.tracker.tracker import Tracker


class FakeRun:
    def __init__(self) -> None:
        self.step = 0
        self.logged: list[tuple[dict, int | None]] = []
        self.summary: dict = {}
        self.exit_code = None

    def log(self, values, step=None) -> None:
        self.logged.append((values, step))

    def save(self, path, base_path, policy) -> None:
        self.saved = path

    def finish(self, exit_code) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    fake = SimpleNamespace(run=FakeRun(), Image=lambda path, caption: (path, caption), Settings=dict)
    fake.login = lambda prompt: True
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def init(**settings):
        fake.settings = settings
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(module, "find_spec", lambda name: SimpleNamespace(origin="wandb/__init__.py"))
    return fake


def test_a_run_is_sent(tmp_path, wandb):
    tracker = Tracker(tracking_uri=None, project="blood", run="first", tensorboard=False, wandb=True)
    tracker.start(run_dir=tmp_path, config={"seed": 0}, choices={"model": "rfdetr"})
    tracker.log(1, {"train/loss": 2.0})
    tracker.log(2, {"train/loss": float("nan"), "val/mAP": 0.5})
    image = tmp_path / "found.png"
    Image.new("RGB", (2, 2)).save(image)
    tracker.image(image, "predictions", 2)
    tracker.finish("failed")
    assert wandb.settings["project"] == "blood"
    assert wandb.settings["name"] == "first"
    assert wandb.settings["id"] == tracker.record.id
    assert wandb.settings["config"] == {"seed": 0, "model": "rfdetr"}
    assert wandb.settings["tags"] == ["model=rfdetr"]
    assert wandb.settings["mode"] is None
    logged = [
        ({k: v for k, v in values.items() if not k.startswith("system/")}, step) for values, step in wandb.run.logged
    ]
    assert logged == [
        ({"train/loss": 2.0}, 1),
        ({"val/mAP": 0.5}, 2),
        ({"predictions": (str(image), "step 2")}, 2),
    ]
    assert wandb.run.summary == {"status": "failed"}
    assert wandb.run.exit_code == 1


def test_a_resumed_run_sends_no_step_again(tmp_path, wandb):
    wandb.run.step = 3
    tracker = Tracker(tracking_uri=None, project="blood", run=None, tensorboard=False, wandb=True)
    tracker.start(run_dir=tmp_path, config={})
    for step in (1, 2, 3, 4):
        tracker.log(step, {"a": 1.0})
    tracker.finish()
    assert [step for _, step in wandb.run.logged] == [3, 4]


def test_without_a_key_there_is_no_prompt(tmp_path, wandb, caplog):
    wandb.login = lambda prompt: False
    tracker = Tracker(tracking_uri=None, project="blood", run=None, tensorboard=False, wandb=True)
    tracker.start(run_dir=tmp_path, config={})
    tracker.finish()
    assert wandb.settings["mode"] == "offline"
    assert "wandb login" in caplog.text
