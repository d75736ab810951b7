"""One Python file and one YAML file add a backbone, a decoder or a loss; nothing of the package is touched.

The folder `family` adds everything at once: a network, what it is trained with, and the data it is trained on.
"""

from __future__ import annotations

import importlib.util
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp import build, check_data, compare, evaluate, export, predict, train
from detr_exp.config.compose import compose
from detr_exp.runs.past import PastRun
from detr_exp.structures import leaves
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.batch_size import worst_case_batch
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

PARTS = '''
import torch
from torch import nn
from torch.nn import functional as F

from detr_exp.model.decoder.rtdetr import RawOutputs
from detr_exp.structures import Prediction

class Pyramid(nn.Module):
    """Three strided convolutions."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 2, 2) for _ in range(3))
        self.out_channels, self.out_strides = [width] * 3, [8, 16, 32]
        self.pixel_mean, self.pixel_std = [0.5] * 3, [0.5] * 3

    def forward(self, images):
        maps, out = self.stem(images), []
        for stage in self.stages:
            maps = stage(maps).relu()
            out.append(maps)
        return out

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        pass


class Rows(nn.Module):
    """Every query reads one cell of the coarsest map, and says what it is."""

    def __init__(
        self, *, num_classes, activation, channels, strides, hidden_dim, num_layers, num_queries, denoising, gain
    ) -> None:
        super().__init__()
        self.strides, self.num_queries, self.gain = strides[-1:], num_queries, gain
        self.project = nn.Linear(channels[-1], hidden_dim)
        self.score = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(num_layers))
        self.box = nn.ModuleList(nn.Linear(hidden_dim, 4) for _ in range(num_layers))

    def forward(self, maps, noisy, padding_mask):
        cells = self.gain * self.project(maps[-1].flatten(2).transpose(1, 2))[:, : self.num_queries]
        count = len(self.score) if self.training else 1
        logits = torch.stack([head(cells) for head in self.score[-count:]])
        boxes = torch.stack([head(cells).sigmoid() for head in self.box[-count:]])
        return RawOutputs(Prediction(logits, boxes), Prediction(logits[0], boxes[0]))

    def class_tensors(self):
        return {name: 0 for name, _ in self.named_parameters() if name.startswith("score.")}

    def drop_training_parts(self):
        pass


def squared(logits, labels, quality, *, num_classes, power):
    target = F.one_hot(labels, num_classes + 1)[:, :num_classes].float()
    return (logits.sigmoid() - target).abs() ** power
'''
BACKBONE = "_target_: my_parts.Pyramid\nwidth: 16\n"
DECODER = """
# @package model
gain: 1.0
decoder:
  _target_: my_parts.Rows
  _partial_: true
  gain: ${model.gain}
""".lstrip()
LOSS = """
defaults:
  - terms: detr
  - _self_
activation: sigmoid
power: 2.0
class_loss:
  _target_: my_parts.squared
  _partial_: true
  power: ${loss.power}
"""


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_parts.py").write_text(PARTS)
    for group, text in (("model/backbone", BACKBONE), ("model/decoder", DECODER), ("loss", LOSS)):
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / "mine.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "my_conf"
    sys.modules.pop("my_parts", None)


