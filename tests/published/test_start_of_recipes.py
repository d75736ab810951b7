"""From a name over a network into a training: files in the layouts of their authors, and the README's lines."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_exp import build, predict, train
from detr_exp.config.compose import compose
from detr_exp.model.pretrained_rtdetr import to_official

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def recipe(name: str, *words: str) -> Any:
    return compose([f"experiment={name}", "model.backbone.pretrained=false", *words])


def as_published(name: str, *words: str) -> tuple[Any, dict[str, Any]]:
    """A network of a recipe with random weights, and its file in the layout of RT-DETR's authors."""
    cfg = recipe(name, "model.weights=null", "data.num_classes=80", *words)
    torch.manual_seed(1)
    network = build.network(cfg).eval()
    height, width = network.image_size
    shapes = [(height // stride, width // stride) for stride in (8, 16, 32)]
    version = 1 if name.startswith("rtdetr_") else 2
    state = to_official(network.state_dict(), num_points=[4, 4, 4], spatial_shapes=shapes, version=version)
    return network, state


SMALL = ("model.image_size=[160,160]",)
LAYOUTS = {
    "averaged": ("rtdetrv2_r18vd_120e_coco", lambda state: {"ema": {"module": state, "updates": 3}, "date": "x"}),
    "averaged beside raw": (
        "rtdetrv2_r18vd_sp1_120e_coco",
        lambda state: {"model": {name: torch.zeros_like(t) for name, t in state.items()}, "ema": {"module": state}},
    ),
    "converted from Paddle": ("rtdetr_r18vd_6x_coco", lambda state: {"ema": {"module": state}}),
    "weights only": ("rtdetrv2_r18vd_dsp_3x_coco", lambda state: state),
    "of several devices": (
        "rtdetrv2_r34vd_120e_coco",
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packed"),
    LAYOUTS.values(),
    ids=LAYOUTS,
)
def test_a_file_in_its_authors_layout_gives_their_numbers_by_name(
    name: str, packed: Callable[[Any], Any], served: Callable[[str, object], None], host: Any
) -> None:
    network, state = as_published(name, *SMALL)
    served(name, packed(state))
    cfg = recipe(name, "model.weights=published", "data.num_classes=80", *SMALL)
    found = build.network(cfg).eval()
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(found(images).pred.logits, network(images).pred.logits)
        assert torch.equal(found(images).pred.boxes, network(images).pred.boxes)
    assert host.transfers() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("Nano", "rfdetr_nano_coco"), ("SegNano", "rfdetr_seg_nano_coco")])
def test_a_file_of_rfdetr_gives_its_numbers_by_name(
    kind: str, name: str, served: Callable[[str, object], None]
) -> None:
    from rfdetr_peer import peer, peer_input

    theirs, config, _ = peer(kind, num_classes=90)
    served(name, {"model": theirs.state_dict(), "args": argparse.Namespace(num_classes=90)})
    cfg = recipe(name, "model.weights=published", "data.num_classes=91")
    found = build.network(cfg).eval()
    images = torch.rand(1, 3, config.resolution, config.resolution)
    with torch.no_grad():
        wanted = theirs.eval()(peer_input(found, images))
        pred = found(images).pred
    torch.testing.assert_close(pred.logits, wanted["pred_logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pred.boxes, wanted["pred_boxes"], atol=1e-4, rtol=1e-4)


def yolo(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "valid"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "labels").mkdir()
        for number in range(2):
            pixels = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / "images" / f"{number}.jpg")
            (folder / split / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.3 0.4\n")
    (folder / "data.yaml").write_text("train: train/images\nval: valid/images\nnames: [thing]\n")
    return folder


@pytest.mark.slow
def test_the_readmes_lines_fine_tune_from_published_weights(
    served: Callable[[str, object], None],
    host: Any,
    command: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As written, but for the number of steps."""
    _, state = as_published("rtdetrv2_r18vd_120e_coco")
    served("rtdetrv2_r18vd_120e_coco", {"ema": {"module": state}})
    data = yolo(tmp_path / "my_data")
    block = README.partition("## Train on your data")[2].partition("```sh\n")[2].partition("```")[0]
    lines = re.findall(r"python -m detr_exp\.(\w+) (.*)", block.replace("\\\n", " "))
    assert [name for name, _ in lines] == ["train", "predict"]
    words = shlex.split(lines[0][1].replace("/path/to/my_data", str(data)))
    assert "experiment=rtdetrv2_r18vd_finetune" in words
    fewer = ["trainer.max_steps=1", "trainer.epochs=1", "data.stop_epoch=null", "trainer.batch_size=2"]
    quiet = ["tracker=none", "trainer/hardware=cpu", "trainer.hardware.amp=null", "data.num_workers=0"]
    assert command(train.main, *words, *fewer, *quiet) == 0
    told = capfd.readouterr()
    assert "rtdetrv2_r18vd_120e_coco (COCO)" in told.out + told.err
    assert host.transfers() == 1
    (run,) = (path.parent for path in tmp_path.glob("outputs/*/*/run.json"))
    words = shlex.split(lines[1][1].replace("<", "").replace(">", ""))
    words = [f"checkpoint={run}" if word.startswith("checkpoint=") else word for word in words]
    words = [f"source={data}/valid/images" if word.startswith("source=") else word for word in words]
    assert command(predict.main, *words, *(["tracker=none"] if "tracker" in str(words) else [])) == 0
