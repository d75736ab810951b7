"""Settings around a training: their effect on images, processes, files, terminals and trackers."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp import build, train
from detr_exp.data import loader as loading
from detr_exp.data.sampler import TrainSampler
from detr_exp.model.rtdetrv2 import RTDETRv2
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

ONE_STEP = ("data.train=2", "data.val=1", "trainer.max_steps=1", "trainer.num_pictures=0")


def newest(folder):
    return files.load(folder / files.NEWEST)


@pytest.fixture
def people(tmp_path):
    """A folder of three pictures, two of them to train on."""
    for split, count in (("train", 2), ("valid", 1)):
        folder = tmp_path / "people" / split
        folder.mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "person"}]}
        for i in range(count):
            Image.fromarray(np.full((40, 60, 3), 80 * i, np.uint8)).save(folder / f"{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.png", "width": 60, "height": 40})
            content["annotations"].append(
                {"id": i + 1, "image_id": i, "category_id": 5, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 0}
            )
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return tmp_path / "people"


def test_root_and_image_size_decide_the_input_of_the_network(small, people, tmp_path, monkeypatch):
    shown = []
    step = Trainer.train_step

    def note(self, run, state, window):
        shown.extend((tuple(batch.images.shape), sorted(batch.image_ids)) for batch in window)
        return step(self, run, state, window)

    monkeypatch.setattr(Trainer, "train_step", note)
    words = ("data=auto", f"data.root={people}", "data.num_workers=0", "model.image_size=[96,64]", "trainer.epochs=1")
    train_in(tmp_path / "run", small(*words))
    assert shown == [((2, 96, 64, 3), [0, 1])]
    saved = newest(tmp_path / "run")
    assert (saved["classes"], saved["category_ids"]) == (["person"], [5])


@pytest.fixture
def loaders(small, tmp_path, monkeypatch):
    """Overrides -> the loaders of a run of two epochs, its workers, and the batches loaded before each step."""

    def run(*words):
        made, drawn, counts = [], [], []
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        keys, step = TrainSampler.__iter__, Trainer.train_step

        class Seen(loading.DataLoader):
            def __init__(self, *args, **settings):
                super().__init__(*args, **settings)
                made.append(self)

        begin = loading._begin

        def sign(worker):
            begin(worker)
            if torch.utils.data.get_worker_info().dataset.augment is not None:
                (folder / f"worker-{os.getpid()}").touch()

        def count(self):
            for key in keys(self):
                drawn.append(key)
                yield key

        def note(self, run, state, window):
            counts.append(len(drawn))
            return step(self, run, state, window)

        monkeypatch.setattr(loading, "DataLoader", Seen)
        monkeypatch.setattr(loading, "_begin", sign)
        monkeypatch.setattr(TrainSampler, "__iter__", count)
        monkeypatch.setattr(Trainer, "train_step", note)
        usual = ("data.train=12", "data.val=1", "trainer.eval_interval=2", "trainer.num_pictures=0")
        train_in(folder, small(*usual, *words))
        monkeypatch.undo()
        return SimpleNamespace(train=made[0], val=made[-1], workers=len(list(folder.glob("worker-*"))), drawn=counts)

    return run


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_worker_processes_and_what_they_prepare(loaders):
    none = loaders("data.num_workers=0", "data.pin_memory=true", "trainer.eval_batch_size=3", "data.val=4")
    assert (none.workers, none.drawn) == (0, list(range(1, 13)))
    assert none.train.pin_memory, "what it brings needs a GPU"
    assert none.train.batch_sampler.batch_size == 2
    assert len(next(iter(none.val.batch_sampler))) == 3
    kept = loaders("data.num_workers=2", "data.prefetch_factor=2")
    assert kept.workers == 2, "the same for both epochs"
    assert kept.drawn[0] == 2 * 2 + 1
    anew = loaders("data.num_workers=1", "data.persistent_workers=false", "data.prefetch_factor=4")
    assert anew.workers == 2, "one for each epoch"
    assert anew.drawn[0] == 4 + 1
    assert not kept.train.pin_memory or torch.cuda.is_available()


def test_precision_of_training_and_evaluation(small, tmp_path, monkeypatch):
    seen = set()
    body = RTDETRv2.body

    def note(self, *args):
        enabled = torch.is_autocast_enabled("cpu")
        seen.add((self.training, torch.get_autocast_dtype("cpu") if enabled else None))
        return body(self, *args)

    monkeypatch.setattr(RTDETRv2, "body", note)
    train_in(tmp_path / "one", small(*ONE_STEP, "trainer.hardware.eval_amp=bf16"))
    assert seen == {(True, None), (False, torch.bfloat16)}
    seen.clear()
    train_in(tmp_path / "two", small(*ONE_STEP, "trainer.hardware.amp=bf16"))
    assert seen == {(True, torch.bfloat16), (False, None)}


def test_the_network_goes_to_the_device(small):
    cfg = small("trainer.hardware.device=meta")  # stands for a device this machine does not have
    placed = build.hardware(cfg).place(build.network(cfg))
    assert {parameter.device.type for parameter in placed.parameters()} == {"meta"}


def test_the_run_folder(command, tiny_run):
    assert command(train.main, *tiny_run, "trainer.max_steps=1", "hydra.run.dir=here/and there") == 0
    assert (Path("here/and there") / files.BEST_TOTAL).is_file()


# ------------------------------------------------------------------------------------------------------- what one sees


@pytest.mark.parametrize(
    ("word", "bar"),
    [("rich", "rich"), ("true", "rich"), ("tqdm", "tqdm"), ("none", None), ("false", None), ("null", None)],
)
def test_progress_bars(small, tmp_path, monkeypatch, capsys, word, bar):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    train_in(tmp_path, small(*ONE_STEP, f"trainer.progress_bar={word}"))
    said = capsys.readouterr()
    assert ("━" in said.out) == (bar == "rich"), "the bar"
    assert ("it/s" in said.err) == (bar == "tqdm")


def test_tensorboard_and_wandb_get_what_is_logged(small, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sent: list[tuple[int, dict]] = []
    session = SimpleNamespace(
        step=0,
        summary={},
        log=lambda values, step=None: sent.append((step, values)),
        save=lambda *_, **__: None,
        finish=lambda exit_code: None,
    )
    settings = {}
    wandb = SimpleNamespace(login=lambda prompt: True, Settings=dict, Image=lambda *_, **__: None)
    wandb.init = lambda **given: (settings.update(given), session)[1]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("detr_exp.tracker.tracker.find_spec", lambda name: SimpleNamespace(origin=name))
    words = ("tracker.tensorboard=true", "tracker.wandb=true", "tracker.project=blood", "tracker.run=first")
    train_in(tmp_path, small(*ONE_STEP, *words))
    assert (settings["project"], settings["name"]) == ("blood", "first")
    assert [step for step, values in sent if "train/loss" in values] == [1]
    written = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert written.Scalars("train/loss")[0].value == pytest.approx(sent[0][1]["train/loss"])


def test_a_missing_package_does_not_end_a_run(small, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("detr_exp.tracker.tracker.find_spec", lambda name: None)
    train_in(tmp_path, small(*ONE_STEP, "tracker.tensorboard=true", "tracker.wandb=true"))
    assert all(f"{package} is not installed" in caplog.text for package in ("tensorboard", "wandb"))
    assert newest(tmp_path)["step"] == 1