def test_a_backbone_and_a_loss_of_ones_own(
    command: Callable[..., int], tiny_run: list[str], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config-dir", str(extension), *tiny_run, "model/backbone=mine", "loss=mine", "loss.power=3.0"]
    assert command(train.main, *words) == 2
    assert "allow_targets=[my_parts]" in capfd.readouterr().err
    assert command(train.main, *words, "allow_targets=[my_parts]") == 0
    assert list(Path("outputs").glob("*/*/checkpoint_best_total.pth"))


def test_a_decoder_of_ones_own(
    command: Callable[..., int], tiny_run: list[str], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = [word for word in tiny_run if not word.startswith(("model.num_heads", "model.dim_feedforward"))]
    words = ["--config-dir", str(extension), *plain, "model/decoder=mine", "model.num_queries=3"]
    words += ["model.num_layers=2", "model.num_denoising=0", "model.gain=0.5", "allow_targets=[my_parts]"]
    assert command(train.main, *words) == 0
    assert list(Path("outputs").glob("*/*/checkpoint_best_total.pth"))
    assert command(train.main, *words, "model.look_forward_twice=false") == 2
    assert "look_forward_twice" in capfd.readouterr().err, "what only another decoder reads is no key of this one"


def test_a_decoder_that_does_not_take_what_it_is_told(
    command: Callable[..., int], tiny_run: list[str], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (extension / "model/decoder/mine.yaml").write_text("_target_: my_parts.Rows\n_partial_: true\nwidth: 3\n")
    plain = [word for word in tiny_run if not word.startswith(("model.num_heads", "model.dim_feedforward"))]
    words = ["--config-dir", str(extension), *plain, "model/decoder=mine", "allow_targets=[my_parts]"]
    assert command(train.main, *words) == 2
    said = capfd.readouterr().err
    assert "model.decoder" in said
    assert "width" in said


def test_mistakes_name_ones_own_options_too(
    command: Callable[..., int], extension: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(train.main, "--config-dir", str(extension), "loss=mine", "loss.powr=1") == 2
    assert "did you mean loss.power?" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------- a whole family

ALLOWED = ["allow_targets=[edge_detr]", "trainer/hardware=cpu"]


class Family:
    """A copy of `family` outside of the package, with scenes to learn and a finished run.

    Attributes:
        conf: its options.
        scenes: an SQLite file.
        run: the folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        shutil.copytree(Path(__file__).parent / "family", folder, dirs_exist_ok=True)
        self.conf, self.scenes, self.run = folder / "conf", folder / "scenes.sqlite", folder / "run"
        self.data = [f"data.root={self.scenes}", "allow_targets=[edge_detr]"]
        self.words = [
            *("experiment=edge_detr", *self.data, "tracker=none", "trainer/hardware=cpu", "trainer.hardware.amp=null"),
            *("trainer.batch_size=4", "trainer.epochs=2", "trainer.num_pictures=1", "trainer.log_every_steps=1"),
            *("trainer.checkpoint_every_steps=1", "trainer.compute_val_loss=true", "trainer.progress_bar=none"),
        ]

    def train(self, folder: Path, *words: str) -> Path:
        train_in(folder, compose([*self.words, *words], config_dir=self.conf))
        return folder


def draw_scenes(path: Path) -> None:
    """Twelve grey images with up to two bright or dark rectangles, which are as sharp as they are large."""
    from edge_detr.data import SCHEMA

    rng = np.random.default_rng(0)
    with closing(sqlite3.connect(path)) as file, file:
        file.executescript(SCHEMA)
        file.executemany("INSERT INTO class VALUES (?, ?)", [(3, "bright"), (5, "dark")])
        for number in range(100, 112):
            rgb = np.full((48, 64, 3), 128, np.uint8)
            for category in rng.permutation([3, 5])[: number % 3].tolist():
                (width, height), share = rng.integers(12, 24, 2).tolist(), rng.random(2)
                x, y = (share * (64 - width, 48 - height)).astype(int).tolist()
                rgb[y : y + height, x : x + width] = 255 if category == 3 else 0
                row = (number, category, x, y, x + width, y + height, width * height / 24**2)
                file.execute("INSERT INTO object VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            split = "train" if number < 108 else "val"
            file.execute("INSERT INTO image VALUES (?, ?, ?, ?, ?)", (number, split, 48, 64, rgb.tobytes()))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    with pytest.MonkeyPatch.context() as patch:
        made = Family(tmp_path_factory.mktemp("family"))
        patch.syspath_prepend(made.conf.parent)
        draw_scenes(made.scenes)
        made.train(made.run)
        yield made
    for name in [name for name in sys.modules if name.partition(".")[0] == "edge_detr"]:
        del sys.modules[name]


def test_a_familys_field_arrives_at_its_term_in_every_layer(family: Family) -> None:
    logged = {name for line in PastRun.load(family.run).lines for name in line}
    assert {
        "val/recall",
        "train/loss_edges",
        "train/loss_edges_aux_0",
        "val/loss_edges",
        "train/loss_giou_aux_0",
    } <= logged
    assert "mAP" not in " ".join(logged)


def test_what_the_source_says_of_an_object_weighs_its_loss_after_augmentation(family: Family) -> None:
    """Sharpness is the area of an object here, which flips and shifts that cut nothing leave alone."""
    cfg = compose(family.words, config_dir=family.conf)
    data, network = build.data(cfg), build.network(cfg)
    criterion = build.criterion(cfg, data)
    loader = data.loader("train", network=network, batch_size=8, seed=0, training=True)
    seen = shifted = 0
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        (batch,) = loader
        targets = batch.targets
        area = targets.boxes[:, 2:].prod(1) * (64 * 48) / 24**2
        whole = ((targets.boxes[:, :2] - targets.boxes[:, 2:] / 2 > 0.02) & (targets.boxes[:, :2] < 0.98)).all(1)
        whole &= ((targets.boxes[:, :2] + targets.boxes[:, 2:] / 2) < 0.98).all(1)
        torch.testing.assert_close(targets.extra["sharpness"][whole], area[whole])
        seen += int(whole.sum())
        shifted += sum(bool((image == 0).all(-1).all(0).any()) for image in batch.images)
    assert seen > 8
    assert shifted, "some images were moved, and black came in"
    outputs = network.train()(batch.pixels())
    before = criterion(outputs, targets, num_boxes=len(targets))
    targets.extra["sharpness"] *= 3
    after = criterion(outputs, targets, num_boxes=len(targets))
    for name, value in before.items():
        if name != "total":
            torch.testing.assert_close(after[name], value * (3 if "edges" in name else 1))


def test_memory_is_measured_with_what_the_source_says(family: Family, tmp_path: Path) -> None:
    run = build.run(compose(family.words, config_dir=family.conf), tmp_path)
    targets = worst_case_batch(run, run.network, 3, 50).targets
    assert len(targets.extra["sharpness"]) == len(targets) == 3 * run.data.train.most_objects
    assert (targets.extra["sharpness"] > 0).all()


def test_a_family_goes_on_bit_by_bit(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3]
    step = Trainer.train_step

    def die(*args: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            family.train(tmp_path / "ended")
    assert files.load(tmp_path / "ended" / files.NEWEST)["step"] == 2
    family.train(tmp_path / "ended", "trainer.resume=auto")
    whole, resumed = (files.load(run / files.NEWEST) for run in (family.run, tmp_path / "ended"))
    for part in ("model", "ema", "optimizer"):
        pairs = list(zip(leaves(whole[part]), leaves(resumed[part]), strict=True))
        assert pairs, part
        assert all(torch.equal(one, two) for one, two in pairs)


def test_a_familys_data_are_inspected(
    command: Callable[..., int], family: Family, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config-dir", str(family.conf), "data=database", *family.data, "hydra.run.dir=checked", "pictures=4"]
    assert command(check_data.main, *words) == 0
    assert "training can start" in capfd.readouterr().out
    assert Path("checked/training_samples.png").exists()


def test_a_family_is_evaluated_and_predicts(
    command: Callable[..., int], family: Family, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(evaluate.main, f"checkpoint={family.run}", *ALLOWED) == 0
    assert "recall" in capfd.readouterr().out
    Image.new("RGB", (80, 60), "grey").save("grey.png")
    words = ["source=grey.png", "threshold=0", "hydra.run.dir=found"]
    assert command(predict.main, f"checkpoint={family.run}", *words, *ALLOWED) == 0
    assert Path("found/detections.json").stat().st_size > 100


def test_an_adapter_of_a_family_trains_what_it_adds(
    command: Callable[..., int], family: Family, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["model/adapter=gains", f"model.weights={family.run / files.BEST_TOTAL}", "optim.lr=0.05"]
    adapted = family.train(Path("adapted").resolve(), *words)
    own, base = (files.load(run / files.BEST_TOTAL)["model"] for run in (adapted, family.run))
    gains = {name: tensor for name, tensor in own.items() if name.endswith(".gain")}
    assert len(gains) == 2
    assert all((tensor != 1).any() for tensor in gains.values())
    assert not set(own) & {name for name in base if "keys" in name}
    assert command(compare.main, f"a={family.run}", f"b={adapted}", *ALLOWED) == 0
    assert "a  recall" in capfd.readouterr().out


@pytest.mark.parametrize("form", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_family_is_exported(
    command: Callable[..., int], family: Family, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    if form == "onnx" and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("needs the packages of the extra export")
    assert command(export.main, f"checkpoint={family.run}", f"format={form}", "hydra.run.dir=made", *ALLOWED) == 0
    assert "recall on val: checkpoint" in capfd.readouterr().out, "the gate asks the family's own evaluator"
    assert list(Path("made").glob("model.*"))
